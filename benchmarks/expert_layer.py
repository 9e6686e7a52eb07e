"""Command: benchmarks/micro/expert_layer.py."""

from benchmarks.micro.expert_layer import main
from benchmarks.options import run_main

if __name__ == "__main__":
    run_main(main)
