"""The settings that follow from a processor and its memory. Each decision is a line with its reason.

It is longer than other files because the decisions rest on each other: cores, memory, cache, context.
"""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path

from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.machine.facts import GIB, MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.cpu_weights import choose_bf16, choose_weights
from ipex_vllm.plan.plan import (
    PROCESS_MEMORY_BYTES,
    Demands,
    Plan,
    context_line,
    fitted_context,
    shortened,
    wanted_context,
    weight_bytes,
)

# From this many cores a node spares one for the HTTP server and the scheduler. On fewer, the lost core costs more
# than sharing does: on 2 cores, half of the arithmetic.
MIN_CORES_TO_RESERVE_ONE = 8

KV_CACHE_SHARE = 0.4  # of what is free after the weights; the rest is left to other programs and the page cache
KV_CACHE_MAX_SEQUENCES = 256  # vLLM's own limit on sequences in a batch; more cache than they fill is of no use
KV_CACHE_DEFAULT_BYTES = 4 * GIB  # for a model whose size is not known before it is fetched

MAMBA_1 = ("mamba", "falcon_mamba", "jamba")

# Compiling takes ten seconds to a minute at the first start, which a toy does not earn back. SmolLM2's own file, 94 MiB
# of four bits, does: it is served twice as fast (docs/benchmarking.md).
MIN_WEIGHT_BYTES_TO_COMPILE = 64 << 20


def apply(machine: MachineFacts) -> None:
    """Restart this process, once, with Intel's OpenMP and tcmalloc preloaded, where they are there and not yet loaded.

    The dynamic linker reads LD_PRELOAD when a process starts, so this comes before anything heavy is imported. So does
    asking PyTorch for huge pages: it looks once, at its first tensor.
    """
    # For tensors of 2 MiB and more. A step reads every weight once, and with pages of 4 KiB each of those is an
    # address to be looked up: docs/kernels.md has what it gains.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    loaded = os.environ.get("LD_PRELOAD", "")
    # A second OpenMP runtime or allocator beside the user's own choice would be worse than none.
    has_openmp = any(name in loaded for name in ("libiomp", "libgomp", "libomp"))
    has_malloc = "malloc" in loaded
    candidates = ((machine.tcmalloc, has_malloc), (machine.iomp, has_openmp))
    missing = [path for path, is_there in candidates if path and not is_there]
    if missing:
        preload_with(os.environ, missing)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def preload_with(environ: MutableMapping[str, str], libraries: Sequence[str]) -> None:
    """Put libraries before what is preloaded already.

    Spaces and colons part the names in LD_PRELOAD, and nothing quotes them; a library whose path has a space is named
    there without its folder, which LD_LIBRARY_PATH takes: only colons and semicolons part that.
    """
    names = []
    for path in map(Path, libraries):
        if " " in str(path):
            environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(path.parent), environ.get("LD_LIBRARY_PATH")]))
        names.append(path.name if " " in str(path) else str(path))
    environ["LD_PRELOAD"] = ":".join(filter(None, [*names, environ.get("LD_PRELOAD")]))


def probe(machine: MachineFacts) -> MachineFacts:
    """A processor is what its machine is."""
    return machine


def choose(machine: MachineFacts, options: WorkerOptions, model: ModelFacts, demands: Demands) -> Plan:
    """Choose the weights' format, where nobody did, and the settings for it. Raises OptionError and EngineError."""
    if model.model_type in MAMBA_1:
        raise EngineError(
            f"a model of the type {model.model_type} does not run on a CPU: vLLM has the operator of its state-space "
            "layers, Mamba's first kind, for GPUs alone. Models of Mamba 2 run."
        )
    if model.is_gated_linear:
        options = choose_bf16(options, model, demands)
    rank_cores, _ = _choose_cores(machine, options.cores, demands.num_ranks)
    weights = choose_weights(machine, rank_cores[0], options, model, demands)
    plan = make_plan(machine, weights.options, model, demands)
    return replace(plan, own_16_bits=weights.own_16_bits, lines=(weights.line, *plan.lines))


