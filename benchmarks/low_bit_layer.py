"""Command: benchmarks/micro/low_bit_layer.py."""

from benchmarks.micro.low_bit_layer import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
