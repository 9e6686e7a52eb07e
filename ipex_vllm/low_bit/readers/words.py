"""Quantized weights as AWQ, GPTQ, AutoRound and compressed-tensors store them: integer codes in words of 32 bits.

All four keep a scale per group of inputs (or per output) and, where the codes are not symmetric, a zero point; they
differ in which way the words run and in the order of the codes within one. A weight is (code - zero point) * scale.
AWQ: https://github.com/casper-hansen/AutoAWQ; GPTQ: https://github.com/AutoGPTQ/AutoGPTQ and, for its second version,
https://github.com/ModelCloud/GPTQModel; compressed-tensors: https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import torch

from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.quantize import QuantizedWeight, unpack_nibbles

# Where AWQ has the codes of eight outputs: the i-th of them is in the nibble AWQ_ORDER[i].
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# How many inputs may share a scale in memory; a larger group's scale is repeated.
GROUP_SIZES = {4: (128, 64, 32), 8: (64, 32)}


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of 4 or 8 bits in int32 words [rows, columns], lowest bits first: uint8 [rows, columns * 32 / bits]."""
    return unpack_nibbles(words) if bits == 4 else words.contiguous().view(torch.uint8)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """The codes in AWQ's int32 words [rows, columns / 8]: uint8 [rows, columns]."""
    return unpack_nibbles(words).view(len(words), -1, 8)[..., list(AWQ_ORDER)].flatten(1)


def fitting_group_size(bits: int, group_size: int) -> int | None:
    """What a group of so many inputs is kept as; None where it is nothing that the kernels take."""
    return next((size for size in GROUP_SIZES[bits] if group_size % size == 0), None)


def quantized(bits: int, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> QuantizedWeight:
    """The weight with the codes [out, in] of `unpack`, and scales [out, groups] of any float dtype.

    `zeros` [out, groups], for 4 bits only, are the codes that stand for 0; None means the middle one. Raises ValueError
    for groups that the kernels do not take.
    """
    group_size = codes.shape[1] // scales.shape[1]
    fitting = fitting_group_size(bits, group_size)
    if fitting is None:
        raise ValueError(f"there is no kernel for groups of {group_size} inputs")
    scales = scales.float().repeat_interleave(group_size // fitting, dim=1)
    if bits == 8:
        return QuantizedWeight(FORMATS["sym_int8"], (codes ^ 128).view(torch.int8), scales)
    if zeros is None:
        return QuantizedWeight(FORMATS["sym_int4"], codes, scales.half())
    mins = -scales * zeros.repeat_interleave(group_size // fitting, dim=1)
    return QuantizedWeight(FORMATS["asym_int4"], codes, scales.half(), mins.half())
