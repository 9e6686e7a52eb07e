"""The linear layers that compute with quantized weights, and the choice among them by format, machine and shape."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ipex_vllm.low_bit import w4a8, w8a16
from ipex_vllm.low_bit.formats import FORMATS, Format
from ipex_vllm.low_bit.quantize import QuantizedWeight, dequantize, pack_nibbles

# DequantizingLinear's part of a weight: few enough to stay in the cache until multiplied, enough for two cores.
TILE_WEIGHTS = 2**19


class LowBitLinear(nn.Module):
    """y = x W^T + b with a quantized W [out_features, in_features]; x and y are [..., features], of one float dtype.

    A subclass is one kernel. `forward` takes the bias rather than owning it, because under tensor parallelism only
    one rank adds it.

    Attributes:
        kernel: its name, as it is logged.
        formats: the formats that it computes.
        dtypes: those of the activations.
        outputs_multiple: what out_features must be a multiple of.
    """

    kernel = ""
    formats: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    outputs_multiple = 1

    @classmethod
    def unavailable_reason(cls, format: Format, out_features: int, dtype: torch.dtype) -> str | None:
        """Say why this kernel cannot compute such a layer on this machine, or None if it can."""
        if format.name not in cls.formats:
            return f"computes {', '.join(cls.formats)} only"
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

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.format = weight.format
        self.out_features, self.in_features = weight.codes.shape

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, kernel={self.kernel}"


@functools.cache
def _vllm_cpu_ops() -> frozenset[str]:
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


class OneDnnInt8Linear(LowBitLinear):
    """oneDNN's W8A8, as vLLM wraps it: int8 weights per output channel, activations quantized to int8 per token."""

    kernel = "onednn-w8a8"
    formats = ("sym_int8",)

    @classmethod
    def missing(cls) -> str | None:
        return None if "onednn_scaled_mm" in _vllm_cpu_ops() else "needs vLLM's CPU library"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        from vllm import _custom_ops as ops

        self.ops = ops
        # oneDNN packs the weight but keeps only a pointer to the scales.
        self.register_buffer("scales", weight.scales.flatten(), persistent=False)
        self.primitives = ops.create_onednn_scaled_mm(
            weight.codes.t(), self.scales, dtype, dynamic_quant=True, use_azp=False, primitive_cache_size=32
        )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        codes, scales, _ = self.ops.onednn_scaled_int8_quant(tokens)
        y = torch.empty((tokens.shape[0], self.out_features), dtype=x.dtype)
        self.ops.onednn_scaled_mm(self.primitives, codes, y, scales, None, None, bias)
        return y.view((*x.shape[:-1], self.out_features))


class W4A8Linear(LowBitLinear):
    """This package's int4 matmul, with activations quantized to int8 per token (`w4a8.py`)."""

    kernel = "w4a8"
    formats = ("sym_int4", "asym_int4")
    packed: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return w4a8.unavailable_reason()

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        mins = None if weight.mins is None else weight.mins.float()
        self.register_buffer("packed", w4a8.pack(weight.codes, weight.scales.float(), mins), persistent=False)
        self.group_size = self.in_features // weight.scales.shape[1]

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return w4a8.linear(x, self.packed, bias, self.out_features, self.group_size, self.format.symmetric)


class W8A16Linear(LowBitLinear):
    """This package's matmul with 8-bit float weights, a scale per output channel, on float activations (`w8a16.py`)."""

    kernel = "w8a16"
    formats = ("fp8_e4m3", "fp8_e5m2")
    packed: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return w8a16.unavailable_reason()

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.register_buffer("packed", w8a16.pack(weight.codes, weight.scales), persistent=False)
        self.weight_dtype = weight.codes.dtype

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return w8a16.linear(x, self.packed, bias, self.out_features, self.weight_dtype)


