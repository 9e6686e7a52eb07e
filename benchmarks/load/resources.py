"""What a run used: memory and CPU of the server's process tree, and the load generator's own CPU."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

PERIOD_S = 0.5
# Above this share of one core the (single-threaded) load generator may be what limits the figures.
BUSY_CLIENT = 0.7


class ResourceSampler:
    """Samples process trees while the `async with` block runs; `report()` then gives its figures.

    RSS counts pages shared between the tree's processes once for each, PSS once in all. PSS makes the kernel walk
    page tables, so it is read once, when the block ends.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self._client = psutil.Process()

    async def __aenter__(self) -> ResourceSampler:
        self._rss_peak = 0
        self._pss: int | None = None
        self._started = time.perf_counter()
        self._cpu_before = _cpu_by_process(self._tree())
        self._switches_before = _context_switches(self._tree())
        self._client_before = sum(self._client.cpu_times()[:2])
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        self._wall = time.perf_counter() - self._started
        self._client_cpu = sum(self._client.cpu_times()[:2]) - self._client_before
        tree = self._tree()
        self._fronts = list(_cpu_by_process(self._roots))
        self._cpu_after = _cpu_by_process(tree)
        self._switches_after = _context_switches(tree)
        self._pss = _sum_memory(tree, "pss")

    async def _sample(self) -> None:
        while True:
            self._rss_peak = max(self._rss_peak, _sum_memory(self._tree(), "rss"))
            await asyncio.sleep(PERIOD_S)

    def _tree(self) -> list[psutil.Process]:
        tree = []
        for root in self._roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                tree += [root, *root.children(recursive=True)]
        return tree

    def report(self) -> dict[str, Any]:
        """Bytes, cores (CPU seconds per second), context switches per second; `server` is None without its pids."""
        client = self._client_cpu / self._wall
        server: dict[str, Any] | None = None
        if self._roots:
            cpu = {
                name: (after - self._cpu_before.get(name, 0.0)) / self._wall for name, after in self._cpu_after.items()
            }
            server = {
                "rss_peak_bytes": self._rss_peak,
                "pss_bytes": self._pss,
                "cpu_cores": sum(cpu.values()),
                "cpu_cores_by_process": cpu,
                # Without their children, among which are the engines of servers that give them a process.
                "front_cpu_s": self._wall * sum(cpu.get(name, 0.0) for name in self._fronts),
                "context_switches_per_s": {
                    kind: (self._switches_after[kind] - self._switches_before[kind]) / self._wall
                    for kind in self._switches_after
                },
            }
        return {"server": server, "client_cpu_cores": client, "client_is_busy": client > BUSY_CLIENT}


def _cpu_by_process(tree: list[psutil.Process]) -> dict[str, float]:
    """User and system seconds so far, by `pid name`."""
    seconds = {}
    for process in tree:
        try:
            seconds[f"{process.pid} {process.name()}"] = sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return seconds


def _context_switches(tree: list[psutil.Process]) -> dict[str, int]:
    """Switches of all threads so far (psutil and `/proc/PID/status` count the main thread's alone)."""
    switches = {"voluntary": 0, "nonvoluntary": 0}
    for process in tree:
        for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
            try:
                lines = status.read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            for line in lines[-2:]:
                kind, _, count = line.partition("_ctxt_switches:")
                switches[kind] += int(count)
    return switches


def _sum_memory(tree: list[psutil.Process], kind: str) -> int:
    total = 0
    for process in tree:
        try:
            total += getattr(process.memory_full_info() if kind == "pss" else process.memory_info(), kind)
        except psutil.NoSuchProcess:
            continue
    return total


def listening_pid(port: int) -> int | None:
    """The process that listens on a local TCP port, or None (another user's, or a remote server)."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            return connection.pid
    return None
