"""Command: benchmarks/load/serve.py."""

from benchmarks.load.serve import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
