"""The matmuls of vLLM's library for CPUs."""

from __future__ import annotations

import functools

import torch

from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.quantize import QuantizedWeight, pack_nibbles


@functools.cache
def operators() -> frozenset[str]:
    """The matmuls that vLLM's compiled CPU library brings on this machine; none without vLLM or on another device."""
    try:
        import vllm._custom_ops  # noqa: F401  (what torch.compile needs to know about the operators)
        from vllm.platforms import current_platform
    except ImportError:
        return frozenset()
    if not current_platform.is_cpu():
        return frozenset()
    names = ("onednn_scaled_mm", "int4_scaled_mm_cpu", "cpu_gemm_wna16")
    return frozenset(name for name in names if hasattr(torch.ops._C, name))


def has_vnni() -> bool:
    """Whether this CPU adds four products of 8-bit integers in 32 bits."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


class OneDnnInt8Linear(LowBitLinear):
    """oneDNN's W8A8, as vLLM wraps it: int8 weights per output channel, activations quantized to int8 per token."""

    kernel = "onednn-w8a8"
    formats = ("sym_int8",)
    group_sizes = (None,)

    @classmethod
    def missing(cls) -> str | None:
        if "onednn_scaled_mm" not in operators():
            return "needs vLLM's CPU library"
        if not has_vnni():
            return "needs a CPU with VNNI, without which oneDNN cuts sums of two products off at 16 bits"
        return None

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        from vllm import _custom_ops as ops

        self.ops = ops
        # oneDNN packs the weight but keeps only a pointer to the scales.
        self.register_buffer("scales", weight.scales.flatten(), persistent=False)
        self.primitives = ops.create_onednn_scaled_mm(
            weight.codes.t(), self.scales, dtype, dynamic_quant=True, use_azp=False, primitive_cache_size=32
        )

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        codes, scales, _ = self.ops.onednn_scaled_int8_quant(tokens)
        y = torch.empty((tokens.shape[0], self.out_features), dtype=x.dtype)
        self.ops.onednn_scaled_mm(self.primitives, codes, y, scales, None, None, bias)
        return y.view((*x.shape[:-1], self.out_features))


class VllmW4A8Linear(LowBitLinear):
    """vLLM's 4-bit matmul with activations quantized to uint8 per token; it has an AMX path.

    Fast with many rows there, but the last choice: it rounds the activations, and the scales to bfloat16.
    """

    kernel = "vllm-w4a8"
    formats = ("sym_int4",)
    dtypes = (torch.bfloat16,)
    outputs_multiple = 64

    @classmethod
    def missing(cls) -> str | None:
        has_it = "int4_scaled_mm_cpu" in operators()
        return None if has_it else "needs vLLM's CPU library, which has it from AVX-512 BF16 on"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        zeros = torch.full_like(weight.scales.t(), 8, dtype=torch.uint8)
        # The order of a word's nibbles, and the last argument, are AWQ's.
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        packed = torch.ops._C.convert_weight_packed_scale_zp(
            pack_nibbles(weight.codes.t(), order),
            pack_nibbles(zeros, order),
            weight.scales.t().to(dtype).contiguous(),
            0,
        )
        for name, tensor in zip(("packed", "zeros", "scales"), packed, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        if tokens.shape[0] == 0:  # it divides by their number
            return x.new_empty((*x.shape[:-1], self.out_features))
        y: torch.Tensor = torch.ops._C.int4_scaled_mm_cpu(
            tokens, self.packed, self.zeros, self.scales, None if bias is None else bias.float()
        )
        return y.view((*x.shape[:-1], self.out_features))


class VllmW4A16Linear(LowBitLinear):
    """vLLM's 4-bit matmul on float activations. Faster than bf16 at a few tokens, slower at many."""

    kernel = "vllm-w4a16"
    formats = ("sym_int4",)
    dtypes = (torch.bfloat16, torch.float16)
    outputs_multiple = 32

    @classmethod
    def missing(cls) -> str | None:
        return None if "cpu_gemm_wna16" in operators() else "needs vLLM's CPU library"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        # Sixteen output channels, two words, lie together for all inputs.
        words = pack_nibbles(weight.codes.t()).view(self.in_features, -1, 2).transpose(0, 1).flatten(1)
        self.register_buffer("packed", words.contiguous(), persistent=False)
        self.register_buffer("scales", weight.scales.t().to(dtype).contiguous(), persistent=False)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        y = torch.empty((tokens.shape[0], self.out_features), dtype=x.dtype)
        torch.ops._C.cpu_gemm_wna16(tokens, self.packed, y, self.scales, None, bias, 8, "vec")
        return y.view((*x.shape[:-1], self.out_features))
