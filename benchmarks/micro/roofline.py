"""Measure the machine's peaks, and print the bound that follows for a model.

python -m benchmarks.roofline [--model-path DIR --format sym_int4 --concurrency 16 --prompt 64 --output 32]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.micro.bound import WEIGHTS, ModelShape, bound_tps, measure_peaks


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure memory bandwidth and matmul peaks; print a model's bound.")
    parser.add_argument("--model-path", type=Path, help="model directory to give a bound for")
    parser.add_argument("--format", choices=WEIGHTS, default="bf16")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--output", type=int, default=32, help="output tokens")
    args = parser.parse_args()
    shape = ModelShape.read(args.model_path) if args.model_path else None
    peaks = measure_peaks()
    result: dict[str, Any] = {"peaks": asdict(peaks)}
    print(f"read {peaks.read_bytes_per_s / 1e9:.1f} GB/s", end="")
    for kind in ("fp32", "bf16", "int8"):
        print(f", {kind} matmul {getattr(peaks, f'{kind}_ops_per_s') / 1e12:.3f} TOP/s", end="")
    print()
    if shape:
        bound = bound_tps(peaks, shape, WEIGHTS[args.format], args.concurrency, args.prompt, args.output)
        result["bound_output_tps"] = bound
        print(f"bound: {bound:.1f} output tok/s for {args.concurrency} x ({args.prompt} in, {args.output} out)")
    print(json.dumps(result))
    return 0