def make_plan(machine: MachineFacts, options: WorkerOptions, model: ModelFacts, demands: Demands) -> Plan:
    """The settings for weights as `options` have them.

    Raises OptionError, and EngineError, with the figures, when the model does not fit in the free memory.
    """
    num_ranks = demands.num_ranks
    rank_cores, cores_reason = _choose_cores(machine, options.cores, num_ranks)
    kv_cache_bytes, kv_reason, context = _choose_kv_cache(machine, options, model, rank_cores, demands)
    whole = wanted_context(model, demands)
    short = shortened(context, whole)
    use_compile, compile_reason = _choose_compile(options, model, demands)
    shown_cores = " | ".join(",".join(map(str, cores)) for cores in rank_cores)
    return Plan(
        model_path=options.model_path,
        names=options.names,
        device="cpu",
        low_bit=options.low_bit,
        low_bit_head=options.low_bit_head,
        low_bit_outer=options.low_bit_outer,
        low_bit_cache=options.low_bit_cache,
        upstream_kernels=options.upstream_kernels,
        rank_cores=rank_cores,
        kv_cache_bytes=kv_cache_bytes,
        use_compile=use_compile,
        compile_beside=options.compile is None,
        context=short,
        lines=(
            f"machine: {machine.name}; {', '.join(machine.isa) or 'no vector extension'}; "
            f"{machine.memory_available / GIB:.1f} of {machine.memory_total / GIB:.1f} GiB free",
            f"cores: {shown_cores} ({cores_reason})",
            f"preload: {_describe_preload(machine, options)}",
            f"KV cache: {kv_cache_bytes / GIB:.2f} GiB" + (" a rank" if num_ranks > 1 else "") + f" ({kv_reason})",
            *([] if short is None else [context_line(short, whole, kv_cache_bytes * num_ranks)]),
            f"mode: {'torch.compile' if use_compile else 'eager'} ({compile_reason})",
        ),
    )


def _describe_preload(machine: MachineFacts, options: WorkerOptions) -> str:
    wanted = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    # What was asked for is not always there: the dynamic linker goes on without a library that it cannot open.
    loaded = [Path(path).name for path in wanted if machine.has_loaded(path)]
    failed = [Path(path).name for path in wanted if not machine.has_loaded(path)]
    absent = [
        advice
        for path, advice in (
            (machine.iomp, "libiomp5.so (pip install intel-openmp)"),
            (machine.tcmalloc, "tcmalloc (apt install libtcmalloc-minimal4)"),
        )
        if not path
    ]
    if not options.preload:
        reason = "switched off with --no-preload"
    elif failed:
        reason = f"in LD_PRELOAD, but not loaded: {', '.join(failed)}"
    elif absent:
        reason = f"not installed: {', '.join(absent)}"
    else:
        reason = "threads wait and allocate faster than with the system's own libraries"
    return f"{', '.join(loaded) or 'nothing'} ({reason})"


def _choose_cores(machine: MachineFacts, chosen: str | None, num_ranks: int) -> tuple[tuple[tuple[int, ...], ...], str]:
    if chosen is not None:
        groups = [_parse_cpu_list(part) for part in chosen.split("|")]
        available = {cpu.id for cpu in machine.cpus}
        if unknown := sorted({cpu for group in groups for cpu in group} - available):
            raise OptionError(
                f"--cores {chosen}: this process may not use CPU {unknown[0]}; it has {_ranges(available)}"
            )
        cores = [cpu for group in groups for cpu in group]
        return tuple(groups) if len(groups) == num_ranks else _split(cores, num_ranks), "chosen with --cores"
    by_node: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    for cpu in machine.cpus:
        by_node[cpu.node].setdefault(cpu.core, cpu.id)  # one logical CPU for each physical core
    # The largest first: a process may be confined to one node and a few CPUs of another.
    nodes = sorted((sorted(cores.values()) for _, cores in sorted(by_node.items())), key=len, reverse=True)
    num_cores = sum(map(len, nodes))
    reasons = [f"{num_cores} physical cores on {len(nodes)} NUMA node(s)"]
    if len(nodes) >= num_ranks:
        ranks = [nodes[rank] for rank in range(num_ranks)]
        if len(nodes) > num_ranks:
            reasons.append(f"one node a rank; --tensor-parallel-size {len(nodes)} would use all")
    else:
        ranks = [list(cores) for cores in _split([cpu for node in nodes for cpu in node], num_ranks)]
    if machine.quota_cores is not None and machine.quota_cores < sum(map(len, ranks)):
        share = max(1, int(machine.quota_cores / num_ranks))
        ranks = [cores[:share] for cores in ranks]
        reasons.append(f"the cgroup allows {machine.quota_cores:g} CPUs")
    elif len(ranks[0]) >= MIN_CORES_TO_RESERVE_ONE:
        ranks = [cores[:-1] for cores in ranks]
        reasons.append("one spared for the server" if num_ranks == 1 else "one of each rank spared for the server")
    else:
        reasons.append("all compute, the server shares them")
    return tuple(tuple(cores) for cores in ranks), "; ".join(reasons)


