"""The kernel for every format and machine: weights written out in part, and PyTorch's matmul."""

from __future__ import annotations

import torch
from torch import nn

from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.quantize import QuantizedWeight, dequantize

# The part of a weight written out at a time: few enough to stay in the cache until multiplied, enough for two cores.
TILE_WEIGHTS = 2**19


class DequantizingLinear(LowBitLinear):
    """No low-bit arithmetic: each call writes the weight out in x's dtype, a few rows at a time, and multiplies."""

    kernel = "dequantize"
    formats = tuple(format.name for format in FORMATS.values() if format.kind != "dtype")

    @classmethod
    def missing(cls) -> str | None:
        return None

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.register_buffer("codes", weight.codes, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)
        self.register_buffer("mins", weight.mins, persistent=False)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = _dequantize_linear(x, self.codes, self.scales, self.mins, bias, self.format.name)
        return y


@torch.library.custom_op("ipex_vllm::dequantize_linear", mutates_args=())
def _dequantize_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    bias: torch.Tensor | None,
    format_name: str,
) -> torch.Tensor:
    format, y = FORMATS[format_name], x.new_empty((*x.shape[:-1], len(codes)))
    rows = max(1, TILE_WEIGHTS // codes.shape[1])
    for start in range(0, len(codes), rows):
        part = slice(start, start + rows)
        tile = QuantizedWeight(format, codes[part], scales[part], None if mins is None else mins[part])
        tile_bias = None if bias is None else bias[part]
        y[..., part] = nn.functional.linear(x, dequantize(tile, x.dtype), tile_bias)
    return y


@_dequantize_linear.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    mins: torch.Tensor | None,
    bias: torch.Tensor | None,
    format_name: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], len(codes)))
