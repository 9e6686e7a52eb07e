"""Command: benchmarks/micro/kernels.py."""

from benchmarks.micro.kernels import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
