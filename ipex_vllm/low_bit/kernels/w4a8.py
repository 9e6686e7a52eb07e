"""4-bit weights times int8 activations (W4A8) on x86 CPUs: packing, and the torch operator over the native kernel.

How the kernel works, and the packed layout drawn, is in `docs/kernels.md`.
"""

import ctypes

import torch
from torch import Tensor

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.quantize import QuantizedWeight

GROUP_SIZES = (32, 64, 128)
TILE_OUTPUTS = 32
TERM_BYTES = 2 * TILE_OUTPUTS

# What a code stands for, by the format's name, as csrc/w4a8/w4a8.h numbers it: itself, or a level of a table; and what
# a level is counted in. NF4's are rounded to whole ones, by less than 0.004 of the largest weight of a group.
TABLES = {"nf4": 1, "fp4": 2}
UNITS = {"nf4": 127, "fp4": 2}

ISAS = {1: "avx2", 2: "avx_vnni", 3: "avx512_vnni", 4: "amx"}


def unavailable_reason() -> str | None:
    """Say in one sentence why the kernel cannot run here; None when it can."""
    if reason := native.unavailable_reason():
        return reason
    has_isa = native.library().w4a8_isa(ctypes.c_int64(1)) in ISAS
    return None if has_isa else "the int4 kernel needs a CPU with AVX2, FMA and F16C"


def isa(rows: int) -> str:
    """The instruction set the kernel uses on this CPU for so many rows, one of `ISAS`.

    Raises:
        RuntimeError: the kernel cannot run here.
    """
    if reason := unavailable_reason():
        raise RuntimeError(reason)
    return ISAS[native.library().w4a8_isa(ctypes.c_int64(rows))]


