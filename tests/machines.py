"""Machines as folders of /proc and /sys, and models as folders of configuration and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ipex_vllm.machine.facts import GIB, MachineFacts

# (package, core, NUMA node) of each logical CPU.
Topology = list[tuple[int, int, int]]


@dataclass
class FakeRoot:
    """Writes the files of a machine below `path`, in the kernel's own formats. Memory in GiB."""

    path: Path
    topology: Topology
    name: str = "Intel(R) Xeon(R) Processor"
    flags: str = "fpu sse4_2 avx2"
    total: float = 64
    available: float = 60
    node_free: dict[int, float] = field(default_factory=dict)
    shows_topology: bool = True

    def __post_init__(self) -> None:
        for cpu_id, (package, core, node) in enumerate(self.topology):
            if self.shows_topology:
                folder = f"sys/devices/system/cpu/cpu{cpu_id}"
                self.write(f"{folder}/topology/physical_package_id", f"{package}\n")
                self.write(f"{folder}/topology/core_id", f"{core}\n")
                (self.path / f"sys/devices/system/node/node{node}/cpu{cpu_id}").mkdir(parents=True)
        for node, free in self.node_free.items():
            self.write(f"sys/devices/system/node/node{node}/meminfo", node_meminfo(node, free))
        cpuinfo = (f"processor\t: {i}\nmodel name\t: {self.name}\nflags\t\t: {self.flags}\n" for i in self.cpu_ids)
        self.write("proc/cpuinfo", "\n".join(cpuinfo))
        self.set_available(self.available)
        self.write("proc/self/cgroup", "0::/\n")

    @property
    def cpu_ids(self) -> range:
        return range(len(self.topology))

    def write(self, name: str, text: str) -> None:
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)

    def set_available(self, gib: float) -> None:
        kib = {"MemTotal": self.total, "MemFree": gib / 2, "MemAvailable": gib}
        self.write("proc/meminfo", "".join(f"{name}:   {int(size * GIB / 1024)} kB\n" for name, size in kib.items()))

    def probe(self, allowed: set[int] | None = None) -> MachineFacts:
        return MachineFacts.probe(self.path, self.cpu_ids if allowed is None else allowed, prefix=self.path / "venv")

    def install(self, *names: str) -> None:
        folders = {"libiomp5.so": "venv/lib", "libtcmalloc_minimal.so.4": "usr/lib/x86_64-linux-gnu"}
        for name in names:
            self.write(f"{folders[name]}/{name}", "")

    def load(self, *paths: str) -> None:
        """Map libraries into the process."""
        lines = (f"7f0000000000-7f0000001000 r-xp 00000000 fe:00 1234      {path}\n" for path in paths)
        self.write("proc/self/maps", "".join(lines))


def node_meminfo(node: int, free: float) -> str:
    """As the kernel writes it; half of what is free is page cache."""
    kib = int(free * GIB / 1024)
    fields = {"MemTotal": 2 * kib, "MemFree": kib // 2, "Active(anon)": kib, "Inactive(anon)": kib}
    fields |= {"Active(file)": kib // 4, "Inactive(file)": kib // 8, "SReclaimable": kib // 8}
    return "".join(f"Node {node} {name}: {size:8} kB\n" for name, size in fields.items())


def cores(count: int) -> Topology:
    return [(0, core, 0) for core in range(count)]


LLAMA_1B = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 22,
    "vocab_size": 32_000,
    "max_position_embeddings": 2048,
}


def write_model(folder: Path, config: object, sizes: dict[str, int] | None = None) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    for name, size in (sizes or {}).items():
        (folder / name).write_bytes(b"\0" * size)
    return str(folder)
