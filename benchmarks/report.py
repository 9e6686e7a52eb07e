"""Command: benchmarks/compare/report.py."""

from benchmarks.compare.report import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
