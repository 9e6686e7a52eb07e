"""8-bit float weights times float activations (W8A16) on x86 CPUs: packing, and the torch operator over the kernel."""

import torch
from torch import Tensor

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.quantize import QuantizedWeight

GROUP_SIZES = (32, 64, 128)
ROW = 0  # in place of a group size: one scale per output
TILE_OUTPUTS = 32

ISAS = {1: "avx2", 2: "avx512", 3: "avx512_bf16"}
# What the kernel calls a weight's dtype, and what it multiplies a number by when it reads it as a float16.
WEIGHT_DTYPES = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
FACTORS = {torch.float8_e4m3fn: 2.0**-8, torch.float8_e5m2: 1.0}
LARGEST_CODES = {torch.float8_e4m3fn: 0x7E, torch.float8_e5m2: 0x7B}


def unavailable_reason() -> str | None:
    """Say in one sentence why the kernel cannot run here; None when it can."""
    if reason := native.unavailable_reason():
        return reason
    has_isa = native.library().w8a16_isa(native.DTYPES[torch.float32]) in ISAS
    return None if has_isa else "the fp8 kernel needs a CPU with AVX2, FMA and F16C"


def isa(dtype: torch.dtype) -> str:
    """The instruction set the kernel uses on this CPU for activations of `dtype`: one of `ISAS`.

    Raises:
        RuntimeError: the kernel cannot run here.
    """
    if reason := unavailable_reason():
        raise RuntimeError(reason)
    return ISAS[native.library().w8a16_isa(native.DTYPES[dtype])]


def pack(codes: Tensor, scales: Tensor) -> Tensor:
    """Put 8-bit float weights into the kernel's layout, one contiguous tensor that can be a parameter.

    Args:
        codes: float8_e4m3fn or float8_e5m2 [N, K].
        scales: float32 [N, K // group], group one of `GROUP_SIZES`, or [N, 1], one for each output, with any K; a
            weight is `scale * code`.

    Returns:
        uint8 [packed bytes], for `linear`, which is told the group, or `ROW`.

    Raises:
        ValueError: the shapes do not fit each other, a code is infinite or not a number, or a scale is not finite (or,
            for float8_e4m3fn, beyond 2^119).
    """
    outputs, inputs = codes.shape
    groups = scales.shape[-1]
    group = inputs if groups == 1 else inputs // max(groups, 1)
    if scales.shape != (outputs, groups) or group * groups != inputs or (groups != 1 and group not in GROUP_SIZES):
        raise ValueError(
            f"8-bit float weights {tuple(codes.shape)} need a scale per output, or for each "
            f"{', '.join(map(str, GROUP_SIZES))} inputs, not {tuple(scales.shape)}"
        )
    numbers = codes.view(torch.uint8)
    if (numbers & 0x7F).amax() > LARGEST_CODES[codes.dtype]:
        raise ValueError("a weight is infinite or not a number")
    scales = scales / FACTORS[codes.dtype]
    if not scales.isfinite().all():
        raise ValueError("a scale is too large, or not finite")
    tiles = -(-outputs // TILE_OUTPUTS)
    padding = tiles * TILE_OUTPUTS - outputs
    halves = torch.nn.functional.pad(numbers, (0, inputs % 2, 0, padding)).reshape(tiles, 2, 16, -1)
    words = halves[:, 0].short() | halves[:, 1].short() << 8
    # Two inputs of two outputs, 4 bytes: [tile, lane, line] -> [tile, line, lane]
    lines = words.view(torch.int32).transpose(1, 2).contiguous().view(torch.uint8).view(tiles, groups, -1)
    padded = torch.nn.functional.pad(scales, (0, 0, 0, padding)).view(tiles, TILE_OUTPUTS, groups)
    return torch.cat([padded.transpose(1, 2).contiguous().view(torch.uint8), lines], dim=2).flatten()


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    weight_dtype: torch.dtype,
    isa: int = 0,
) -> Tensor:
    """`x @ weight.T + bias` with the weights of `pack`, through the torch operator `ipex_vllm::w8a16_linear`.

    Products are summed in float32. A row's result does not depend on the other rows or the number of threads. It does
    on the instruction set: "avx512_bf16" adds the products of two inputs at a time, and takes activations and sums
    below 2^-126 for zero; the other two give the same bits.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        packed: uint8, from `pack`.
        bias: float32 or x's dtype [N], or None.
        group_size: one of `GROUP_SIZES`, or `ROW`.
        weight_dtype: that of the codes.
        isa: one of `ISAS`, which this CPU must have; 0 is the best one.

    Returns:
        [..., N] of x's dtype.

    Raises:
        RuntimeError: a shape or dtype does not fit, or the kernel cannot run here.
    """
    operator = torch.ops.ipex_vllm.w8a16_linear.default
    arguments = (x, packed, bias, out_features, group_size, WEIGHT_DTYPES[weight_dtype], isa)
    return operator(*arguments)  # type: ignore[no-any-return]


# The library implements it (csrc/torch_ops.cpp).
torch.library.define(
    "ipex_vllm::w8a16_linear",
    "(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size, int weight_format, int isa=0) -> Tensor",
)
torch.library.register_fake("ipex_vllm::w8a16_linear", native.linear_shape)


class W8A16Linear(LowBitLinear):
    """This package's matmul with 8-bit float weights, scales in float32, on float activations."""

    kernel = "w8a16"
    formats = ("fp8_e4m3", "fp8_e5m2")
    group_sizes = (*GROUP_SIZES, None)
    is_packed = True
    packed: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return unavailable_reason()

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.register_buffer("packed", pack(weight.codes, weight.scales), persistent=False)

    def describe(self, format: Format, group_size: int | None, out_features: int, in_features: int) -> None:
        super().describe(format, group_size, out_features, in_features)
        self.weight_dtype: torch.dtype = getattr(torch, str(format.dtype))

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.packed, bias, self.out_features, self.group_size or ROW, self.weight_dtype)
