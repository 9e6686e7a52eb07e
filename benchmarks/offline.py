"""Command: benchmarks/compare/offline.py."""

from benchmarks.compare.offline import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
