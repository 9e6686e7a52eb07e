"""Command: benchmarks/compare/crosscheck.py."""

from benchmarks.compare.crosscheck import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
