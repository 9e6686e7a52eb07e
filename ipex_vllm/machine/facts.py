"""What this machine is, as this process may use it: cores, instructions, memory, limits.

Reads /proc and /sys only, so it imports in any environment and before anything heavy. `root` stands for "/" and is
another folder in the tests.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30

# CPU flags of /proc/cpuinfo that choose a kernel, weakest first.
ISA_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


@dataclass(frozen=True)
class LogicalCpu:
    id: int
    core: tuple[int, int]  # (package, core): the same for SMT siblings
    node: int


@dataclass(frozen=True)
class MachineFacts:
    """Facts about this machine, as this process may use them. Memory in bytes.

    `quota_cores` is the time that the cgroup grants, in CPUs. `node_available` is what each NUMA node has left. On a
    virtual machine whose memory grows as it is used, it can be far below `memory_available`, and vLLM refuses a KV
    cache that is larger. `iomp` and `tcmalloc` are paths of libraries; `loaded` are those that this process has.
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
    loaded: frozenset[str] = frozenset()

    def has_loaded(self, library: str) -> bool:
        """Whether this process has the library with that path, or with that name in some folder."""
        names = {Path(library).name, Path(os.path.realpath(library)).name}
        return any(Path(path).name in names for path in self.loaded)

    @classmethod
    def probe(
        cls, root: Path = Path("/"), allowed: Iterable[int] | None = None, prefix: Path | None = None
    ) -> MachineFacts:
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
            loaded=frozenset(_mapped_libraries(root)),
        )


def _mapped_libraries(root: Path) -> Iterator[str]:
    """The shared libraries in this process' memory. A line is: range, rights, offset, device, inode and the path."""
    for line in _read(root / "proc/self/maps").splitlines():
        path = line.split(maxsplit=5)[5:]
        if path and ".so" in path[0]:
            yield path[0]


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


def user_cache() -> Path:
    """The folder for what is kept between starts and can be made again: ~/.cache/ipex-vllm, or in $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ipex-vllm"
