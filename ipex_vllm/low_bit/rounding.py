"""Groups of weights to codes and scales: the arithmetic of each kind of format.

Groups are float32 [rows, groups, group size]. A search takes, for each group, the scale with the least squared error
among a few, in which an input's share is weighed by its importance (`importance.py`): that is what keeps a model's
answers. Unweighted, the search loses to plain rounding on real models (docs/negative-results.md), so where the
importance is not known, a weight's own size takes its place.

Integers are searched by an operator, `ipex_vllm::round_integers`: on x86 CPUs the package's C++ library has it
(`csrc/rounding/`), everywhere else it is what stands here, in PyTorch. Both do the same operations, but PyTorch adds in
an order of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ipex_vllm.low_bit import native  # noqa: F401  (the library's operators are there once this is imported)
from ipex_vllm.low_bit.formats import Format

Encoded = tuple[Tensor, Tensor, Tensor | None]
Encoder = Callable[[Tensor, Tensor | None], Encoded]

# Few enough weights that a step's float32 temporaries stay in the processor's second-level cache.
CHUNK_WEIGHTS = 2**18

# What the search tries, by a format's bits. Symmetric, with codes from -half: the scale maps a group's largest weight
# to -half times one of these. Beyond 1 the largest weight is clipped, below 1 the lowest codes are given up; 1 itself
# is ggml's choice.
STRETCHES = {
    4: (9.5 / 8, 8.75 / 8, 1.0, 7.25 / 8),
    5: (17.5 / 16, 16.75 / 16, 1.0, 15.25 / 16),
    8: (1.0, 127.3 / 128, 126.6 / 128, 125 / 128),
}
# Asymmetric: the codes span this part of a group's range, about its middle.
SHRINKS = (1.0, 0.93, 0.86, 0.8)
# 8-bit floats and tables: the largest weight becomes the largest number times one of these.
FLOAT8_STRETCHES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
TABLE_STRETCHES = (1.0, 1.1, 0.93, 0.86)

# Columns are divided by rms(input)^-0.25 x std(column)^0.5 before they are rounded, which evens out both the errors'
# weights and the columns of a group; the exponents are those of the least divergence among a few (docs/low-bit.md).
INPUT_EXPONENT, COLUMN_EXPONENT = -0.25, 0.5


def input_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """Float32 [in_features]: what the inputs of `weight` [out_features, in_features] are multiplied by, and its columns
    divided by. `importance` [in_features], all above zero."""
    columns = column_deviations(weight)
    scales = importance.sqrt().pow(INPUT_EXPONENT) * columns.clamp_min(1e-3 * columns.mean()).pow(COLUMN_EXPONENT)
    # A mean of 1 keeps the weights' scales in float16's range; a layer of zeros has no scale of its own.
    scales = scales / scales.log().mean().exp()
    return torch.where(scales.isfinite(), scales, 1.0)


def column_deviations(weight: Tensor) -> Tensor:
    """The standard deviation of each column of `weight` [out_features, in_features], float32 [in_features].

    Ten times as fast as `Tensor.std`, which goes through a matrix column by column.
    """
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    squares = total.clone()
    for part in torch.split(weight, max(1, CHUNK_WEIGHTS // weight.shape[1])):
        values = part.float()
        total += values.sum(0)
        squares += values.square().sum(0)
    variance = squares / len(weight) - (total / len(weight)).square()
    return variance.clamp_min_(0).sqrt_().float()


def encoder(format: Format, search: bool) -> Encoder:
    """The function from groups [rows, groups, size], and the importance [groups, size] of their inputs or None, to
    codes [rows, groups, size], scales [rows, groups, 1] and minimums [rows, groups, 1] or None."""
    if format.kind == "float8":
        return partial(_float8, dtype=getattr(torch, str(format.dtype)), search=search)
    if format.kind == "table":
        assert format.values is not None
        return partial(_table, values=format.values, search=search)
    if search:
        return partial(_searched, bits=format.bits, symmetric=format.symmetric)
    return partial(_integers, bits=format.bits, symmetric=format.symmetric)


def _searched(groups: Tensor, importance: Tensor | None, *, bits: int, symmetric: bool) -> Encoded:
    operator = torch.ops.ipex_vllm.round_integers.default
    codes, scales, mins = operator(groups, importance, tried(bits, symmetric), bits, symmetric)
    return codes, scales, None if symmetric else mins


def tried(bits: int, symmetric: bool) -> Tensor:
    """What the search tries, float32: divisors of the first scale or, where codes are asymmetric, a step's parts of the
    range."""
    parts = STRETCHES[bits] if symmetric else [part / (2**bits - 1) for part in SHRINKS]
    return torch.tensor(parts, dtype=torch.float32, device="cpu")


torch.library.define(
    "ipex_vllm::round_integers",
    "(Tensor groups, Tensor? importance, Tensor tried, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)",
)


def round_integers(
    groups: Tensor, importance: Tensor | None, candidates: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, in PyTorch: as an `Encoder`, but its third result is empty where there are no minimums."""
    codes, scales, mins = _integers(groups, importance, candidates.tolist(), bits=bits, symmetric=symmetric)
    return codes, scales, scales.new_empty(0) if mins is None else mins


