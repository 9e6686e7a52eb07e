"""Which 16 bits, or 32, a processor computes in, where nobody chose: what its own matmuls take says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ipex_vllm.errors import OptionError
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.matmul_speed import ROWS, MatmulTimes, matmul_times
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.plan import PROCESS_MEMORY_BYTES, Demands

FLOAT32_MEMORY_SHARE = 0.7  # of the free memory, the most that weights of twice the size may take
FORMATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

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


def choose_weights(
    machine: MachineFacts, cores: Sequence[int], options: WorkerOptions, model: ModelFacts
) -> tuple[WorkerOptions, str]:
    """Return `options` with a weight format, where the user chose none and the machine makes one better; and why.

    `cores` are a rank's logical CPUs.
    """
    if model.is_gated_linear and options.low_bit == "bf16":
        return options, "weights: bf16 (in which alone vLLM computes gated linear attention on a CPU)"
    if options.low_bit is not None:
        return options, f"weights: {options.low_bit} (chosen with --low-bit)"
    if model.is_quantized:
        what = f" ({model.quantization})" if model.quantization else ""
        return options, f"weights: as they are in the checkpoint, which is quantized{what}"
    if model.num_hosts > 1:
        return options, "weights: the checkpoint's own dtype (all hosts have to compute in one; --low-bit chooses it)"
    own = "float16" if model.dtype == "float16" else "bfloat16"
    candidates = list(dict.fromkeys((own, "bfloat16")))
    growth = 1 if model.dtype == "float32" else 2
    wanted = growth * (model.weight_bytes or machine.memory_available) + PROCESS_MEMORY_BYTES
    if wanted <= machine.memory_available * FLOAT32_MEMORY_SHARE:
        candidates.append("float32")
    if len(candidates) == 1:
        return options, "weights: the checkpoint's own dtype (float32 would not fit, however fast)"
    times = matmul_times(machine, cores)
    if times is None:
        return options, "weights: the checkpoint's own dtype (PyTorch's speed could not be measured)"
    best = min(candidates, key=lambda dtype: request_time(times, dtype))
    gain = request_time(times, own) / request_time(times, best)
    measured = times.describe(candidates)
    if gain < LEAST_GAIN:
        return options, f"weights: the checkpoint's own dtype ({measured})"
    return replace(options, low_bit=FORMATS[best]), (
        f"weights: {best}, {gain:.1f} times as fast as {own} ({measured}; --low-bit {FORMATS[own]} keeps the "
        "checkpoint's own, sym_int8 and sym_int4 take less memory)"
    )


def request_time(times: MatmulTimes, dtype: str) -> float:
    """Seconds that the layer takes of a request, as the geometric mean of one stream alone and of 16."""
    one, sixteen, prompt = times.seconds[dtype]
    prefill = prompt * PROMPT / ROWS[2]
    return math.sqrt((prefill + ANSWER * one / ROWS[0]) * (prefill + ANSWER * sixteen / ROWS[1]))
