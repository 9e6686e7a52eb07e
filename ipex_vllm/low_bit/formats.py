"""The low-bit formats, under ipex-llm's names. Standard library only: the server reads this table without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How many inputs share a scale in the formats of fewer than 8 bits, where nothing else is asked for.
GROUP_SIZE = 32
# A layer whose inputs are no multiple of that takes the largest of these that is smaller and divides them.
SMALLER_GROUP_SIZES = (64, 32)

# The 16 levels of QLoRA's 4-bit NormalFloat (Dettmers et al. 2023, appendix E), scaled to the largest of a block.
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def _minifloat_values(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Every value, ascending, of a float without infinity and NaN, such as OCP's E2M1 (fp4) and E3M2 (fp6)."""
    bias = 2 ** (exponent_bits - 1) - 1
    magnitudes = [
        (mantissa / 2**mantissa_bits + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
        for exponent in range(2**exponent_bits)
        for mantissa in range(2**mantissa_bits)
    ]
    return tuple(sorted({*magnitudes, *(-magnitude for magnitude in magnitudes)}))


@dataclass(frozen=True)
class Format:
    """One way to store a linear layer's weight.

    `bits` counts one code, without its share of the scales. `group_size` inputs share a scale in a weight quantized
    without another wish; None means that a whole output channel does. `values` is what each code stands for before the
    scale is applied; None means that the code is a number itself: int8, or one of PyTorch's 8-bit floats. An asymmetric
    format adds a minimum per group. `dtype` is set for the 8-bit floats, and for bf16, fp16 and fp32, which are not
    quantized at all.
    """

    name: str
    bits: int
    kind: Literal["integer", "table", "float8", "dtype"]
    summary: str
    group_size: int | None = None
    symmetric: bool = True
    values: tuple[float, ...] | None = None
    dtype: str | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the kernel for the format reads two codes from a byte. Codes that have none take a byte each."""
        return self.bits == 4

    @property
    def runs_on_xpu(self) -> bool:
        """Whether vLLM's XPU build has a matmul for the format. A CPU runs every format, some without a fast kernel."""
        return self.kind in ("dtype", "float8") or self.name == "sym_int4"


def _integers(bits: int, symmetric: bool) -> tuple[float, ...]:
    lowest = -(2 ** (bits - 1)) if symmetric else 0
    return tuple(float(lowest + code) for code in range(2**bits))


_SCALE = f"one scale per {GROUP_SIZE}"
_SYMMETRIC = f"{{}}-bit integers, {_SCALE}"
_ASYMMETRIC = f"{{}}-bit integers, a scale and a minimum per {GROUP_SIZE}"
_MINIFLOAT = "8-bit floats with {} bits of mantissa, one scale per output channel, or per 64 when quantized on load"

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("sym_int4", 4, "integer", _SYMMETRIC.format(4), GROUP_SIZE, True, _integers(4, True)),
        Format("asym_int4", 4, "integer", _ASYMMETRIC.format(4), GROUP_SIZE, False, _integers(4, False)),
        Format("sym_int5", 5, "integer", _SYMMETRIC.format(5), GROUP_SIZE, True, _integers(5, True)),
        Format("asym_int5", 5, "integer", _ASYMMETRIC.format(5), GROUP_SIZE, False, _integers(5, False)),
        Format(
            "sym_int8", 8, "integer", "8-bit integers, one scale per output channel, or per 32 when quantized on load"
        ),
        Format("fp8_e4m3", 8, "float8", _MINIFLOAT.format(3), dtype="float8_e4m3fn"),
        Format("fp8_e5m2", 8, "float8", _MINIFLOAT.format(2), dtype="float8_e5m2"),
        Format("nf4", 4, "table", f"16 levels for normal distributions, {_SCALE}", GROUP_SIZE, True, NF4_VALUES),
        Format("fp4", 4, "table", f"4-bit floats (E2M1), {_SCALE}", GROUP_SIZE, True, _minifloat_values(2, 1)),
        Format("fp6", 6, "table", f"6-bit floats (E3M2), {_SCALE}", GROUP_SIZE, True, _minifloat_values(3, 2)),
        Format("bf16", 16, "dtype", "not quantized: bfloat16", dtype="bfloat16"),
        Format("fp16", 16, "dtype", "not quantized: float16", dtype="float16"),
        Format("fp32", 32, "dtype", "not quantized: float32", dtype="float32"),
    )
}

ALIASES = {"fp8": "fp8_e4m3"}


def resolve(name: str) -> Format:
    """Return the format called `name`, or the one that it is an alias of; ValueError lists those that exist."""
    row = FORMATS.get(ALIASES.get(name, name))
    if row is None:
        raise ValueError(f"low-bit format {name!r} is unknown; use one of {', '.join([*FORMATS, *ALIASES])}")
    return row


def fitting_group_size(format: Format, in_features: int, group_size: int | None = None) -> int | None:
    """How many of a layer's `in_features` inputs share a scale; None if all of an output channel's do.

    That is `group_size` (0 for all, None for the format's own number) or, where it does not divide the inputs, the next
    smaller one that does. `unsuitable_reason` tells whether there is any.
    """
    wanted = format.group_size if group_size is None else group_size
    if not wanted:
        return None
    sizes = (wanted, *(size for size in SMALLER_GROUP_SIZES if size < wanted))
    return next((size for size in sizes if in_features % size == 0), None)


def unsuitable_reason(
    format: Format, in_features: int, group_size: int | None = None, *, falls_back: bool = True
) -> str | None:
    """Say why a layer with `in_features` inputs cannot have this format, or None if it can.

    The 8-bit formats suit every layer: where no group fits, a whole output channel shares a scale. For the others
    `group_size`, or the format's own, has to divide the inputs, or with `falls_back` a smaller one.
    """
    wanted = format.group_size if group_size is None else group_size
    size = fitting_group_size(format, in_features, group_size)
    if format.bits == 8 or not wanted or size == wanted or (size is not None and falls_back):
        return None
    smallest = min(wanted, *SMALLER_GROUP_SIZES) if falls_back else wanted
    return f"{in_features} inputs are no multiple of the group size {smallest}"