torch.library.impl("ipex_vllm::round_integers", "default", round_integers)


def _integers(
    groups: Tensor, importance: Tensor | None, tried: Sequence[float] = (), *, bits: int, symmetric: bool
) -> Encoded:
    if not symmetric:
        return _asymmetric(groups, importance, tried, highest=2**bits - 1)
    return _int8(groups, importance, tried) if bits == 8 else _symmetric(groups, importance, tried, bits=bits)


def _inverse(scales: Tensor) -> Tensor:
    # A denormal scale has no finite inverse; its group becomes zeros.
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 0, 1 / scales)


def _round(groups: Tensor, inverse: Tensor, zero: float, highest: int) -> Tensor:
    """Codes, as float32, of the values nearest to `groups`; ties go up, as in ggml's `(int)(x / d + 8.5)`."""
    return torch.mul(groups, inverse).add_(zero + 0.5).float().floor_().clamp_(0, highest)


def _fused(groups: Tensor) -> Tensor:
    """Groups whose `_round` rounds once where it multiplies and adds: ggml is compiled to fused multiply-adds."""
    return groups.double()


def _weights(groups: Tensor, importance: Tensor | None) -> Tensor:
    """What a squared error counts for: its input's importance or, unknown, what ggml takes (rms + |x|)."""
    if importance is not None:
        return importance
    squares = _sum(groups.square()) / groups.shape[-1]
    # MKL's root of a float32 is not always the nearest one.
    return squares.double().sqrt_().float() + groups.abs()


def _extreme(groups: Tensor) -> Tensor:
    """The weight of largest magnitude of each group, with its sign."""
    return groups.gather(-1, groups.abs().argmax(-1, keepdim=True))


def _best_scale(
    groups: Tensor, weights: Tensor, candidates: list[Tensor], number: Callable[[Tensor], Tensor]
) -> Tensor:
    """The scale of least weighted squared error: for the codes of each candidate, least squares; then the best of them.

    `number(inverse)` is what the groups' codes stand for at a scale of 1 / `inverse`.
    """
    weighted = groups * weights
    most = torch.full_like(candidates[0], -1.0)
    scales = candidates[0]  # NaN stays NaN, to be refused, and so does what is too large to be squared
    for candidate in candidates:
        numbers = number(_inverse(candidate))
        dot, square = _sum(numbers * weighted), _sum(numbers * (numbers * weights))
        # For fixed codes the best scale is dot / square, and dot^2 / square is what it takes off the squared error.
        best = dot / square.clamp_min(1e-30)
        better = dot * best > most
        most, scales = torch.where(better, dot * best, most), torch.where(better, best, scales)
    return scales


def _symmetric(groups: Tensor, importance: Tensor | None, tried: Sequence[float], *, bits: int) -> Encoded:
    """ggml's q4_0 and q5_0: the weight of largest magnitude, with its sign, becomes code 0, which stands for -half."""
    half, highest = 2 ** (bits - 1), 2**bits - 1
    scales = _extreme(groups) / -half
    if tried:
        candidates = [scales / stretch for stretch in tried]
        scales = _best_scale(
            groups,
            _weights(groups, importance),
            candidates,
            lambda inverse: _round(groups, inverse, half, highest).sub_(half),
        )
        scales = scales.half().float()
    codes = _round(groups if tried else _fused(groups), _inverse(scales), half, highest)
    return codes.to(torch.uint8), scales.half(), None


