"""The package's C++ library (`csrc/`): finding it and loading it, which gives torch the operators over its matmuls.

It is built with the package. How the kernels work is in `docs/kernels.md`.
"""

import ctypes
from functools import cache

import torch

from ipex_vllm.low_bit import LIBRARY

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable_reason() -> str | None:
    """Say in one sentence why the library cannot be used here; None when it can."""
    if not LIBRARY.exists():
        return "the kernels were not built: install a C++ compiler (g++) and reinstall ipex-vllm from source"
    try:
        library()
    except (OSError, AttributeError) as error:  # the second: a library of another version
        return f"the kernels do not load, reinstall ipex-vllm from source: {error}"
    except RuntimeError as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """Load the library; `ipex_vllm::w4a8_linear` and its siblings can be called from then on.

    Raises:
        OSError: the library does not load.
        RuntimeError: this torch is too old for its operators.
    """
    # The library names no OpenMP runtime of its own: its symbols resolve to the one torch has brought into the
    # process (or the one preloaded before it), so that there is one pool of threads.
    library = ctypes.CDLL(str(LIBRARY))
    if library.register_torch_operators():
        raise RuntimeError(f"the kernels need PyTorch 2.8 or later, not {torch.__version__}")
    return library


def linear_shape(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out_features: int, *others: object
) -> torch.Tensor:
    """What the matmuls' operators return, for tracing: [..., out_features] of x's dtype."""
    return x.new_empty((*x.shape[:-1], out_features))


unavailable_reason()  # once at import: who calls an operator has imported this, whether or not they asked
