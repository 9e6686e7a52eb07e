"""Linear layers of one shape in every kernel there is, interleaved in one process, medians.

    python -m benchmarks.kernels [--shapes 5632x2048,2048x5632 --rows 1,4,16,64 --threads 2 --isa avx512_vnni]

Prints a table (ms, and what part of the machine's read bandwidth and int8 peak without AMX our int4 kernel reaches)
and, as its last line, the same as JSON. Each kernel has several copies of its weights, more than the caches hold.
`--isa` keeps our kernels to one instruction set, as ONEDNN_MAX_CPU_ISA does oneDNN. docs/kernels.md
discusses the results. Needs vLLM, g++ and a CPU with AVX-512 VNNI.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.options import BenchmarkError
from ipex_vllm.low_bit.kernels import w4a8, w8a8
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.plan import cpu

Linear = Callable[[torch.Tensor], torch.Tensor]

SHAPES = "5632x2048,2048x5632,2048x2048,4096x11008"
ROWS = "1,2,4,8,16,32,64,256"
ROTATED_BYTES = 150e6
SECONDS_PER_CELL = 1.2
MIN_REPEATS = 9


def onednn_bf16(outputs: int, inputs: int) -> Linear:
    from vllm import _custom_ops as ops

    handler = ops.create_onednn_mm(torch.randn(outputs, inputs, dtype=torch.bfloat16).t(), 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def onednn_w8a8(outputs: int, inputs: int) -> Linear:
    from vllm import _custom_ops as ops

    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    handler = ops.create_onednn_scaled_mm(codes.t(), torch.rand(1, outputs), torch.bfloat16, True, False, 32)

    def linear(x: torch.Tensor) -> torch.Tensor:
        x_codes, x_scales, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
        out = x.new_empty(x.shape[0], outputs)
        ops.onednn_scaled_mm(handler, x_codes, out, x_scales, None, None, None)
        return out

    return linear


def vllm_da8w4(outputs: int, inputs: int) -> Linear:
    from vllm import _custom_ops as ops

    groups = inputs // 64
    codes = torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), dtype=torch.int32)
    zeros = torch.full((groups, outputs // 8), 0x88888888 - 2**32, dtype=torch.int32)
    scales = torch.rand(groups, outputs, dtype=torch.bfloat16)
    weights = ops.convert_weight_packed_scale_zp(codes, zeros, scales, ops.CPUQuantAlgo.AWQ)
    return lambda x: ops.int4_scaled_mm_cpu(x, weights[0], weights[1], weights[2], None)


def torch_int4pack(outputs: int, inputs: int) -> Linear:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    terms = torch.rand(inputs // 64, outputs, 2, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 64, terms)


isa = 0  # of our kernels; 0 is the best one for so many rows


def ours_int4(group: int, symmetric: bool) -> Callable[[int, int], Linear]:
    def create(outputs: int, inputs: int) -> Linear:
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
        scales = torch.rand(outputs, inputs // group)
        packed = w4a8.pack(codes, scales, None if symmetric else -7.5 * scales)
        return lambda x: w4a8.linear(x, packed, None, outputs, group, symmetric, isa)

    return create


def ours_int8(group: int) -> Callable[[int, int], Linear]:
    def create(outputs: int, inputs: int) -> Linear:
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        packed = w8a8.pack(codes, torch.rand(outputs, inputs // group if group else 1))
        return lambda x: w8a8.linear(x, packed, None, outputs, group, isa)

    return create


INT4, INT8 = "w4a8 sym 32", "w8a8 32"  # what the ratios are for
KERNELS: dict[str, tuple[Callable[[int, int], Linear], float]] = {  # and the bits of a weight
    "onednn bf16": (onednn_bf16, 16),
    "onednn w8a8": (onednn_w8a8, 8),
    "vllm da8w4": (vllm_da8w4, 4.6),
    "int4pack": (torch_int4pack, 4.5),
    INT4: (ours_int4(32, True), 4.5),
    "w4a8 sym 64": (ours_int4(64, True), 4.25),
    "w4a8 asym 32": (ours_int4(32, False), 5),
    INT8: (ours_int8(32), 8.5),
    "w8a8 64": (ours_int8(64), 8.25),
    "w8a8 row": (ours_int8(w8a8.ROW), 8),
}
OTHERS = ("onednn bf16", "onednn w8a8", "vllm da8w4", "int4pack")


def available_kernels() -> list[str]:
    """vLLM loads one of several builds by the CPU; the one for AVX-512 without bf16 has no int4 kernel."""
    import vllm._custom_ops  # noqa: F401

    missing = [] if hasattr(torch.ops._C, "int4_scaled_mm_cpu") else ["vllm da8w4"]
    return [name for name in KERNELS if name not in missing]


class BusyMachine:
    """The read bandwidth and the int8 peak, measured between the kernels' own calls."""

    def __init__(self, threads: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            library = Path(directory, "peaks.so")
            source = Path(__file__).with_name("peaks.cpp")
            flags = ["-O2", "-shared", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512vnni"]
            subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
            self.library = ctypes.CDLL(str(library))
        self.library.read_seconds.restype = self.library.int8_ops_per_second.restype = ctypes.c_double
        self.buffer = torch.ones(int(ROTATED_BYTES), dtype=torch.int8)
        self.position = 0
        self.threads = threads

    def read_bytes_per_s(self, size: int) -> float:
        """Read `size` bytes that were not read lately, as a layer of that size has to; its threads start here too."""
        if self.position + size > self.buffer.numel():
            self.position = 0
        address = ctypes.c_void_p(self.buffer.data_ptr() + self.position)
        self.position += size // 64 * 64
        return size / float(self.library.read_seconds(address, ctypes.c_int64(size), self.threads))

    def int8_ops_per_s(self) -> float:
        return float(self.library.int8_ops_per_second(self.threads))


def measure(
    machine: BusyMachine, kernels: dict[str, list[Linear]], x: torch.Tensor, weight_bytes: int
) -> dict[str, float]:
    """Median seconds of each kernel for x, and the medians of `read_bytes_per_s` and `int8_ops_per_s` beside them."""
    samples: dict[str, list[float]] = {name: [] for name in [*kernels, "read_bytes_per_s", "int8_ops_per_s"]}
    begun, repeat = time.perf_counter(), 0
    while repeat < MIN_REPEATS or time.perf_counter() - begun < SECONDS_PER_CELL:
        # Each time in another order: what the one before leaves in the caches and the clock is nobody's advantage.
        for name, copies in random.sample(list(kernels.items()), len(kernels)):
            for turn in range(2):
                linear = copies[(2 * repeat + turn) % len(copies)]
                called = time.perf_counter()
                linear(x)
                samples[name].append(time.perf_counter() - called)
        samples["read_bytes_per_s"].append(machine.read_bytes_per_s(weight_bytes))
        samples["int8_ops_per_s"].append(machine.int8_ops_per_s())
        repeat += 1
    return {name: statistics.median(values) for name, values in samples.items()}


def benchmark_shape(
    machine: BusyMachine, names: list[str], outputs: int, inputs: int, rows: list[int]
) -> list[dict[str, Any]]:
    kernels = {}
    for name in names:
        create, bits = KERNELS[name]
        copies = 1 + int(ROTATED_BYTES / (outputs * inputs * bits / 8))
        kernels[name] = [create(outputs, inputs) for _ in range(copies)]
    weight_bytes = int(outputs * inputs * KERNELS[INT4][1] / 8)
    results = []
    for m in rows:
        median = measure(machine, kernels, torch.randn(m, inputs, dtype=torch.bfloat16), weight_bytes)
        others = [median[name] for name in names if name in OTHERS]
        seconds = median[INT4]
        result = {
            "outputs": outputs,
            "inputs": inputs,
            "rows": m,
            "ms": {name: round(median[name] * 1e3, 4) for name in names},
            "of_best_other": round(min(others) / seconds, 3),
            "int8_of_onednn_w8a8": round(median["onednn w8a8"] / median[INT8], 3),
            "of_read_bandwidth": round(weight_bytes / seconds / median["read_bytes_per_s"], 3),
            "of_int8_peak": round(2 * m * outputs * inputs / seconds / median["int8_ops_per_s"], 3),
            "read_gb_per_s": round(median["read_bytes_per_s"] / 1e9, 1),
            "int8_tops": round(median["int8_ops_per_s"] / 1e12, 3),
        }
        results.append(result)
        print(_table_row(result), flush=True)
    return results


def _table_row(result: dict[str, Any]) -> str:
    cells = [f"{result['outputs']}x{result['inputs']}", str(result["rows"])]
    cells += [f"{ms:.3f}" for ms in result["ms"].values()]
    ratios = ("of_best_other", "int8_of_onednn_w8a8", "of_read_bandwidth", "of_int8_peak")
    return "| " + " | ".join(cells + [f"{result[ratio]:.2f}" for ratio in ratios]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare linear layers of one shape in every kernel there is.")
    parser.add_argument("--shapes", default=SHAPES, help="OUTPUTSxINPUTS, separated by commas")
    parser.add_argument("--rows", default=ROWS, help="numbers of rows, separated by commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=w4a8.ISAS.values(), help="compute with this instruction set in our kernels")
    args = parser.parse_args()
    if args.isa:
        global isa
        isa = next(number for number, name in w4a8.ISAS.items() if name == args.isa)
    facts = MachineFacts.probe()
    if "avx512_vnni" not in facts.isa:
        raise BenchmarkError(
            "this comparison needs a CPU with AVX-512 VNNI: without, neither oneDNN's nor vLLM's kernels are there"
        )
    cpu.apply(facts)  # the libraries that the worker computes with
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names, machine = available_kernels(), BusyMachine(args.threads)
    head = ["shape", "rows", *names, f"best other / {INT4}", f"onednn w8a8 / {INT8}", "of read", "of peak"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    results = []
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            outputs, inputs = (int(size) for size in shape.split("x"))
            rows = [int(m) for m in args.rows.split(",")]
            results += benchmark_shape(machine, names, outputs, inputs, rows)
    print(json.dumps({"machine": describe_machine(), "threads": args.threads, "results": results}))
    return 0