def _asymmetric(groups: Tensor, importance: Tensor | None, tried: Sequence[float], *, highest: int) -> Encoded:
    """ggml's q4_1 and q5_1: code 0 stands for the smallest weight, the highest code for the largest."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales, mins = (high - low) / highest, low
    if tried:
        weights = _weights(groups, importance).expand_as(groups)
        weighted = groups * weights
        total, count = _sum(weighted), _sum(weights).clamp_min(1e-30)
        most = torch.full_like(low, -1.0)
        for part in tried:
            step = (high - low) * part
            start = (high + low) / 2 - step * (highest / 2)
            codes = _round(groups - start, _inverse(step), 0, highest)
            # Least squares of weight on code: slope and intercept, and the part of the squares that they explain.
            heavy = codes * weights
            codes_total, dot = _sum(heavy), _sum(codes * weighted)
            spread = (count * _sum(codes * heavy) - codes_total * codes_total).clamp_min(1e-30)
            slope = (count * dot - codes_total * total) / spread
            intercept = (total - slope * codes_total) / count
            explained = slope * dot + intercept * total
            better = explained > most
            most = torch.where(better, explained, most)
            scales, mins = torch.where(better, slope, scales), torch.where(better, intercept, mins)
        scales, mins = scales.half().float(), mins.half().float()
    above = groups - mins
    codes = _round(above if tried else _fused(above), _inverse(scales), 0, highest)
    return codes.to(torch.uint8), scales.half(), mins.half()


def _int8(groups: Tensor, importance: Tensor | None, tried: Sequence[float]) -> Encoded:
    if not tried:
        scales = groups.abs().amax(-1, keepdim=True) / 127
        return torch.mul(groups, _inverse(scales)).round_().to(torch.int8), scales, None

    def number(inverse: Tensor) -> Tensor:
        return torch.mul(groups, inverse).round_().clamp_(-128, 127)

    first = _extreme(groups) / -128
    scales = _best_scale(groups, _weights(groups, importance), [first / stretch for stretch in tried], number)
    return number(_inverse(scales)).to(torch.int8), scales, None


def _float8(groups: Tensor, importance: Tensor | None, *, dtype: torch.dtype, search: bool) -> Encoded:
    largest = torch.finfo(dtype).max
    scales = groups.abs().amax(-1, keepdim=True) / largest
    if search:
        candidates = [scales * stretch for stretch in FLOAT8_STRETCHES]
        scales = _best_scale(
            groups,
            _weights(groups, importance),
            candidates,
            lambda inverse: nearest_float8(torch.mul(groups, inverse).clamp_(-largest, largest), dtype),
        )
    codes = torch.mul(groups, _inverse(scales)).clamp_(-largest, largest).to(dtype)
    return codes, scales, None


def nearest_float8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values.to(dtype).float()`, many times as fast: PyTorch converts 8-bit floats one by one."""
    limits = torch.finfo(dtype)
    dropped = 23 - int(-math.log2(limits.eps))  # bits of float32's mantissa
    bits = values.view(torch.int32)
    odd = bits.bitwise_right_shift(dropped).bitwise_and_(1)
    rounded = odd.add_(bits).add_((1 << (dropped - 1)) - 1).bitwise_and_(-1 << dropped).view(torch.float32)
    step = limits.smallest_normal * limits.eps  # between numbers below the smallest normal one
    return torch.where(values.abs() < limits.smallest_normal, (values / step).round_().mul_(step), rounded)


def _table(groups: Tensor, importance: Tensor | None, *, values: tuple[float, ...], search: bool) -> Encoded:
    levels = torch.tensor(values, dtype=torch.float32, device=groups.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    scales = groups.abs().amax(-1, keepdim=True) / levels[-1]

    def codes(inverse: Tensor) -> Tensor:
        return torch.bucketize(groups * inverse, midpoints, out_int32=True)

    if search:
        scales = _best_scale(
            groups,
            _weights(groups, importance),
            [scales * stretch for stretch in TABLE_STRETCHES],
            lambda inverse: levels.index_select(0, codes(inverse).flatten()).view(groups.shape),
        )
    scales = scales.half()
    return codes(_inverse(scales.float())).to(torch.uint8), scales, None


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)
