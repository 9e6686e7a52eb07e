"""One linear layer in each format: `python -m benchmarks.low_bit_layer [--shape 32000x2048] [--rows 1,16]`.

Unquantized as vLLM computes it, in bfloat16 and in float32, and in each format with the kernel that this machine gets,
one call after the other in one process. Prints the median milliseconds and, as the last line of its output, the same as
JSON. The shape of an output head tells whether quantizing it is faster; `benchmarks.accuracy --parts`, what
it does to the answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from benchmarks.machine import describe_machine
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.linear import make_linear
from ipex_vllm.low_bit.quantize import quantize

Linear = Callable[[torch.Tensor], torch.Tensor]
REPEATS = 15


def unquantized(weight: torch.Tensor) -> Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    linear: Callable[..., torch.Tensor] = layer.cpu_linear  # type: ignore[assignment]
    return lambda x: linear(x, layer.weight, None)


def milliseconds(linear: Linear, x: torch.Tensor) -> float:
    started = time.perf_counter()
    linear(x)
    return 1000 * (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="5632x2048", help="outputs x inputs")
    parser.add_argument("--rows", default="1,16", help="tokens at a time")
    parser.add_argument("--formats", nargs="+", default=[row.name for row in FORMATS.values() if row.kind != "dtype"])
    options = parser.parse_args()
    outputs, inputs = map(int, options.shape.split("x"))
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        linears = {"unquantized": unquantized(weight.to(dtype))}
        linears |= {name: make_linear(quantize(weight, FORMATS[name]), dtype) for name in options.formats}
        for rows in map(int, options.rows.split(",")):
            x = torch.randn(rows, inputs, dtype=dtype)
            times: dict[str, list[float]] = {name: [] for name in linears}
            for _ in range(REPEATS):
                for name, linear in linears.items():
                    times[name].append(milliseconds(linear, x))
            medians = {name: statistics.median(values) for name, values in times.items()}
            results.append({"dtype": str(dtype), "rows": rows, "milliseconds": medians})
            print(dtype, rows, "  ".join(f"{name} {value:.2f}" for name, value in medians.items()), flush=True)
    print(json.dumps({"shape": options.shape, "machine": describe_machine(), "results": results}))
    return 0
