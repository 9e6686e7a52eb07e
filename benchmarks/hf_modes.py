"""Command: benchmarks/micro/hf_modes.py."""

from benchmarks.micro.hf_modes import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
