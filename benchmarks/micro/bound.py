"""How fast the hardware could go: its memory bandwidth and matmul peaks, measured, and the bound that follows.

docs/benchmarking.md derives the bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import BenchmarkError
from ipex_vllm.low_bit import formats as low_bit
from ipex_vllm.low_bit.recipe import Storage, on_load

BUFFER_BYTES = 2**30
MATMUL_SIZE = 2048
REPEATS = 5


@dataclass(frozen=True)
class Weights:
    """How a system keeps its weights: bits per weight, scales included, and what its matmuls compute in."""

    bits: float
    head_bits: float
    compute: str

    @classmethod
    def of(cls, row: low_bit.Format) -> Weights:
        """One of our formats, as `recipe.on_load` stores a layer and the output head."""
        if row.kind == "dtype":
            return cls(row.bits, row.bits, "float")
        recipe = on_load(row)
        body, head = (recipe.storage("layer", 4096, is_head=is_head) for is_head in (False, True))
        return cls(_bits(body), _bits(head), "int8" if row.kind == "integer" or row.is_packed else "float")


def _bits(storage: Storage | str) -> float:
    """Bits per weight; scales of whole output channels are left out, which are too few to count."""
    assert isinstance(storage, Storage)
    size = storage.group_size
    return storage.format.bits + (8 * storage.scale_bytes / size if size else 0)


# head_bits are those of the output projection, which OpenVINO keeps in 8 bits.
WEIGHTS = {name: Weights.of(row) for name, row in low_bit.FORMATS.items()} | {
    "openvino_int8": Weights(8, 8, "int8"),
    "openvino_int4": Weights(4.25, 8, "int8"),
    "q4_0": Weights(4.5, 4.5, "int8"),
    "q8_0": Weights(8.5, 8.5, "int8"),
}


@dataclass(frozen=True)
class Peaks:
    """Measured: bytes/s read, and operations/s (a multiply-add is two) in fp32, bf16 and int8."""

    read_bytes_per_s: float
    fp32_ops_per_s: float
    bf16_ops_per_s: float
    int8_ops_per_s: float

    def ops_per_s(self, compute: str) -> float:
        """`float`: the faster of fp32 and bf16, since a core without bf16 arithmetic widens the weights instead.

        `int8`: likewise; without VNNI PyTorch's int8 is a plain loop, which tells nothing of the core.
        """
        floats = max(self.fp32_ops_per_s, self.bf16_ops_per_s)
        return max(self.int8_ops_per_s, floats) if compute == "int8" else floats


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder that decide what a token costs."""

    body_weights: int
    head_weights: int
    num_layers: int
    attention_width: int
    kv_width: int

    @classmethod
    def read(cls, model: Path) -> ModelShape:
        """Read a Llama-like `config.json` (attention and gated MLP without biases). Raises BenchmarkError."""
        try:
            config = json.loads((model / "config.json").read_text())
            hidden, layers = config["hidden_size"], config["num_hidden_layers"]
            heads = config["num_attention_heads"]
            head_dim = config.get("head_dim") or hidden // heads
            kv_width = (config.get("num_key_value_heads") or heads) * head_dim
            attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_width
            mlp = 3 * hidden * config["intermediate_size"]
            head = hidden * config["vocab_size"]
        except (OSError, ValueError, KeyError) as error:
            raise BenchmarkError(f"{model}: no roofline for this model ({type(error).__name__}: {error})") from None
        return cls(layers * (attention + mlp), head, layers, heads * head_dim, kv_width)

    def weight_bytes(self, format: Weights) -> float:
        """What a step reads of weights."""
        return (self.body_weights * format.bits + self.head_weights * format.head_bits) / 8

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, in 16 bits."""
        return 2 * self.num_layers * self.kv_width * 2

    @property
    def attention_ops(self) -> int:
        """Operations of one token for each that it attends to: scores and values."""
        return 4 * self.num_layers * self.attention_width


def bound_tps(
    peaks: Peaks, shape: ModelShape, format: Weights, concurrency: int, prompt_tokens: int, output_tokens: int
) -> float:
    """Most output tokens/s that `concurrency` requests in step can have, prefill included.

    Every step reads all weights once and each request's KV cache (16 bit), and computes two operations per weight and
    token and four per cached token and unit of attention width; it cannot be shorter than the slower of the two. The
    prefill yields the first token of each request; KV cache it writes and activations are left out, so the bound is
    a little generous. (The roofline model is Williams, Waterman and Patterson's, CACM 2009.)
    """
    weight_bytes, ops_per_s = shape.weight_bytes(format), peaks.ops_per_s(format.compute)

    def step_s(tokens: int, cached_bytes: float, attended: float) -> float:
        read_s = (weight_bytes + cached_bytes) / peaks.read_bytes_per_s
        ops = concurrency * (2 * shape.body_weights * tokens + 2 * shape.head_weights + shape.attention_ops * attended)
        return max(read_s, ops / ops_per_s)

    total_s = step_s(prompt_tokens, 0, prompt_tokens * (prompt_tokens + 1) / 2)
    for context in range(prompt_tokens + 1, prompt_tokens + output_tokens):
        total_s += step_s(1, concurrency * context * shape.kv_bytes_per_token, context)
    return concurrency * output_tokens / total_s


def work_bound_tps(
    peaks: Peaks,
    shape: ModelShape,
    format: Weights,
    sessions: Sequence[Sequence[tuple[int, int]]],
    concurrency: int | None,
    prefix: int,
    last_arrival_s: float,
) -> float:
    """Most output tokens/s of sessions of (new prompt tokens, output tokens) turns, whoever shares a step with whom.

    The time is at least that of all arithmetic; that of reading the weights once a step, of which there are as many as
    the longest session has output tokens and as `concurrency` sessions at a time need (None: any number), and each
    token's KV cache; and `last_arrival_s`. What a conversation has had so far is not computed again, nor are the first
    `prefix` tokens, which all sessions share. Steps that read much and those that compute much are not told apart, so
    this is more generous than `bound_tps`.
    """
    output_tokens = ops = attended = cached = 0
    for index, turns in enumerate(sessions):
        context = prefix if index else 0
        for number, (prompt, output) in enumerate(turns):
            new = prompt - (context if number == 0 else 0)
            computed = new + output - 1  # the last token is not fed back
            ops += 2 * shape.body_weights * computed + 2 * shape.head_weights * output
            attended += computed * context + computed * (computed + 1) // 2
            cached += (output - 1) * (context + new) + output * (output - 1) // 2
            output_tokens += output
            context += computed
    ops += shape.attention_ops * attended
    longest = max(sum(output for _, output in turns) for turns in sessions)
    steps = max(longest, output_tokens / (concurrency or output_tokens))
    read_s = (steps * shape.weight_bytes(format) + cached * shape.kv_bytes_per_token) / peaks.read_bytes_per_s
    return output_tokens / max(read_s, ops / peaks.ops_per_s(format.compute), last_arrival_s)


def measure_peaks() -> Peaks:
    """Measure on all cores this process may use; the best of REPEATS counts. Takes some ten seconds."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    matrix, vector = torch.ones(BUFFER_BYTES // 4).view(-1, 2**14), torch.ones(2**14)
    read_s = min(_best_s(matrix.sum), _best_s(lambda: torch.mv(matrix, vector)))

    def matmul_ops_per_s(dtype: torch.dtype) -> float:
        left, right = (torch.randint(-8, 8, (MATMUL_SIZE, MATMUL_SIZE)).to(dtype) for _ in range(2))
        if dtype == torch.int8:
            seconds = _best_s(lambda: torch._int_mm(left, right.t()))
        else:
            seconds = _best_s(lambda: torch.nn.functional.linear(left, right))
        return 2 * MATMUL_SIZE**3 / seconds

    return Peaks(
        BUFFER_BYTES / read_s, *(matmul_ops_per_s(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8))
    )


def _best_s(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def peaks_in_subprocess() -> Peaks:
    """Measure in a process of its own, so that neither torch nor its threads stay with the load generator."""
    command = [sys.executable, "-m", "benchmarks.roofline"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"the roofline could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return Peaks(**json.loads(done.stdout.strip().splitlines()[-1])["peaks"])
