"""The KV cache's memory is taken after the start and not in it.

vLLM fills the cache with zeros before it serves: for a cache of 8 GiB that takes two seconds, and nine in a virtual
machine whose host has to find the memory first. What the kernel maps is zeros already. So it is mapped alone, and a
thread of the least priority takes the memory piece by piece while the engine serves: taken it must be, or another
process could have it by the time that streams need it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from vllm.v1.worker import gpu_model_runner

PIECE = 2 << 20  # bytes, a huge page
REST = 4  # times as long as a piece took: in the kernel no priority counts, and a step waits for each of its cores
MADV_POPULATE_WRITE = 23  # madvise(2), since Linux 5.14; an older kernel takes the memory as it is written
LEAST_PRIORITY = 19

allocate = gpu_model_runner.allocate_kv_cache


def mend() -> None:
    """Let vLLM's runner take its cache from here; a second call changes nothing."""
    gpu_model_runner.allocate_kv_cache = allocate_mapped


def allocate_mapped(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
    """vLLM's `allocate_kv_cache`."""
    with Mapped() as mapped:
        caches: dict[str, torch.Tensor] = allocate(*arguments, **options)
    for buffer in mapped.buffers:
        threading.Thread(target=take, args=(buffer,), name="kv-memory", daemon=True).start()
    return caches


class Mapped(TorchFunctionMode):
    """Within it, `torch.zeros` of bytes gives memory that is mapped and not yet taken."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[torch.Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.zeros or kwargs.get("dtype") is not torch.int8 or not isinstance(args[0], int):
            return function(*args, **kwargs)
        self.buffers.append(mapped_zeros(args[0]))
        return self.buffers[-1]


def mapped_zeros(size: int) -> torch.Tensor:
    """Zeros [size] in int8, in huge pages where the system has them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int8)


def take(buffer: torch.Tensor) -> None:
    """Take the memory of a mapped buffer, whatever is written there already."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start in range(0, len(buffer), PIECE):
        began = time.monotonic()
        if madvise(buffer.data_ptr() + start, min(PIECE, len(buffer) - start), MADV_POPULATE_WRITE) != 0:
            return
        time.sleep(REST * (time.monotonic() - began))
