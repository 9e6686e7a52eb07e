"""Rows of a quantized weight, written out one by one: what an embedding does."""

from __future__ import annotations

import torch
from torch import nn

from ipex_vllm.low_bit.quantize import QuantizedWeight, numbers, pack_nibbles, unpack_nibbles


class Rows(nn.Module):
    """A quantized embedding [rows, features], kept at its format's size: codes of 4 bits take half a byte each."""

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.format = weight.format
        codes = pack_nibbles(weight.codes) if weight.format.is_packed else weight.codes
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)
        self.register_buffer("mins", weight.mins, persistent=False)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows with these numbers, int64 [...]: float32 [..., features]."""
        flat = ids.flatten()
        codes, scales = self.codes[flat], self.scales[flat].float().unsqueeze(-1)
        if self.format.is_packed:
            codes = unpack_nibbles(codes)
        values = numbers(codes, self.format).view(len(codes), scales.shape[1], -1) * scales
        if self.mins is not None:
            values = values + self.mins[flat].float().unsqueeze(-1)
        return values.flatten(1).view(*ids.shape, -1)