class VllmW4A8Linear(LowBitLinear):
    """vLLM's 4-bit matmul with activations quantized to uint8 per token; it has an AMX path."""

    kernel = "vllm-w4a8"
    formats = ("sym_int4",)
    dtypes = (torch.bfloat16,)
    outputs_multiple = 64

    @classmethod
    def missing(cls) -> str | None:
        if "int4_scaled_mm_cpu" not in _vllm_cpu_ops():
            return "needs vLLM's CPU library, which has it from AVX-512 BF16 on"
        if not torch.cpu._is_amx_tile_supported() and w4a8.unavailable_reason() is None:
            return "is slower than w4a8 without AMX"
        return None

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

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
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
        return None if "cpu_gemm_wna16" in _vllm_cpu_ops() else "needs vLLM's CPU library"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        # Sixteen output channels, two words, lie together for all inputs.
        words = pack_nibbles(weight.codes.t()).view(self.in_features, -1, 2).transpose(0, 1).flatten(1)
        self.register_buffer("packed", words.contiguous(), persistent=False)
        self.register_buffer("scales", weight.scales.t().to(dtype).contiguous(), persistent=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        y = torch.empty((tokens.shape[0], self.out_features), dtype=x.dtype)
        torch.ops._C.cpu_gemm_wna16(tokens, self.packed, y, self.scales, None, bias, 8, "vec")
        return y.view((*x.shape[:-1], self.out_features))


@functools.cache
def _vllm_xpu_ops() -> frozenset[str]:
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
    dtypes = (torch.bfloat16, torch.float16)
    packed: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return None if "int4_gemm_w4a16" in _vllm_xpu_ops() else "needs vLLM's library for Intel GPUs"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.group_size = self.in_features // weight.scales.shape[1]
        device = weight.codes.device
        # Eight codes of one output channel in a word, the first input in its lowest bits.
        words = weight.codes.to(torch.int32).view(self.out_features, -1, 8) << torch.arange(0, 32, 4, device=device)
        self.register_buffer("packed", words.sum(dim=-1, dtype=torch.int32), persistent=False)
        self.register_buffer("scales", weight.scales.t().to(dtype).contiguous(), persistent=False)
        self.register_buffer("zero", torch.tensor([8], dtype=torch.int8, device=device), persistent=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        y: torch.Tensor = torch.ops._xpu_C.int4_gemm_w4a16(
            tokens, self.packed.t(), bias, self.scales, self.zero, self.group_size, None
        )
        return y.view((*x.shape[:-1], self.out_features))


class XpuFp8Linear(LowBitLinear):
    """vLLM's matmul for Intel GPUs with 8-bit float weights, one scale per output channel, on float activations."""

    kernel = "xpu-w8a16"
    formats = ("fp8_e4m3", "fp8_e5m2")
    dtypes = (torch.bfloat16, torch.float16)
    codes: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return None if "fp8_gemm_w8a16" in _vllm_xpu_ops() else "needs vLLM's library for Intel GPUs"

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.register_buffer("codes", weight.codes, persistent=False)
        self.register_buffer("scales", weight.scales.t().contiguous(), persistent=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tokens = x.reshape(-1, self.in_features)
        y: torch.Tensor = torch.ops._xpu_C.fp8_gemm_w8a16(tokens, self.codes.t(), self.scales, bias)
        return y.view((*x.shape[:-1], self.out_features))


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

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
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


# In order of preference: the first that can compute a layer does.
KERNELS: tuple[type[LowBitLinear], ...] = (
    XpuInt4Linear,
    XpuFp8Linear,
    OneDnnInt8Linear,
    VllmW4A8Linear,
    W4A8Linear,
    W8A16Linear,
    VllmW4A16Linear,
    DequantizingLinear,
)


def choose_kernel(format: Format, out_features: int, dtype: torch.dtype) -> type[LowBitLinear]:
    """Return the fastest kernel for a layer of this format, shape and activation dtype on this machine."""
    for kernel in KERNELS:
        if kernel.unavailable_reason(format, out_features, dtype) is None:
            return kernel
    raise AssertionError("DequantizingLinear computes everything")


def make_linear(weight: QuantizedWeight, dtype: torch.dtype) -> LowBitLinear:
    """Pack `weight` for the chosen kernel; `dtype` is that of the activations."""
    return choose_kernel(weight.format, len(weight.codes), dtype)(weight, dtype)


def summarize(linears: Sequence[LowBitLinear]) -> Iterator[str]:
    """One line for each pair of format and kernel in use, with what it costs where no fast kernel was found."""
    for (format, kernel), count in Counter((linear.format.name, linear.kernel) for linear in linears).items():
        line = f"{format}: {count} layers use the kernel {kernel}"
        if kernel == DequantizingLinear.kernel:
            line += (
                ", which saves memory but no time: each call first writes the weight out in full precision, in parts"
            )
        yield line
