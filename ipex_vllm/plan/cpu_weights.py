"""Which 16 bits, or 32, a processor computes in, where nobody chose, and whose matmul does: what they take says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ipex_vllm.errors import OptionError
from ipex_vllm.low_bit.matmul_speed import OWN, ROWS, MatmulTimes, matmul_times
from ipex_vllm.low_bit.recipe import VISION
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.plan import PROCESS_MEMORY_BYTES, Demands

FLOAT32_MEMORY_SHARE = 0.7  # of the free memory, the most that weights of twice the size may take
FORMATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
DTYPES = {format: dtype for dtype, format in FORMATS.items()}
SIXTEEN_BITS = ("bfloat16", "float16")

# A request to compare by, in tokens. At one stream an answer reads the weights for each of its tokens, which half the
# bytes make faster; prompts, and many streams, want arithmetic.
PROMPT, ANSWER = 256, 128
# Another dtype than the checkpoint's computes other numbers, and may take twice the memory: no close race decides that.
LEAST_GAIN = 1.25


def choose_bf16(options: WorkerOptions, model: ModelFacts, demands: Demands) -> WorkerOptions:
    """Return `options` for a model that computes in nothing else; raises OptionError where they ask for it."""
    for flag, value in (("--dtype", demands.dtype), ("--low-bit", options.low_bit)):
        if value in ("float32", "float16", "fp32", "fp16"):
            raise OptionError(
                f"{flag} {value}: on a CPU the model's gated linear attention is computed in bf16 alone; leave it out"
            )
    has_own_format = options.low_bit is not None or model.is_quantized
    return options if has_own_format else replace(options, low_bit="bf16")


@dataclass(frozen=True)
class Weights:
    """What was chosen.

    Attributes:
        options: with a weight format, where the user chose none and the machine makes one better.
        line: what, and why.
        own_16_bits: layers in 16 bits are multiplied by our kernel, not vLLM's.
    """

    options: WorkerOptions
    line: str
    own_16_bits: bool = False


def choose_weights(
    machine: MachineFacts, cores: Sequence[int], options: WorkerOptions, model: ModelFacts, demands: Demands
) -> Weights:
    """Choose for a rank whose logical CPUs are `cores`."""
    takes_own = demands.takes_own_16_bits and not options.upstream_kernels and model.num_hosts == 1
    asked = demands.dtype if options.low_bit is None else DTYPES.get(options.low_bit)
    leaves_layers = leaves_layers_in_16_bits(options, model)
    if leaves_layers:
        asked = asked or demands.dtype or model.dtype

    def multiplied(dtype: str | None, line: str) -> Weights:
        """The weights that `line` says; where they, or some of them, are in `dtype`, by whichever kernel is faster."""
        if dtype not in SIXTEEN_BITS or not takes_own:
            return Weights(options, line)
        times = matmul_times(machine, cores)
        if times is None or (way := fastest_way(times, dtype, takes_own)) == dtype:
            return Weights(options, line)
        layers = f"layers left in {dtype}, if any, " if leaves_layers else ""
        return Weights(options, f"{line}, {layers}multiplied by our kernel ({times.describe((dtype, way))})", True)

    if options.low_bit is not None:
        what = f"weights: {options.low_bit} (chosen with --low-bit)"
        if model.is_gated_linear and options.low_bit == "bf16":
            what = "weights: bf16 (in which alone vLLM computes gated linear attention on a CPU)"
        return multiplied(asked, what)
    if model.is_quantized:
        what = f" ({model.quantization})" if model.quantization else ""
        return multiplied(asked, f"weights: as they are in the checkpoint, which is quantized{what}")
    if asked is not None:
        return multiplied(asked, f"weights: {asked} (chosen with --dtype)")
    if model.num_hosts > 1:
        what = "weights: the checkpoint's own dtype (all hosts have to compute in one; --low-bit chooses it)"
        return Weights(options, what)
    own = "float16" if model.dtype == "float16" else "bfloat16"
    candidates = list(dict.fromkeys((own, "bfloat16")))
    growth = 1 if model.dtype == "float32" else 2
    wanted = growth * (model.weight_bytes or machine.memory_available) + PROCESS_MEMORY_BYTES
    if wanted <= machine.memory_available * FLOAT32_MEMORY_SHARE:
        candidates.append("float32")
    if len(candidates) == 1:
        what = "weights: the checkpoint's own dtype"
        return multiplied(own, f"{what} (float32 would not fit, however fast)")
    times = matmul_times(machine, cores)
    if times is None:
        return Weights(options, "weights: the checkpoint's own dtype (PyTorch's speed could not be measured)")
    ways = {dtype: fastest_way(times, dtype, takes_own) for dtype in candidates}
    best = min(candidates, key=lambda dtype: request_time(times, ways[dtype]))
    gain = request_time(times, ways[own]) / request_time(times, ways[best])
    measured = times.describe(way for dtype in candidates for way in dict.fromkeys((dtype, ways[dtype])))
    if gain < LEAST_GAIN:
        return Weights(options, f"weights: the checkpoint's own dtype ({measured})", ways[own] != own)
    line = (
        f"weights: {best}, {gain:.1f} times as fast as {own} ({measured}; --low-bit {FORMATS[own]} keeps the "
        "checkpoint's own, sym_int8 and sym_int4 take less memory)"
    )
    return Weights(replace(options, low_bit=FORMATS[best]), line, ways[best] != best)


def leaves_layers_in_16_bits(options: WorkerOptions, model: ModelFacts) -> bool:
    """Whether large layers stay as they are beside quantized ones, as a checkpoint's output head or a vision tower."""
    if options.low_bit is None or model.is_quantized:
        return model.is_quantized
    leaves_any = options.low_bit_head == "none" or any(map(VISION.search, model.tensors))
    return leaves_any and options.low_bit not in DTYPES


def fastest_way(times: MatmulTimes, dtype: str, takes_own: bool) -> str:
    """The dtype itself, which is vLLM's kernel, or with OWN behind it where ours is there, taken and faster."""
    own = dtype + OWN
    if not takes_own or own not in times.seconds:
        return dtype
    return min(dtype, own, key=lambda way: request_time(times, way))


def request_time(times: MatmulTimes, way: str) -> float:
    """Seconds that the layer takes of a request, as the geometric mean of one stream alone and of 16."""
    one, sixteen, prompt = times.seconds[way]
    prefill = prompt * PROMPT / ROWS[2]
    return math.sqrt((prefill + ANSWER * one / ROWS[0]) * (prefill + ANSWER * sixteen / ROWS[1]))
