"""The KV cache is zeros that nobody has written yet, and is taken soon after."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
import torch
from vllm.v1.worker import utils

from ipex_vllm.low_bit.vllm import kv_memory

SIZE = 256 << 20  # bytes
CPU = torch.device("cpu")


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def config(size: int) -> SimpleNamespace:
    """Of vLLM's description of a cache what says how large it is: one layer that sees all of it."""
    tensor = SimpleNamespace(size=size, layers=["layer"])
    spec = SimpleNamespace(has_layer_views=False)
    return SimpleNamespace(
        kv_cache_tensors=[tensor], kv_cache_groups=[SimpleNamespace(layer_names=["layer"], kv_cache_spec=spec)]
    )


def test_a_cache_is_zeros_and_is_taken_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    before = resident()
    cache = kv_memory.allocate_mapped(config(SIZE), CPU, None)["layer"]
    assert resident() - before < SIZE // 8, "nothing of it is taken yet"
    assert (cache.dtype, len(cache)) == (torch.int8, SIZE)
    cache[5] = 7
    (thread,) = started
    monkeypatch.undo()
    thread.start()
    thread.join()
    assert resident() - before > SIZE * 7 // 8
    assert cache[5] == 7, "what was written stays"
    assert int(cache.count_nonzero()) == 1


def test_the_thread_alone_has_the_least_priority() -> None:
    seen = []

    def run() -> None:
        kv_memory.take(kv_memory.mapped_zeros(1 << 20))
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [kv_memory.LEAST_PRIORITY]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < kv_memory.LEAST_PRIORITY


def test_other_tensors_are_made_as_before() -> None:
    with kv_memory.Mapped() as mapped:
        assert torch.zeros((2, 3), dtype=torch.int8).shape == (2, 3)
        assert torch.zeros(4).dtype == torch.float32
    assert mapped.buffers == []


def test_upstream_alone_takes_the_memory_at_once() -> None:
    """Where this fails, `kv_memory` is no longer needed."""
    before = resident()
    cache = utils.allocate_kv_cache(config(SIZE), CPU, None)["layer"]
    assert resident() - before > SIZE * 7 // 8
    del cache


def test_vllms_runner_takes_its_cache_from_here() -> None:
    code = """import inspect
from vllm.v1.worker import gpu_model_runner as runner
from ipex_vllm.low_bit.vllm import kv_memory, upstream
upstream.mend()
assert "= allocate_kv_cache(" in inspect.getsource(runner.GPUModelRunner.initialize_kv_cache_tensors)
print(runner.allocate_kv_cache is kv_memory.allocate_mapped)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-2000:]
