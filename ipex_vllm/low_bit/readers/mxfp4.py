"""OCP's MXFP4: 4-bit floats (E2M1), 32 of which share a power of two (E8M0) as their scale.

https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

import torch

from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.quantize import QuantizedWeight

BLOCK = 32
FP4 = FORMATS["fp4"]
# The powers of two that float16 holds, and half of which it holds as well: the kernel counts in halves.
LEAST, LARGEST = 2.0**-23, 2.0**15


def quantized(codes: torch.Tensor, exponents: torch.Tensor) -> QuantizedWeight:
    """The weight, as `fp4` in groups of 32.

    Args:
        codes: uint8 [out, in], values 0 to 15: a sign, and the number of a magnitude.
        exponents: uint8 [out, in / 32], 127 more than what they stand for.

    Exact, but that a block with a scale below 2^-23, whose weights are all below 4e-7, counts as zeros. Raises
    ValueError for scales above 2^15 and for those that are not a number.
    """
    magnitudes = codes & 7
    # Our table ascends from -6 over 0, its eighth, to 6; both zeros are one.
    numbers = torch.where(codes > 7, 7 - magnitudes, 7 + magnitudes)
    scales = (exponents.int() << 23).view(torch.float32)
    if scales.amax() > LARGEST:
        raise ValueError("MXFP4: a block's scale is no number, or above 2^15")
    return QuantizedWeight(FP4, numbers, torch.where(scales < LEAST, 0, scales).half())


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The codes in bytes [..., n], the first of each in its low half: uint8 [..., 2 n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
