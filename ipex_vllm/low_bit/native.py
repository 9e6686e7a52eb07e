"""The package's C++ library (`csrc/`): finding it, loading it, and calling its matmuls.

It has a plain C interface and is built with the package. How the kernels work is in `docs/kernels.md`.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libkernels.so")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable_reason() -> str | None:
    """Say in one sentence why the library cannot be used here; None when it can."""
    if not LIBRARY.exists():
        return "the kernels were not built: install a C++ compiler (g++) and reinstall ipex-vllm from source"
    try:
        library()
    except OSError as error:
        return f"the kernels do not load, reinstall ipex-vllm from source: {error}"
    return None


@cache
def library() -> ctypes.CDLL:
    # The library names no OpenMP runtime of its own: its symbols resolve to the one torch has brought into the
    # process (or the one preloaded before it), so that there is one pool of threads.
    library = ctypes.CDLL(str(LIBRARY))
    pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.w4a8_linear.argtypes = [pointer] * 4 + [size] * 4 + [flag] * 5
    library.w8a16_linear.argtypes = [pointer] * 4 + [size] * 3 + [flag] * 5
    return library


def linear(
    function: Callable[..., int],
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    *layout: int,
    isa: int,
) -> Tensor:
    """Call one of the library's matmuls: x [..., K] and packed weights [N, K] give [..., N] of x's dtype.

    `layout` is what the function wants to know of the packed weights, which have been checked against it.

    Raises:
        ValueError: x's dtype is none of `DTYPES`, or the bias is not [N] of x's dtype or float32.
        MemoryError: there is no memory for the activations as the kernel wants them.
    """
    *batch, in_features = x.shape
    if x.dtype not in DTYPES or (bias is not None and bias.dtype not in (x.dtype, torch.float32)):
        raise ValueError(f"the kernels take float32, float16 or bfloat16, and a bias of that dtype, not {x.dtype}")
    if bias is not None and bias.numel() != out_features:
        raise ValueError(f"a layer of {out_features} outputs has a bias of {bias.numel()}")
    x = x.contiguous()
    out = torch.empty((*batch, out_features), dtype=x.dtype)
    status = function(
        x.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        math.prod(batch),
        out_features,
        in_features,
        *layout,
        DTYPES[x.dtype],
        0 if bias is None else DTYPES[bias.dtype],
        isa,
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError(f"no memory for {math.prod(batch)} rows of {in_features} activations")
    return out