def pack(codes: Tensor, scales: Tensor, mins: Tensor | None) -> Tensor:
    """Put int4 weights into the kernel's layout, one contiguous tensor that can be a parameter.

    A weight is `scale * code + min`. Scales and minima are kept as float16, as ggml does: exact for ggml's q4_0
    and q4_1 and for float16 checkpoints, and rounded by at most 1 part in 2048 otherwise.

    Args:
        codes: uint8 [N, K], values 0 to 15.
        scales: float32 [N, K // group], group 32, 64 or 128.
        mins: float32 [N, K // group], `-zero_point * scale` for integer zero points; None means `-8 * scale`,
            which the kernel computes in integers.

    Returns:
        uint8 [packed bytes], for `linear` and `unpack`.

    Raises:
        ValueError: the shapes do not fit each other, the group is not one of the three, or a scale or minimum is
            not finite in float16.
    """
    outputs, inputs = codes.shape
    groups = scales.shape[-1]
    group = inputs // groups if groups else 0
    if scales.shape != (outputs, groups) or group * groups != inputs or group not in GROUP_SIZES:
        raise ValueError(
            f"int4 weights {tuple(codes.shape)} with scales {tuple(scales.shape)}: K must be 32, 64 or 128 times "
            "the number of groups"
        )
    if mins is not None and mins.shape != scales.shape:
        raise ValueError(f"int4 minima {tuple(mins.shape)} must have the shape of the scales {tuple(scales.shape)}")

    tiles = -(-outputs // TILE_OUTPUTS)
    padding = tiles * TILE_OUTPUTS - outputs
    words = torch.nn.functional.pad(codes, (0, 0, 0, padding)).contiguous().view(torch.int32)
    halves = words.view(tiles, 2, TILE_OUTPUTS // 2, -1)
    # 4 inputs of two outputs in 4 bytes: [tile, lane, line] -> [tile, line, lane]
    lines = (halves[:, 0] | halves[:, 1] << 4).transpose(1, 2).contiguous()
    nibbles = lines.view(torch.uint8).view(tiles, groups, -1)
    terms = [_term_bytes(term, padding) for term in (scales, mins) if term is not None]
    return torch.cat([*terms, nibbles], dim=-1).flatten()


def pack_weight(weight: QuantizedWeight) -> Tensor:
    """`pack` a weight of one of `W4A8Linear.formats`, a table's with scales that count its `UNITS`."""
    mins = None if weight.mins is None else weight.mins.float()
    return pack(weight.codes, weight.scales.float() / UNITS.get(weight.format.name, 1), mins)


def _term_bytes(term: Tensor, padding: int) -> Tensor:
    """[N, groups] -> uint8 [tiles, groups, 64]: one float16 for each output of a tile."""
    halves = term.to(torch.float16)
    if not halves.isfinite().all():
        raise ValueError("int4 scales and minima must be finite and below 65504 to be kept as float16")
    halves = torch.nn.functional.pad(halves, (0, 0, 0, padding))
    return halves.view(-1, TILE_OUTPUTS, halves.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)


def unpack(packed: Tensor, out_features: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: codes uint8 [N, K], scales float32 [N, K // group], mins likewise or None."""
    tiles = -(-out_features // TILE_OUTPUTS)
    terms = 1 if symmetric else 2
    blocks = packed.view(tiles, -1, terms * TERM_BYTES + group_size * TILE_OUTPUTS // 2)
    groups = blocks.shape[1]
    nibbles = blocks[:, :, terms * TERM_BYTES :].reshape(tiles, groups, group_size // 4, 16, 4)
    lines = torch.stack([nibbles & 15, nibbles >> 4], dim=3)
    codes = lines.permute(0, 3, 4, 1, 2, 5).reshape(tiles * TILE_OUTPUTS, groups * group_size)
    halves = blocks[:, :, : terms * TERM_BYTES].contiguous().view(torch.float16)
    values = halves.view(tiles, groups, terms, TILE_OUTPUTS).permute(2, 0, 3, 1).float()
    values = values.reshape(terms, tiles * TILE_OUTPUTS, groups)[:, :out_features]
    return codes[:out_features].contiguous(), values[0].contiguous(), None if symmetric else values[1].contiguous()


def linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    symmetric: bool,
    isa: int = 0,
    table: int = 0,
) -> Tensor:
    """`x @ weight.T + bias` with the weights of `pack`, through the torch operator `ipex_vllm::w4a8_linear`.

    Each group of inputs of x is rounded to int8 with one scale, max|x| / 127: groups as the weights', but at most 64.
    Products are summed in int32 within a group, and over the groups in float32. A row's result does not depend on the
    other rows, the number of threads or the instruction set.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        packed: uint8, from `pack`.
        bias: float32 or x's dtype [N], or None.
        isa: one of `ISAS`, which this CPU must have; 0 is the best one for so many rows.
        table: one of `TABLES`, whose symmetric weights are `scale * level`, levels counted in `UNITS`; 0 for none.

    Returns:
        [..., N] of x's dtype.

    Raises:
        RuntimeError: a shape or dtype does not fit, or the kernel cannot run here.
    """
    operator = torch.ops.ipex_vllm.w4a8_linear.default
    return operator(x, packed, bias, out_features, group_size, symmetric, isa, table)  # type: ignore[no-any-return]


# The library implements it (csrc/torch_ops.cpp).
torch.library.define(
    "ipex_vllm::w4a8_linear",
    "(Tensor x, Tensor packed, Tensor? bias, int out_features, int group_size, bool symmetric, int isa=0, int table=0) "
    "-> Tensor",
)
torch.library.register_fake("ipex_vllm::w4a8_linear", native.linear_shape)


class W4A8Linear(LowBitLinear):
    """This package's matmul with 4-bit weights, and activations rounded to int8 in groups of inputs."""

    kernel = "w4a8"
    formats = ("sym_int4", "asym_int4", *TABLES)
    group_sizes = GROUP_SIZES
    is_packed = True
    packed: torch.Tensor

    @classmethod
    def missing(cls) -> str | None:
        return unavailable_reason()

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight, dtype)
        self.register_buffer("packed", pack_weight(weight), persistent=False)

    def describe(self, format: Format, group_size: int | None, out_features: int, in_features: int) -> None:
        super().describe(format, group_size, out_features, in_features)
        assert group_size is not None
        self.inputs_per_scale = group_size
        self.table = TABLES.get(format.name, 0)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        symmetric = self.format.symmetric
        return linear(x, self.packed, bias, self.out_features, self.inputs_per_scale, symmetric, table=self.table)
