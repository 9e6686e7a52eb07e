"""16-bit float weights times float activations on x86 CPUs: packing, and the torch operator over the kernel.

oneDNN computes in 16 bits what the CPU has instructions for, and slowly what it has none for; with float32 weights it
reads twice the bytes. This reads 16 bits and multiplies in float32.
"""

import torch
from torch import Tensor

from ipex_vllm.low_bit import native

TILE_OUTPUTS = 32

ISAS = {1: "avx2", 2: "avx512"}
WEIGHT_DTYPES = (torch.bfloat16, torch.float16)


def unavailable_reason() -> str | None:
    """Say in one sentence why the kernel cannot run here; None when it can."""
    if reason := native.unavailable_reason():
        return reason
    return None if native.library().w16a16_isa() in ISAS else "the 16-bit kernel needs a CPU with AVX2, FMA and F16C"


def isa() -> str:
    """The instruction set the kernel uses on this CPU: one of `ISAS`.

    Raises:
        RuntimeError: the kernel cannot run here.
    """
    if reason := unavailable_reason():
        raise RuntimeError(reason)
    return ISAS[native.library().w16a16_isa()]


def pack(weight: Tensor) -> Tensor:
    """Put a weight into the kernel's layout.

    Args:
        weight: bfloat16 or float16 [N, K].

    Returns:
        The same dtype, [N, K], N filled up with zeros to a multiple of 32 and K to an even number, for `linear`.
    """
    outputs, inputs = weight.shape
    tiles = -(-outputs // TILE_OUTPUTS)
    padded = torch.nn.functional.pad(weight, (0, inputs % 2, 0, tiles * TILE_OUTPUTS - outputs))
    pairs = padded.view(torch.int16).view(tiles, TILE_OUTPUTS, -1, 2)
    # [tile, output, line, input]: a line has an output's two inputs side by side, or all outputs of each.
    order = (0, 2, 1, 3) if weight.dtype == torch.bfloat16 else (0, 2, 3, 1)
    return pairs.permute(order).contiguous().view(weight.dtype).view(padded.shape)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, isa: int = 0) -> Tensor:
    """`x @ weight.T + bias` with the weight of `pack`, through the torch operator `ipex_vllm::w16a16_linear`.

    Products are summed in float32, in the order of the inputs: a row's result does not depend on the other rows, the
    number of threads or the instruction set.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        packed: from `pack`.
        bias: float32 or x's dtype [N], or None.
        isa: one of `ISAS`, which this CPU must have; 0 is the best one.

    Returns:
        [..., N] of x's dtype.

    Raises:
        RuntimeError: a shape or dtype does not fit, or the kernel cannot run here.
    """
    return torch.ops.ipex_vllm.w16a16_linear.default(x, packed, bias, out_features, isa)  # type: ignore[no-any-return]


# The library implements it (csrc/torch_ops.cpp).
torch.library.define(
    "ipex_vllm::w16a16_linear", "(Tensor x, Tensor packed, Tensor? bias, int out_features, int isa=0) -> Tensor"
)
torch.library.register_fake("ipex_vllm::w16a16_linear", native.linear_shape)
