"""Intel GPUs ("XPU"): what is there, and the settings that follow from it; what cpu.py is for processors.

Written against vLLM 0.32 and PyTorch 2.13, whose names the tests check, and not yet run on hardware: see docs/xpu.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ipex_vllm.errors import EngineError
from ipex_vllm.machine.facts import GIB, MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.plan import Demands, Plan, context_line, fitted_context, shortened, wanted_context, weight_bytes

MEMORY_SHARE = 0.92  # vLLM's own default for a card that is free; the rest is the driver's and the desktop's
ACTIVATION_BYTES = GIB  # of a prefill step, and oneDNN's and oneCCL's buffers

# They choose which cards PyTorch sees; the numbers count what the one before leaves.
SELECTORS = ("ZE_AFFINITY_MASK", "ONEAPI_DEVICE_SELECTOR")

# From the quick start of IPEX-LLM. Set today, they do nothing, or something else than they did.
OUTDATED_VARIABLES = {
    "USE_XETLA": "XeTLA was part of Intel's extension for PyTorch; vLLM's XPU kernels do not read it",
    "SYCL_PI_LEVEL_ZERO_USE_IMMEDIATE_COMMANDLISTS": (
        "immediate command lists are the default now; UR_L0_USE_IMMEDIATE_COMMANDLISTS is the name on older GPUs"
    ),
    "BIGDL_LLM_XMX_DISABLED": "a switch of ipex-llm's own kernels, which are not in use here",
    "IPEX_LLM_LOWBIT": "the format is chosen with --low-bit",
}


@dataclass(frozen=True)
class Card:
    """One GPU, as this process may use it. Memory in bytes."""

    name: str
    memory_total: int
    memory_free: int


@dataclass(frozen=True)
class Gpus:
    """The GPUs that PyTorch sees, and the machine that they are in."""

    cards: tuple[Card, ...]
    machine: MachineFacts


def apply(machine: MachineFacts) -> None:
    """Nothing: what computes on a GPU comes with PyTorch's build for it."""


def probe(machine: MachineFacts) -> Gpus:
    """The GPUs that PyTorch sees; none with a build of it that knows only processors."""
    import torch

    cards = []
    for index in range(torch.xpu.device_count()):
        free, total = torch.xpu.mem_get_info(index)
        cards.append(Card(torch.xpu.get_device_name(index), total, free))
    return Gpus(tuple(cards), machine)


def choose(
    gpus: Gpus,
    options: WorkerOptions,
    model: ModelFacts,
    demands: Demands,
    environ: Mapping[str, str] = os.environ,
) -> Plan:
    """Choose the settings. Raises EngineError when there are too few cards, or the model does not fit into them."""
    cards, num_ranks = gpus.cards, demands.num_ranks
    if not cards:
        raise EngineError(
            "--device xpu: PyTorch finds no Intel GPU. It needs one, its driver, and XPU builds of PyTorch and vLLM; "
            "docs/xpu.md says how to get them."
        )
    if num_ranks > len(cards):
        raise EngineError(f"--device xpu: {num_ranks} GPUs are asked for and PyTorch sees {len(cards)}")
    used = cards[:num_ranks]
    utilization = min(MEMORY_SHARE, *(MEMORY_SHARE * card.memory_free / card.memory_total for card in used))
    kv_cache_bytes, kv_reason, context = _choose_kv_cache(used, options, model, utilization, demands)
    whole = wanted_context(model, demands)
    short = shortened(context, whole)
    names = ", ".join(
        f"{card.name} ({card.memory_free / GIB:.1f} of {card.memory_total / GIB:.1f} GiB)" for card in used
    )
    selectors = [f"{name}={environ[name]}" for name in SELECTORS if name in environ]
    use_compile = options.compile is not False
    return Plan(
        model_path=options.model_path,
        names=options.names,
        device="xpu",
        low_bit=options.low_bit,
        low_bit_head=options.low_bit_head,
        low_bit_outer=options.low_bit_outer,
        low_bit_cache=options.low_bit_cache,
        upstream_kernels=options.upstream_kernels,
        rank_cores=(tuple(cpu.id for cpu in gpus.machine.cpus),) * num_ranks,
        kv_cache_bytes=kv_cache_bytes,
        is_kv_cache_estimated=options.kv_cache_gib is None,
        use_compile=use_compile,
        context=short,
        memory_share=utilization,
        lines=(
            f"GPUs: {names} free; {len(cards)} seen ({', '.join(selectors) or f'{SELECTORS[0]} narrows them down'})",
            f"KV cache: {kv_cache_bytes / GIB:.2f} GiB a GPU ({kv_reason})",
            *([] if short is None else [context_line(short, whole, kv_cache_bytes * num_ranks)]),
            f"mode: {'torch.compile' if use_compile else 'eager'} "
            + ("(vLLM's default; --no-compile starts sooner)" if use_compile else "(chosen with --no-compile)"),
            *(f"{name} is set: {what}" for name, what in OUTDATED_VARIABLES.items() if name in environ),
        ),
    )


def _choose_kv_cache(
    cards: Sequence[Card], options: WorkerOptions, model: ModelFacts, utilization: float, demands: Demands
) -> tuple[int, str, int | None]:
    """Bytes of a GPU, the reason, and the context in tokens that they hold, None if that is not known."""
    if options.kv_cache_gib is not None:
        return int(options.kv_cache_gib * GIB), "chosen with --kv-cache-gib", None
    budget = int(min(card.memory_total for card in cards) * utilization)
    weights = weight_bytes(model, options)
    if weights is None or model.kv_cache is None:
        return budget // 2, "the model's size is not known yet; vLLM measures what is left", None
    size = budget - weights // len(cards) - ACTIVATION_BYTES
    wanted = wanted_context(model, demands)
    context = fitted_context(model.kv_cache, wanted, size * len(cards), demands)
    if context is None:
        raise EngineError(
            f"too little GPU memory: {budget / GIB:.1f} GiB can be used on each of {len(cards)}, "
            f"{weights / len(cards) / GIB:.1f} GiB weights, {ACTIVATION_BYTES / GIB:.1f} GiB activations, and one "
            f"sequence of {wanted} tokens needs {model.kv_cache.sequence_bytes(wanted) / len(cards) / GIB:.2f} GiB of "
            "KV cache. Use a smaller --low-bit, shorten --max-model-len, or spread the model with "
            "--tensor-parallel-size."
        )
    sequences = size * len(cards) // model.kv_cache.sequence_bytes(context)
    return size, f"about {sequences} sequences of {context} tokens; vLLM measures it", context
