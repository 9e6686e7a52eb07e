"""Memory that is no longer used, given back to the system. Linux with glibc, as vLLM's CPU builds need it."""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def forget_pages(tensor: torch.Tensor) -> None:
    """Give back the memory of a contiguous tensor that is mapped from a file; its next use reads the file again.

    Pages of a mapped file, once read, count as the process's memory until the file is closed, which for a checkpoint
    of one file is when all of it is loaded. A tensor that is not mapped from a file is left alone.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first <= start and end <= last and inode != "0":
            first_page, end_page = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if first_page < end_page:
                _libc().madvise(first_page, end_page - first_page, mmap.MADV_DONTNEED)


def give_memory_back() -> None:
    """Ask the allocator, the C library's or tcmalloc, to return what it keeps to the system.

    That is 0.3 GiB of the C library's heap after quantizing 1.1 B parameters, and as much as the largest layer of
    experts had in 16 bits with tcmalloc.
    """
    _libc().malloc_trim(0)
    release = getattr(_libc(), "MallocExtension_ReleaseFreeMemory", None)
    if release is not None:
        release()


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library
