"""Command: benchmarks/micro/roofline.py."""

from benchmarks.micro.roofline import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
