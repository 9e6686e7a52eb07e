"""The choice of a kernel for a quantized weight, by format, machine and shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ipex_vllm.low_bit.experts import LowBitExperts
from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.kernels.dequantize import DequantizingLinear
from ipex_vllm.low_bit.kernels.vllm_cpu import OneDnnInt8Linear, VllmW4A8Linear, VllmW4A16Linear
from ipex_vllm.low_bit.kernels.w4a8 import W4A8Linear
from ipex_vllm.low_bit.kernels.w8a8 import W8A8Linear
from ipex_vllm.low_bit.kernels.w8a16 import W8A16Linear
from ipex_vllm.low_bit.kernels.xpu import XpuFp8Linear, XpuInt4Linear
from ipex_vllm.low_bit.quantize import QuantizedWeight

# In order of preference: the first that can compute a layer does. Accuracy comes first: our kernels round activations
# in groups of inputs, oneDNN's and vLLM's a token at once.
KERNELS: tuple[type[LowBitLinear], ...] = (
    XpuInt4Linear,
    XpuFp8Linear,
    W4A8Linear,
    W8A8Linear,
    W8A16Linear,
    OneDnnInt8Linear,
    VllmW4A8Linear,
    VllmW4A16Linear,
    DequantizingLinear,
)


def choose_kernel(format: Format, group_size: int | None, out_features: int, dtype: torch.dtype) -> type[LowBitLinear]:
    """Return the preferred kernel for a layer of this format, group, shape and activation dtype on this machine."""
    for kernel in KERNELS:
        if kernel.unavailable_reason(format, group_size, out_features, dtype) is None:
            return kernel
    raise AssertionError("DequantizingLinear computes everything")


def make_linear(weight: QuantizedWeight, dtype: torch.dtype) -> LowBitLinear:
    """Pack `weight` for the chosen kernel; `dtype` is that of the activations."""
    return choose_kernel(weight.format, weight.group_size, len(weight.codes), dtype)(weight, dtype)


def describe(linear: LowBitLinear) -> dict[str, Any]:
    """What `open_linear` needs to know of a layer beside its buffers, for JSON."""
    shape = [linear.out_features, linear.in_features]
    return {"kernel": linear.kernel, "format": linear.format.name, "group_size": linear.group_size, "shape": shape}


def open_linear(
    about: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    format: Format,
    group_size: int | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> LowBitLinear | None:
    """The layer that was described so; None where such a weight would be another layer today."""
    kernel = choose_kernel(format, group_size, shape[0], dtype)
    expected = {"kernel": kernel.kernel, "format": format.name, "group_size": group_size, "shape": list(shape)}
    if about != expected or not kernel.is_packed:
        return None
    return kernel.of_buffers(format, group_size, *shape, buffers)


def summarize(layers: Sequence[LowBitLinear | LowBitExperts]) -> Iterator[str]:
    """One line for each pair of format and kernel in use, with what it costs where no fast kernel was found."""
    for (format, kernel), count in Counter((layer.format.name, layer.kernel) for layer in layers).items():
        line = f"{format}: {count} layers use the kernel {kernel}"
        if kernel == DequantizingLinear.kernel:
            line += (
                ", which saves memory but no time: each call first writes the weight out in full precision, in parts"
            )
        yield line
