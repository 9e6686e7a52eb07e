"""int8 weights times int8 activations (W8A8) on x86 CPUs: packing, and the torch operator over the native kernel.

How the kernel works, and the packed layout drawn, is in `docs/kernels.md`.
"""

import ctypes

import torch
from torch import Tensor

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.quantize import QuantizedWeight

GROUP_SIZES = (32, 64)
ROW = 0  # in place of a group size: one scale per output
TILE_OUTPUTS = 32
TERM_BYTES = 2 * TILE_OUTPUTS  # of a group's scales
BLOCK_INPUTS = 64  # of weights without groups

ISAS = {1: "avx2", 2: "avx_vnni", 3: "avx512_vnni", 4: "amx"}


def unavailable_reason() -> str | None:
    """Say in one sentence why the kernel cannot run here; None when it can."""
    if reason := native.unavailable_reason():
        return reason
    has_isa = native.library().w8a8_isa(ctypes.c_int64(1)) in ISAS
    return None if has_isa else "the int8 kernel needs a CPU with AVX2, FMA and F16C"


def isa(rows: int) -> str:
    """The instruction set the kernel uses on this CPU for so many rows, one of `ISAS`.

    Raises:
        RuntimeError: the kernel cannot run here.
    """
    if reason := unavailable_reason():
        raise RuntimeError(reason)
    return ISAS[native.library().w8a8_isa(ctypes.c_int64(rows))]


def pack(codes: Tensor, scales: Tensor) -> Tensor:
    """Put int8 weights into the kernel's layout, one contiguous tensor that can be a parameter.

    A weight is `scale * code`. Scales of groups are kept as float16, as ggml does: exact for ggml's q8_0, and rounded
    by at most 1 part in 2048 otherwise, but for scales below 2^-14. Scales of outputs stay float32.

    Args:
        codes: int8 [N, K].
        scales: float32 [N, K // group], group 32 or 64, or [N, 1], one for each output, with any K.

    Returns:
        uint8 [packed bytes], for `linear`, which is told the group, or `ROW`.

    Raises:
        ValueError: the shapes do not fit each other, the group is not one of the two, or a scale is not finite as it is
            kept.
    """
    outputs, inputs = codes.shape
    groups = scales.shape[-1]
    group = ROW if groups == 1 else inputs // max(groups, 1)
    if scales.shape != (outputs, groups) or (group and (group * groups != inputs or group not in GROUP_SIZES)):
        raise ValueError(
            f"int8 weights {tuple(codes.shape)} with scales {tuple(scales.shape)}: a scale per output, or K must be 32 "
            "or 64 times the number of groups"
        )
    kept = scales.to(torch.float16 if group else torch.float32)
    if not kept.isfinite().all():
        raise ValueError("int8 scales must be finite, those of groups below 65504 to be kept as float16")

    tiles = -(-outputs // TILE_OUTPUTS)
    rows = tiles * TILE_OUTPUTS - outputs
    block = group or BLOCK_INPUTS
    blocks = -(-inputs // block)
    # A code is kept as code + 128; x is 0 behind the last input.
    padded = torch.nn.functional.pad(codes.view(torch.uint8) ^ 128, (0, blocks * block - inputs, 0, rows))
    # 4 inputs in 4 bytes: [tile, output, line] -> [tile, line, output]
    words = padded.contiguous().view(torch.int32).view(tiles, TILE_OUTPUTS, -1)
    lines = words.transpose(1, 2).contiguous().view(torch.uint8).view(tiles, blocks, -1)
    terms = torch.nn.functional.pad(kept, (0, 0, 0, rows)).view(tiles, TILE_OUTPUTS, groups).transpose(1, 2)
    terms = terms.contiguous().view(torch.uint8)
    if group:
        return torch.cat([terms, lines], dim=-1).flatten()
    return torch.cat([terms.flatten(1), lines.flatten(1)], dim=-1).flatten()


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, group_size: int, isa: int = 0) -> Tensor:
    """`x @ weight.T + bias` with the weights of `pack`, through the torch operator `ipex_vllm::w8a8_linear`.

    Each group of inputs of x is rounded to int8 with one scale, max|x| / 127: groups as the weights', of 64 with `ROW`.
    Products are summed in int32 within a group, and over the groups in float32. A row's result does not depend on the
    other rows, the number of threads or the instruction set.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        packed: uint8, from `pack`.
        bias: float32 or x's dtype [N], or None.
        group_size: that of the weights, or `ROW`.
        isa: one of `ISAS`, which this CPU must have; 0 is the best one for so many rows.

    Returns:
        [..., N] of x's dtype.

    Raises:
        RuntimeError: a shape or dtype does not fit, or the kernel cannot run here.
    """
    operator = torch.ops.ipex_vllm.w8a8_linear.default
    return operator(x, packed, bias, out_features, group_size, isa)  # type: ignore[no-any-return]


# The library implements it (csrc/torch_ops.cpp).
torch.library.define(
    "ipex_vllm::w8a8_linear",
    "(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size, int isa=0) -> Tensor",
)
torch.library.register_fake("ipex_vllm::w8a8_linear", native.linear_shape)


def rows(packed: Tensor, ids: Tensor, in_features: int, group_size: int) -> Tensor:
    """The rows with the numbers `ids`, int64 [...], of the weight that `pack` packed in groups: float32 [..., K]."""
    groups = in_features // group_size
    tiles = packed.view(-1, groups, TERM_BYTES + group_size * TILE_OUTPUTS)
    flat = ids.flatten()
    tile, output = flat // TILE_OUTPUTS, flat % TILE_OUTPUTS
    # [tile, block, line, half, lane, byte], of which a row is one half and lane: [row, block, line, byte]
    lines = tiles[..., TERM_BYTES:].view(-1, groups, group_size // 4, 2, TILE_OUTPUTS // 2, 4)
    codes = lines[tile, :, :, output // 16, output % 16].flatten(2).float() - 128
    scales = tiles[..., :TERM_BYTES].view(-1, groups, TILE_OUTPUTS, 2)[tile, :, output].contiguous()
    values: Tensor = codes * scales.view(torch.float16).float()
    return values.view(*ids.shape, in_features)


class W8A8Linear(LowBitLinear):
    """This package's int8 matmul, with activations rounded to int8 in groups of inputs."""

    kernel = "w8a8"
    formats = ("sym_int8",)
    group_sizes = (None, *GROUP_SIZES)
    is_packed = True
    packed: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return unavailable_reason()

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.register_buffer("packed", pack(weight.codes, weight.scales.float()), persistent=False)

    def describe(self, format: Format, group_size: int | None, out_features: int, in_features: int) -> None:
        super().describe(format, group_size, out_features, in_features)
        self.inputs_per_scale = group_size or ROW
        self.has_rows = self.inputs_per_scale != ROW

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear(x, self.packed, bias, self.out_features, self.inputs_per_scale)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return rows(self.packed, ids, self.in_features, self.inputs_per_scale)
