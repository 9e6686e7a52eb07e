"""Machines that the tests plan for, and the cores that they run on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.machines import FakeRoot, cores


def pytest_configure() -> None:
    """Make each process of `pytest -n` one like any other, with cores of its own before PyTorch counts them: two pools
    of threads on one core wait for each other."""
    if (name := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
        number, processes = int(name.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        usable = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, usable[number::processes] or usable)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it ignores Ctrl-C, and so would what it starts


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test starts inherits the environment of this process; what a test changes in it ends with the test."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads, for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def small_box(tmp_path: Path) -> FakeRoot:
    """2 cores of a virtual Ice Lake Xeon, 24 GiB."""
    flags = "avx2 avx512f avx512_vnni"
    return FakeRoot(tmp_path / "small", cores(2), flags=flags, total=24, available=20, node_free={0: 18})


@pytest.fixture
def dual_xeon(tmp_path: Path) -> FakeRoot:
    """2 sockets of 32 cores with SMT; the kernel counts the first thread of each core of both sockets first."""
    threads = [(socket, core, socket) for socket in (0, 1) for core in range(32)] * 2
    flags = "avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
    free = {0: 250.0, 1: 240.0}
    return FakeRoot(tmp_path / "xeon", threads, "Intel(R) Xeon(R) Platinum 8462Y+", flags, 512, 490, free)


@pytest.fixture
def hybrid_desktop(tmp_path: Path) -> FakeRoot:
    """8 performance cores of 2 threads and 8 efficiency cores of one."""
    threads = [(0, 4 * (i // 2), 0) for i in range(16)] + [(0, 32 + i, 0) for i in range(8)]
    return FakeRoot(
        tmp_path / "desktop", threads, "13th Gen Intel(R) Core(TM) i7-13700K", "avx2 avx_vnni", 64, 50, {0: 45}
    )
