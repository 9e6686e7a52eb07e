"""One layer of experts in every kernel there is: `python -m benchmarks.expert_layer [--tokens 1,4,16,64]`.

Qwen3-30B-A3B's by default. Each token chooses its experts at random. One call after the other in one process, each time
in another order; printed are medians in milliseconds, and what part of the machine's read bandwidth our int4 reaches on
the bytes of the experts that were chosen. The last line is the same as JSON. Needs vLLM, g++ and a CPU with AVX-512
VNNI; vLLM has kernels for quantized experts where there is AMX.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.machine import describe_machine
from benchmarks.micro.kernels import BusyMachine
from ipex_vllm.low_bit.experts import LowBitExperts
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.kernels import experts as kernel
from ipex_vllm.low_bit.quantize import quantize
from ipex_vllm.low_bit.recipe import ExpertStorage, Storage
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.plan import cpu

# Of x [tokens, hidden], the chosen experts' weights and their ids, both [tokens, chosen].
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
SECONDS_PER_CELL = 4.0
MIN_REPEATS = 15
GROUP = 32


@dataclass(frozen=True)
class Shape:
    experts: int
    hidden: int
    intermediate: int
    chosen: int


def ours(name: str, shape: Shape) -> Experts:
    """Every expert has the same weights, each in memory of its own."""
    storage = Storage(FORMATS[name], GROUP if FORMATS[name].kind != "float8" else None)
    buffers = {}
    for part, rows, inputs in (
        ("gate_up", 2 * shape.intermediate, shape.hidden),
        ("down", shape.hidden, shape.intermediate),
    ):
        packed = kernel.pack(quantize(torch.randn(rows, inputs), storage.format, storage.group_size or 0))
        buffers[part] = packed.repeat(shape.experts, 1)
    return LowBitExperts.of_buffers(ExpertStorage(storage, storage), "silu", shape.intermediate, buffers)


def vllm_bf16(shape: Shape) -> Experts:
    from vllm import _custom_ops as ops

    torch.cpu._init_amx()  # asks the kernel for tiles, as a worker of vLLM's does
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    w13 = torch.randn(2 * shape.intermediate, shape.hidden, dtype=torch.bfloat16).repeat(shape.experts, 1, 1)
    w2 = torch.randn(shape.hidden, shape.intermediate, dtype=torch.bfloat16).repeat(shape.experts, 1, 1)
    w13, w2 = (ops.cpu_prepack_moe_weight(weight, isa) for weight in (w13, w2))
    return lambda x, weights, ids: ops.cpu_fused_moe(
        torch.empty_like(x), x, w13, w2, None, None, weights, ids, "silu", isa
    )


def vllm_int8(shape: Shape) -> Experts:
    from vllm import _custom_ops as ops

    weights13 = torch.randint(-127, 128, (2 * shape.intermediate, shape.hidden), dtype=torch.int8)
    weights2 = torch.randint(-127, 128, (shape.hidden, shape.intermediate), dtype=torch.int8)
    w13, w2 = (
        torch.ops._C.convert_weight_packed(weight.repeat(shape.experts, 1, 1)) for weight in (weights13, weights2)
    )
    scales13, scales2 = (torch.rand(shape.experts, rows) for rows in (2 * shape.intermediate, shape.hidden))
    method = ops.CPUQuantMethod.INT8_W8A8
    return lambda x, weights, ids: ops.fused_experts_cpu(
        torch.empty_like(x), x, w13, w2, weights, ids, method, scales13, scales2, None, None, None
    )


def vllm_fp8(shape: Shape) -> Experts:
    from vllm import _custom_ops as ops

    block = 128

    def weight(rows: int, inputs: int) -> torch.Tensor:
        codes = torch.randn(rows, inputs).to(torch.float8_e4m3fn)
        packed: torch.Tensor = torch.ops._C.convert_weight_packed(codes.repeat(shape.experts, 1, 1))
        return packed

    def scales(rows: int, inputs: int) -> torch.Tensor:
        return torch.rand(shape.experts, rows // block, inputs // block)

    first, second = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    w13, w2, s13, s2 = weight(*first), weight(*second), scales(*first), scales(*second)
    method = ops.CPUQuantMethod.FP8_W8A16
    return lambda x, weights, ids: ops.fused_experts_cpu(
        torch.empty_like(x), x, w13, w2, weights, ids, method, s13, s2, None, None, [block, block]
    )


def vllm_int4(shape: Shape) -> Experts:
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_int4_moe_layer_for_cpu

    def codes(inputs: int, outputs: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (inputs // 8, outputs), dtype=torch.int32).repeat(shape.experts, 1, 1)

    def scales(inputs: int, outputs: int) -> torch.Tensor:
        return torch.rand(shape.experts, inputs // GROUP, outputs, dtype=torch.bfloat16)

    first, second = (shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)
    w13, w2, s13, s2, z13, z2 = prepare_int4_moe_layer_for_cpu(
        codes(*first), codes(*second), scales(*first), scales(*second)
    )
    method = ops.CPUQuantMethod.INT4_W4A8
    return lambda x, weights, ids: ops.fused_experts_cpu(
        torch.empty_like(x), x, w13, w2, weights, ids, method, s13, s2, z13, z2, None
    )


INT4 = "sym_int4"  # what the ratios are for
KERNELS: dict[str, Callable[[Shape], Experts]] = {
    "vllm bf16": vllm_bf16,
    "vllm int8": vllm_int8,
    "vllm int4": vllm_int4,
    "vllm fp8": vllm_fp8,
    **{name: partial(ours, name) for name in (INT4, "sym_int8", "fp8_e4m3")},
}


def measure(machine: BusyMachine, kernels: dict[str, Experts], shape: Shape, tokens: int) -> dict[str, float]:
    """Median seconds of each kernel, and of reading the bytes in int4 of the experts that were chosen."""
    samples: dict[str, list[float]] = {name: [] for name in [*kernels, "read"]}
    expert_bytes = 3 * shape.hidden * shape.intermediate * (4 + 16 / GROUP) / 8
    begun = time.perf_counter()
    while len(samples["read"]) < MIN_REPEATS or time.perf_counter() - begun < SECONDS_PER_CELL:
        x = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)
        weights, ids = torch.rand(tokens, shape.experts).topk(shape.chosen)
        ids = ids.to(torch.int32)
        for name, experts in random.sample(list(kernels.items()), len(kernels)):
            called = time.perf_counter()
            experts(x, weights, ids)
            samples[name].append(time.perf_counter() - called)
        read_bytes = int(len(set(ids.flatten().tolist())) * expert_bytes)
        samples["read"].append(read_bytes / machine.read_bytes_per_s(min(read_bytes, machine.buffer.numel())))
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--shape", default="2048x768", help="hidden size x an expert's features")
    parser.add_argument("--chosen", type=int, default=8, help="experts of a token")
    parser.add_argument("--tokens", default="1,4,16,64,256", help="tokens of a call, separated by commas")
    options = parser.parse_args()
    cpu.apply(MachineFacts.probe())  # the libraries that the worker computes with
    torch.manual_seed(0)
    hidden, intermediate = map(int, options.shape.split("x"))
    shape = Shape(options.experts, hidden, intermediate, options.chosen)
    with torch.inference_mode():
        kernels = {name: create(shape) for name, create in KERNELS.items() if available(name)}
        machine = BusyMachine(torch.get_num_threads())
        head = ["tokens", *kernels, "of read"]
        print("| " + " | ".join(head) + " |\n" + "|---" + "|---:" * (len(head) - 1) + "|")
        results = []
        for tokens in map(int, options.tokens.split(",")):
            median = measure(machine, kernels, shape, tokens)
            of_read = round(median["read"] / median[INT4], 2)
            results.append({"tokens": tokens, "ms": {k: round(1e3 * v, 3) for k, v in median.items()}})
            cells = [str(tokens), *(f"{1e3 * median[name]:.2f}" for name in kernels), f"{of_read:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    print(json.dumps({"machine": describe_machine(), "shape": vars(options), "results": results}))
    return 0


def available(name: str) -> bool:
    """vLLM's quantized experts need AMX."""
    return name not in ("vllm int8", "vllm int4", "vllm fp8") or torch.cpu._is_amx_tile_supported()