def _choose_kv_cache(
    machine: MachineFacts,
    options: WorkerOptions,
    model: ModelFacts,
    rank_cores: Sequence[Sequence[int]],
    demands: Demands,
) -> tuple[int, str, int | None]:
    """Bytes of a rank, the reason, and the context in tokens that they hold, None if that is not known."""
    num_ranks = len(rank_cores)
    loaded = weight_bytes(model, options, num_ranks)
    wanted = wanted_context(model, demands)
    # vLLM keeps keys and values in the dtype that it computes in.
    is_float32 = options.low_bit == "fp32" or demands.dtype == "float32"
    kv_cache = model.kv_cache and model.kv_cache.times(2 if is_float32 else 1)
    if options.kv_cache_gib is not None:
        if not 0 < options.kv_cache_gib < math.inf:
            raise OptionError("--kv-cache-gib must be above 0")
        size = int(options.kv_cache_gib * GIB)
        if kv_cache is None:
            return size, "chosen with --kv-cache-gib", None
        context = fitted_context(kv_cache, wanted, size * num_ranks, demands)
        if context is None:
            raise OptionError(
                f"--kv-cache-gib {options.kv_cache_gib:g} is too little: one sequence of {wanted} tokens needs "
                f"{kv_cache.sequence_bytes(wanted) / num_ranks / GIB:.2f} GiB. Give more, or shorten --max-model-len."
            )
        return size, "chosen with --kv-cache-gib", context
    if loaded is None or kv_cache is None:
        size = min(KV_CACHE_DEFAULT_BYTES, int(machine.memory_available * KV_CACHE_SHARE / 2)) // num_ranks
        return size, "the model's size is not known yet; --kv-cache-gib changes it", None
    free = machine.memory_available - loaded - PROCESS_MEMORY_BYTES
    one_sequence = kv_cache.sequence_bytes(wanted)
    size = min(int(free * KV_CACHE_SHARE), one_sequence * KV_CACHE_MAX_SEQUENCES)
    # A rank takes its memory from the node of its cores.
    first_cores = {cores[0] for cores in rank_cores}
    nodes = {cpu.node for cpu in machine.cpus if cpu.id in first_cores}
    on_nodes = len(nodes) * min(machine.node_available.get(node, machine.memory_available) for node in nodes)
    # One sequence may take all that is free, whatever the nodes count: less would be of no use.
    size = max(min(size, on_nodes - loaded), min(free, one_sequence + kv_cache.block_bytes))
    context = fitted_context(kv_cache, wanted, size, demands)
    if context is None:
        raise EngineError(
            f"too little memory: {machine.memory_available / GIB:.1f} GiB free, "
            f"{loaded / GIB:.1f} GiB weights, {PROCESS_MEMORY_BYTES / GIB:.1f} GiB for the processes, "
            f"and one sequence of {wanted} tokens needs {one_sequence / GIB:.2f} GiB of KV cache. "
            "Free memory, shorten --max-model-len, or set --kv-cache-gib."
        )
    tokens = size * context // kv_cache.sequence_bytes(context)
    reason = (
        f"{tokens} tokens, {tokens / context:.0f} sequences of {context}; "
        f"{free / GIB:.1f} GiB are free after {loaded / GIB:.1f} GiB of weights"
    )
    return size // num_ranks, reason, context


def _choose_compile(options: WorkerOptions, model: ModelFacts, demands: Demands) -> tuple[bool, str]:
    if demands.has_adapters:
        return False, "vLLM compiles nothing beside LoRA adapters"
    if options.compile is not None:
        return options.compile, "chosen with --compile" if options.compile else "chosen with --no-compile"
    if demands.num_stages > 1:
        return True, "vLLM's pipeline does not run eagerly on a CPU"
    if model.weight_bytes is not None and model.weight_bytes < MIN_WEIGHT_BYTES_TO_COMPILE:
        return False, f"{model.weight_bytes / (1 << 20):.0f} MiB of weights do not earn back the time it takes"
    if demands.num_ranks * demands.num_hosts > 1:
        return True, "faster steps for up to a minute more at the first start; --no-compile starts at once"
    return True, "faster steps, up to a minute after a first start; --compile waits for that, --no-compile stays eager"


def _split(cores: Sequence[int], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    share = len(cores) // num_ranks
    if share == 0:
        return tuple((cores[rank % len(cores)],) for rank in range(num_ranks))
    return tuple(tuple(cores[rank * share : (rank + 1) * share]) for rank in range(num_ranks))


def _parse_cpu_list(text: str) -> tuple[int, ...]:
    try:
        cpus: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            cpus.extend(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        cpus = []
    if not cpus:
        raise OptionError(f'--cores {text}: expected a list such as "0-7" or "0,2,4", with "|" between ranks')
    return tuple(cpus)


def _ranges(cpus: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cpus)))
