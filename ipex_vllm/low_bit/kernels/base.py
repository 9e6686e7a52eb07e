"""What every kernel is to the rest: a layer over a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import nn

from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.quantize import QuantizedWeight


class LowBitLinear(nn.Module):
    """y = x W^T + b with a quantized W [out_features, in_features]; x and y are [..., features], of one float dtype.

    A subclass is one kernel. `forward` takes the bias rather than owning it, because under tensor parallelism only
    one rank adds it.

    Attributes:
        kernel: its name, as it is logged.
        formats: the formats that it computes.
        dtypes: those of the activations.
        group_sizes: how many inputs may share a scale, None for all of an output channel's; empty for any number.
        outputs_multiple: what out_features must be a multiple of.
        is_packed: whether `describe` and the buffers are all that makes a layer, so that `of_buffers` can.
        has_rows: whether `rows` writes rows of its packed weight out, so that an embedding can share it.
    """

    kernel = ""
    formats: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    group_sizes: tuple[int | None, ...] = ()
    outputs_multiple = 1
    is_packed = False
    has_rows = False

    @classmethod
    def unavailable_reason(
        cls, format: Format, group_size: int | None, out_features: int, dtype: torch.dtype
    ) -> str | None:
        """Say why this kernel cannot compute such a layer on this machine, or None if it can."""
        if format.name not in cls.formats:
            return f"computes {', '.join(cls.formats)} only"
        if cls.group_sizes and group_size not in cls.group_sizes:
            return f"computes groups of {', '.join(map(str, cls.group_sizes))} only"
        if reason := cls.missing():
            return reason
        if dtype not in cls.dtypes:
            return f"computes in {', '.join(map(str, cls.dtypes))} only"
        if out_features % cls.outputs_multiple:
            return f"{out_features} outputs are no multiple of {cls.outputs_multiple}"
        return None

    @classmethod
    def missing(cls) -> str | None:
        """Say why this machine is not one for this kernel, or None if it is."""
        raise NotImplementedError

    input_scales: torch.Tensor | None

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.describe(weight.format, weight.group_size, *weight.codes.shape)
        self.register_buffer("input_scales", weight.input_scales, persistent=False)

    @classmethod
    def of_buffers(
        cls,
        format: Format,
        group_size: int | None,
        out_features: int,
        in_features: int,
        buffers: Mapping[str, torch.Tensor],
    ) -> Self:
        """A layer of a kernel that `is_packed`, of the `named_buffers` of another."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.describe(format, group_size, out_features, in_features)
        for name, buffer in {"input_scales": None, **buffers}.items():
            self.register_buffer(name, buffer, persistent=False)
        return self

    def describe(self, format: Format, group_size: int | None, out_features: int, in_features: int) -> None:
        """Set all that is no buffer."""
        self.format, self.group_size = format, group_size
        self.out_features, self.in_features = out_features, in_features

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # A compiler makes this a part of whatever computed x.
        return self.multiply(x if self.input_scales is None else (x * self.input_scales).to(x.dtype), bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`forward` of inputs that are scaled already."""
        raise NotImplementedError

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of the weight with these numbers, int64 [...]: float32 [..., in_features]."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, kernel={self.kernel}"
