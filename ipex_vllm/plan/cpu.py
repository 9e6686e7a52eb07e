"""What this machine is, and the settings that follow from it. Each decision is a line with its reason.

Reads /proc and /sys only, so it imports in any environment and before anything heavy. `root` stands for "/" and is
another folder in the tests.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ipex_vllm.errors import EngineError
from ipex_vllm.low_bit.formats import resolve
from ipex_vllm.options import WorkerOptions

GIB = 1 << 30

# CPU flags of /proc/cpuinfo that choose a kernel, weakest first.
ISA_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

# From this many cores a node spares one for the HTTP server and the scheduler. On fewer, the lost core costs more
# than sharing does: on 2 cores, half of the arithmetic.
MIN_CORES_TO_RESERVE_ONE = 8

# Interpreter, libraries and activations of the server and engine processes, beyond weights and KV cache.
PROCESS_MEMORY_BYTES = int(2.0 * GIB)
KV_CACHE_SHARE = 0.4  # of what is free after the weights; the rest is left to other programs and the page cache
KV_CACHE_MAX_SEQUENCES = 256  # vLLM's own limit on sequences in a batch; more cache than they fill is of no use
KV_CACHE_DEFAULT_BYTES = 4 * GIB  # for a model whose size is not known before it is fetched

# Without these, oneDNN takes bf16 apart in software. Weights 5632x2048 on 2 such cores (Ice Lake, 2.8 GHz), bf16
# against float32: 0.9 and 2.1 ms for one row, but 8.8 and 3.5 ms for 16, and 92 and 24 ms for 256.
BF16_ISA = ("avx512_bf16", "amx_bf16")
FLOAT32_MEMORY_SHARE = 0.7  # of the free memory, the most that weights of twice the size may take

# torch.compile takes about a minute at the first start, which a model this small does not earn back.
MIN_WEIGHT_BYTES_TO_COMPILE = 512 << 20


@dataclass(frozen=True)
class LogicalCpu:
    id: int
    core: tuple[int, int]  # (package, core): the same for SMT siblings
    node: int


@dataclass(frozen=True)
class Machine:
    """Facts about this machine, as this process may use them. Memory in bytes.

    `quota_cores` is the time that the cgroup grants, in CPUs. `node_available` is what each NUMA node has left. On a
    virtual machine whose memory grows as it is used, it can be far below `memory_available`, and vLLM refuses a KV
    cache that is larger. `iomp` and `tcmalloc` are paths of libraries.
    """

    name: str
    cpus: tuple[LogicalCpu, ...]
    quota_cores: float | None
    isa: tuple[str, ...]
    memory_total: int
    memory_available: int
    node_available: Mapping[int, int]
    iomp: str | None
    tcmalloc: str | None

    @classmethod
    def probe(cls, root: Path = Path("/"), allowed: Iterable[int] | None = None, prefix: Path | None = None) -> Machine:
        """Read the machine's facts; `allowed` are the logical CPUs of this process, `prefix` its environment's root."""
        cpuinfo = (root / "proc/cpuinfo").read_text()
        flags = set(_field(cpuinfo, "flags").split())
        meminfo = (root / "proc/meminfo").read_text()
        total, available = (_kib(meminfo, name) for name in ("MemTotal", "MemAvailable"))
        for limit, left in _cgroup_memory(root):
            total, available = min(total, limit), min(available, left)
        return cls(
            name=_field(cpuinfo, "model name") or platform.machine(),
            cpus=tuple(_logical_cpus(root, os.sched_getaffinity(0) if allowed is None else allowed)),
            quota_cores=_cgroup_cpu_quota(root),
            isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
            memory_total=total,
            memory_available=max(available, 0),
            node_available=_node_available(root),
            iomp=_first(Path(sys.prefix if prefix is None else prefix) / "lib", "libiomp5.so"),
            tcmalloc=_first(root / "usr/lib", "*/libtcmalloc_minimal.so.4", "libtcmalloc_minimal.so.4")
            or _first(root / "usr/lib64", "libtcmalloc_minimal.so.4"),
        )


@dataclass(frozen=True)
class ModelFacts:
    """What a model directory tells before it is loaded; None where it does not (a name to be fetched, say).

    Attributes:
        weight_bytes: the checkpoint's size.
        embedding_bytes: the share of it that stays as it is when the rest is quantized.
        is_quantized: the checkpoint holds quantized weights, which are loaded as they are.
        kv_bytes_per_token: keys and values of all layers, in 16 bits.
        max_position: the longest context that the model was made for, in tokens.
    """

    weight_bytes: int | None = None
    embedding_bytes: int = 0
    is_quantized: bool = False
    kv_bytes_per_token: int | None = None
    max_position: int | None = None

    @classmethod
    def read(cls, model_path: str) -> ModelFacts:
        folder = Path(model_path)
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            return cls()
        # Some repositories hold the weights twice, under the second name as well.
        patterns = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
        files = next((files for pattern in patterns if (files := list(folder.glob(pattern)))), [])
        hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or (hidden // heads if hidden and heads else None)
        layers = config.get("num_hidden_layers")
        is_plain = all(isinstance(value, int) for value in (layers, kv_heads, head_dim))
        return cls(
            weight_bytes=sum(file.stat().st_size for file in files) or None,
            embedding_bytes=2 * config.get("vocab_size", 0) * (hidden or 0),
            is_quantized="quantization_config" in config,
            kv_bytes_per_token=2 * layers * kv_heads * head_dim * 2 if is_plain else None,
            max_position=config.get("max_position_embeddings"),
        )

    def share_of(self, num_hosts: int) -> ModelFacts:
        """What one of the hosts holds, when they divide the model among them."""
        return replace(
            self,
            weight_bytes=self.weight_bytes and self.weight_bytes // num_hosts,
            embedding_bytes=self.embedding_bytes // num_hosts,
            kv_bytes_per_token=self.kv_bytes_per_token and self.kv_bytes_per_token // num_hosts,
        )

    def loaded_bytes(self, low_bit: str | None) -> int | None:
        """Memory that the weights take. Raises EngineError for an unknown format."""
        try:
            format = None if low_bit is None else resolve(low_bit)
        except ValueError as error:
            raise EngineError(f"--low-bit: {error}") from error
        if self.weight_bytes is None or format is None or self.is_quantized:
            return self.weight_bytes
        if format.kind == "dtype":
            return self.weight_bytes * format.bits // 16
        # Codes of 5 and 6 bits take a byte; scales and minima at most a sixteenth of one for each weight.
        bits = 4.5 if format.bits == 4 else 8.5
        quantized = max(self.weight_bytes - self.embedding_bytes, 0)
        return self.weight_bytes - quantized + int(quantized * bits / 16)


@dataclass
class Plan:
    """The settings chosen for this machine, each with its reason in `lines`.

    Attributes:
        rank_cores: for each rank of tensor and pipeline parallelism, the logical CPUs that compute.
        kv_cache_bytes: KV cache of one rank.
        use_compile: torch.compile the model, or run it eagerly.
    """

    rank_cores: tuple[tuple[int, ...], ...]
    kv_cache_bytes: int
    use_compile: bool
    lines: list[str] = field(default_factory=list)


def preload_and_reexecute(machine: Machine) -> None:
    """Restart this process, once, with Intel's OpenMP and tcmalloc preloaded, where they are there and not yet loaded.

    The dynamic linker reads LD_PRELOAD when a process starts, so this comes before anything heavy is imported.
    """
    loaded = os.environ.get("LD_PRELOAD", "")
    # A second OpenMP runtime or allocator beside the user's own choice would be worse than none.
    has_openmp = any(name in loaded for name in ("libiomp", "libgomp", "libomp"))
    has_malloc = "malloc" in loaded
    candidates = ((machine.tcmalloc, has_malloc), (machine.iomp, has_openmp))
    missing = [path for path, is_there in candidates if path and not is_there]
    if missing:
        os.environ["LD_PRELOAD"] = ":".join([*missing, *filter(None, [loaded])])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def choose_weights(machine: Machine, options: WorkerOptions, model: ModelFacts) -> tuple[WorkerOptions, str]:
    """Return `options` with a weight format, where the user chose none and the machine makes one better; and why."""
    if options.low_bit is not None:
        return options, f"weights: {options.low_bit} (chosen with --low-bit)"
    if model.is_quantized:
        return options, "weights: as they are in the checkpoint, which is quantized"
    if any(flag in machine.isa for flag in BF16_ISA):
        return options, "weights: the checkpoint's own dtype (this CPU computes in bf16)"
    wanted = 2 * (model.weight_bytes or machine.memory_available) + PROCESS_MEMORY_BYTES
    if wanted > machine.memory_available * FLOAT32_MEMORY_SHARE:
        return options, "weights: the checkpoint's own dtype (float32 would be faster on this CPU, but takes too much)"
    return replace(options, low_bit="fp32"), (
        "weights: float32 (this CPU has no bf16 instructions: twice the memory, but faster from a few streams on; "
        "--low-bit bf16 keeps 16 bits, sym_int8 and sym_int4 take less)"
    )


def make_plan(
    machine: Machine,
    options: WorkerOptions,
    model: ModelFacts,
    num_ranks: int = 1,
    max_model_len: int | None = None,
    num_stages: int = 1,
) -> Plan:
    """Choose the settings. Raises EngineError, with the figures, when the model does not fit in the free memory.

    `num_ranks` are this machine's processes of tensor and pipeline parallelism, `num_stages` is the pipeline's length.
    """
    rank_cores, cores_reason = _choose_cores(machine, options.cores, num_ranks)
    kv_cache_bytes, kv_reason = _choose_kv_cache(machine, options, model, rank_cores, max_model_len)
    use_compile, compile_reason = _choose_compile(options, model, num_stages)
    shown_cores = " | ".join(",".join(map(str, cores)) for cores in rank_cores)
    return Plan(
        rank_cores,
        kv_cache_bytes,
        use_compile,
        lines=[
            f"machine: {machine.name}; {', '.join(machine.isa) or 'no vector extension'}; "
            f"{machine.memory_available / GIB:.1f} of {machine.memory_total / GIB:.1f} GiB free",
            f"cores: {shown_cores} ({cores_reason})",
            f"preload: {_describe_preload(machine, options)}",
            f"KV cache: {kv_cache_bytes / GIB:.2f} GiB" + (" a rank" if num_ranks > 1 else "") + f" ({kv_reason})",
            f"mode: {'torch.compile' if use_compile else 'eager'} ({compile_reason})",
        ],
    )


def _describe_preload(machine: Machine, options: WorkerOptions) -> str:
    loaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
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
    elif absent:
        reason = f"not installed: {', '.join(absent)}"
    else:
        reason = "threads wait and allocate faster than with the system's own libraries"
    return f"{', '.join(Path(path).name for path in loaded) or 'nothing'} ({reason})"


def _choose_cores(machine: Machine, chosen: str | None, num_ranks: int) -> tuple[tuple[tuple[int, ...], ...], str]:
    if chosen is not None:
        groups = [_parse_cpu_list(part) for part in chosen.split("|")]
        available = {cpu.id for cpu in machine.cpus}
        if unknown := sorted({cpu for group in groups for cpu in group} - available):
            raise EngineError(
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
    machine: Machine,
    options: WorkerOptions,
    model: ModelFacts,
    rank_cores: Sequence[Sequence[int]],
    max_model_len: int | None,
) -> tuple[int, str]:
    num_ranks = len(rank_cores)
    weight_bytes = model.loaded_bytes(options.low_bit)
    if options.kv_cache_gib is not None:
        if not 0 < options.kv_cache_gib < math.inf:
            raise EngineError("--kv-cache-gib must be above 0")
        return int(options.kv_cache_gib * GIB), "chosen with --kv-cache-gib"
    if weight_bytes is None or model.kv_bytes_per_token is None:
        size = min(KV_CACHE_DEFAULT_BYTES, int(machine.memory_available * KV_CACHE_SHARE / 2)) // num_ranks
        return size, "the model's size is not known yet; --kv-cache-gib changes it"
    free = machine.memory_available - weight_bytes - PROCESS_MEMORY_BYTES
    context = max_model_len or model.max_position or 2048
    # vLLM keeps keys and values in the dtype that it computes in.
    token_bytes = model.kv_bytes_per_token * (2 if options.low_bit == "fp32" else 1)
    one_sequence = context * token_bytes
    size = min(int(free * KV_CACHE_SHARE), one_sequence * KV_CACHE_MAX_SEQUENCES)
    # A rank takes its memory from the node of its cores.
    first_cores = {cores[0] for cores in rank_cores}
    nodes = {cpu.node for cpu in machine.cpus if cpu.id in first_cores}
    on_nodes = len(nodes) * min(machine.node_available.get(node, machine.memory_available) for node in nodes)
    # One sequence may take all that is free, whatever the nodes count: less would be of no use.
    size = max(min(size, on_nodes - weight_bytes), min(free, one_sequence))
    if size < one_sequence:
        raise EngineError(
            f"too little memory: {machine.memory_available / GIB:.1f} GiB free, "
            f"{weight_bytes / GIB:.1f} GiB weights, {PROCESS_MEMORY_BYTES / GIB:.1f} GiB for the processes, "
            f"and one sequence of {context} tokens needs {one_sequence / GIB:.2f} GiB of KV cache. "
            "Free memory, shorten --max-model-len, or set --kv-cache-gib."
        )
    tokens = size // token_bytes
    return size // num_ranks, (
        f"{tokens} tokens, {tokens / context:.0f} sequences of {context}; "
        f"{free / GIB:.1f} GiB are free after {weight_bytes / GIB:.1f} GiB of weights"
    )


def _choose_compile(options: WorkerOptions, model: ModelFacts, num_stages: int) -> tuple[bool, str]:
    if options.compile is not None:
        return options.compile, "chosen with --compile" if options.compile else "chosen with --no-compile"
    if num_stages > 1:
        return True, "vLLM's pipeline does not run eagerly on a CPU"
    if model.weight_bytes is not None and model.weight_bytes < MIN_WEIGHT_BYTES_TO_COMPILE:
        return False, f"{model.weight_bytes / (1 << 20):.0f} MiB of weights do not earn back the minute it takes"
    return True, "faster steps for about a minute more at the first start; --no-compile starts at once"


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
        raise EngineError(f'--cores {text}: expected a list such as "0-7" or "0,2,4", with "|" between ranks')
    return tuple(cpus)


def _ranges(cpus: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


def _logical_cpus(root: Path, allowed: Iterable[int]) -> Iterable[LogicalCpu]:
    nodes = {
        int(cpu_link.name.removeprefix("cpu")): int(node.name.removeprefix("node"))
        for node in (root / "sys/devices/system/node").glob("node[0-9]*")
        for cpu_link in node.glob("cpu[0-9]*")
    }
    for cpu in sorted(allowed):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        try:
            core = (int((topology / "physical_package_id").read_text()), int((topology / "core_id").read_text()))
        except (OSError, ValueError):
            core = (-1, cpu)  # some containers hide the topology: take each CPU for a core
        yield LogicalCpu(cpu, core, nodes.get(cpu, 0))


def _node_available(root: Path) -> dict[int, int]:
    """Bytes that each NUMA node can still give, counted as vLLM counts them."""
    available = {}
    for path in (root / "sys/devices/system/node").glob("node[0-9]*/meminfo"):
        fields = {line.split()[2].rstrip(":"): int(line.split()[3]) for line in path.read_text().splitlines()}
        kib = sum(fields[name] for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable"))
        available[int(path.parent.name.removeprefix("node"))] = kib * 1024
    return available


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """For each memory limit on this process, what it is and what is left of it, in bytes.

    The kernel gives the page cache up before it enforces a limit, so that counts as left.
    """
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, used_file, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit = _read(folder / limit_file).strip()
            if limit.isdecimal():  # and not "max"
                stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(limit), int(limit) - int(_read(folder / used_file)) + cache


def _cgroup_cpu_quota(root: Path) -> float | None:
    """The smallest CPU quota on this process, in CPUs."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        quota = (_read(folder / "cpu.max") or _read(folder / "cpu.cfs_quota_us")).split()
        if quota and quota[0].isdecimal():  # and neither "max" nor -1
            period = quota[1] if len(quota) > 1 else _read(folder / "cpu.cfs_period_us")
            quotas.append(int(quota[0]) / int(period))
    return min(quotas, default=None)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process' cgroup and of those around it, version 1 and 2. A container does not show all."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            folder = top / path.lstrip("/")
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top))


def _read(path: Path) -> str:
    """The file's text, or nothing where there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _kib(meminfo: str, name: str) -> int:
    return int(_field(meminfo, name).split()[0]) * 1024


def _first(folder: Path, *patterns: str) -> str | None:
    return next((str(path) for pattern in patterns for path in sorted(folder.glob(pattern))), None)
