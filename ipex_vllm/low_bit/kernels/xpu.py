"""The matmuls of vLLM's library for Intel GPUs."""

from __future__ import annotations

import functools

import torch

from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.quantize import QuantizedWeight


@functools.cache
def operators() -> frozenset[str]:
    """The matmuls that vLLM's library for Intel GPUs brings; none on another device."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return frozenset()
    if not current_platform.is_xpu():
        return frozenset()
    names = ("int4_gemm_w4a16", "fp8_gemm_w8a16")
    return frozenset(name for name in names if hasattr(torch.ops._xpu_C, name))


class XpuInt4Linear(LowBitLinear):
    """vLLM's 4-bit matmul for Intel GPUs, on float activations; the layout is the one that vLLM makes of GPTQ's."""

    kernel = "xpu-w4a16"
    formats = ("sym_int4",)
    group_sizes = (32, 64, 128)
    dtypes = (torch.bfloat16, torch.float16)
    packed: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return None if "int4_gemm_w4a16" in operators() else "needs vLLM's library for Intel GPUs"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        device = weight.codes.device
        # Eight codes of one output channel in a word, the first input in its lowest bits.
        words = weight.codes.to(torch.int32).view(self.out_features, -1, 8) << torch.arange(0, 32, 4, device=device)
        self.register_buffer("packed", words.sum(dim=-1, dtype=torch.int32), persistent=False)
        self.register_buffer("scales", weight.scales.t().to(dtype).contiguous(), persistent=False)
        self.register_buffer("zero", torch.tensor([8], dtype=torch.int8, device=device), persistent=False)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        y: torch.Tensor = torch.ops._xpu_C.int4_gemm_w4a16(
            tokens, self.packed.t(), bias, self.scales, self.zero, self.group_size, None
        )
        return y.view((*x.shape[:-1], self.out_features))


class XpuFp8Linear(LowBitLinear):
    """vLLM's matmul for Intel GPUs with 8-bit float weights, one scale per output channel, on float activations."""

    kernel = "xpu-w8a16"
    formats = ("fp8_e4m3", "fp8_e5m2")
    group_sizes = (None,)
    dtypes = (torch.bfloat16, torch.float16)
    codes: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return None if "fp8_gemm_w8a16" in operators() else "needs vLLM's library for Intel GPUs"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.register_buffer("codes", weight.codes, persistent=False)
        self.register_buffer("scales", weight.scales.t().contiguous(), persistent=False)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        y: torch.Tensor = torch.ops._xpu_C.fp8_gemm_w8a16(tokens, self.codes.t(), self.scales, bias)
        return y.view((*x.shape[:-1], self.out_features))
