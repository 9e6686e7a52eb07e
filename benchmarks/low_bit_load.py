"""Command: benchmarks/micro/low_bit_load.py."""

from benchmarks.micro.low_bit_load import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
