"""Command: benchmarks/load/sweep.py."""

from benchmarks.load.sweep import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
