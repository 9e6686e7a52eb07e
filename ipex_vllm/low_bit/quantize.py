"""Weights to codes and scales, and back. Pure PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ipex_vllm.low_bit.formats import Format, fitting_group_size, unsuitable_reason

# Few enough weights that a step's float32 temporaries stay in the processor's second-level cache.
CHUNK_WEIGHTS = 2**18

# Scale search, symmetric: the scale maps a group's largest weight to the lowest code times one of these. Beyond 1
# the largest weight is clipped, below 1 the lowest codes are given up; 1 itself is ggml's choice. Four candidates
# keep 1.1 B parameters under twenty seconds on two cores; seven lower the squared error by another 0.7 %.
SYMMETRIC_STRETCHES = (9.5 / 8, 8.75 / 8, 1.0, 7.25 / 8)
# Scale search, asymmetric: the codes span this part of a group's range, about its middle.
ASYMMETRIC_SHRINKS = (1.0, 0.93, 0.86, 0.8)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out_features, in_features] as codes of a format.

    `codes` [out, in] holds one code per element: uint8 indices of `format.values`, or int8 or 8-bit floats where that
    is None. `scales` [out, in / group] is float16 for the formats of fewer than 8 bits and float32 for the others,
    [out, 1] if a whole output channel has one; `mins`, of the same shape and dtype, belongs to the asymmetric formats.
    weight = value(code) * scale + min.
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None

    @property
    def group_size(self) -> int | None:
        """How many inputs share a scale; None if all of an output channel's do."""
        groups = self.scales.shape[1]
        return None if groups == 1 and self.format.bits == 8 else self.codes.shape[1] // groups


def quantize(
    weight: torch.Tensor, format: Format, group_size: int | None = None, *, search: bool = True
) -> QuantizedWeight:
    """Quantize `weight` [out_features, in_features], of any float dtype, to `format`.

    `group_size` inputs share a scale (0: all; None: the format's own number), or fewer where it does not divide them.
    With `search`, the 4- and 5-bit integer formats take, per group, the scale of least squared error among a few;
    without it they are rounded as ggml rounds q4_0, q4_1, q5_0 and q5_1 (ipex-llm's sym_int4, asym_int4, sym_int5
    and asym_int5). Raises ValueError for a dtype format, an unsuitable shape, or weights that are not finite or too
    large for the scale.
    """
    if format.kind == "dtype":
        raise ValueError(f"{format.name} is a dtype, not a quantized format")
    if reason := unsuitable_reason(format, weight.shape[1], group_size):
        raise ValueError(f"{format.name} does not fit a weight of shape {tuple(weight.shape)}: {reason}")
    encode = _encoder(format, search)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    groups_per_row = weight.shape[1] // (fitting_group_size(format, weight.shape[1], group_size) or weight.shape[1])
    codes, scales, mins = [], [], []
    for start in range(0, len(weight), rows):
        chunk = weight[start : start + rows]
        chunk_codes, chunk_scales, chunk_mins = encode(chunk.float().reshape(chunk.shape[0] * groups_per_row, -1))
        codes.append(chunk_codes.view(chunk.shape))
        scales.append(chunk_scales.view(chunk.shape[0], groups_per_row))
        if chunk_mins is not None:
            mins.append(chunk_mins.view(chunk.shape[0], groups_per_row))
    quantized = QuantizedWeight(format, torch.cat(codes), torch.cat(scales), torch.cat(mins) if mins else None)
    if not quantized.scales.isfinite().all():
        raise ValueError(f"cannot quantize to {format.name}: a weight is not finite, or too large for the scale")
    return quantized


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight [out_features, in_features] that the codes stand for; computed in float32, then cast."""
    result = torch.empty(weight.codes.shape, dtype=dtype, device=weight.codes.device)
    rows = max(1, CHUNK_WEIGHTS // weight.codes.shape[1])
    for start in range(0, len(result), rows):
        part = slice(start, start + rows)
        grouped = _numbers(weight.codes[part], weight.format).view(*weight.scales[part].shape, -1)
        grouped *= weight.scales[part].float().unsqueeze(-1)
        if weight.mins is not None:
            grouped += weight.mins[part].float().unsqueeze(-1)
        result[part] = grouped.flatten(1)
    return result


def _numbers(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """What the codes stand for before the scale is applied, in float32."""
    if format.kind == "table":
        # Three times as fast as indexing, which does not know that the table has one dimension.
        table = torch.tensor(format.values, device=codes.device)
        return table.index_select(0, codes.flatten().int()).view(codes.shape)
    if format.values is not None:
        return codes.float().add_(format.values[0])
    if format.kind == "float8":
        return _float8_numbers(codes)
    return codes.float()


def _float8_numbers(codes: torch.Tensor) -> torch.Tensor:
    """`codes.float()`, eight times as fast: PyTorch converts 8-bit floats one by one, and 16-bit ones in vectors.

    Moved to its place in a float16, an e5m2 code is the same number, and an e4m3 code is 2^-8 of it (the exponents'
    biases are 7 and 15). Codes that are not numbers do not occur in a quantized weight.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    if codes.dtype == torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float()
    # The sign was extended into the bit below its own, which belongs to the exponent.
    numbers = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14)).view(torch.float16).float()
    return numbers.mul_(2.0**8)


def pack_nibbles(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack 4-bit codes [rows, columns] into int32 [rows, columns / 8], column `order[i]` in the i-th lowest nibble."""
    nibbles = codes.reshape(len(codes), -1, 8)[:, :, list(order)]
    even, odd = nibbles[..., 0::2], nibbles[..., 1::2]
    return (even | odd << 4).contiguous().view(torch.int32).squeeze(-1)


def unpack_nibbles(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles` in its default order: uint8 codes [rows, columns]."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


_Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _encoder(format: Format, search: bool) -> Callable[[torch.Tensor], _Encoded]:
    """The function from groups [n, group] to codes [n, group], scales [n, 1] and minimums [n, 1] or None."""
    if format.kind == "float8":
        return partial(_encode_float8, dtype=getattr(torch, str(format.dtype)))
    if format.kind == "table":
        assert format.values is not None
        return partial(_encode_table, values=format.values)
    if format.bits == 8:
        return _encode_int8
    if format.symmetric:
        return partial(_encode_symmetric, half=2 ** (format.bits - 1), search=search)
    return partial(_encode_asymmetric, highest=2**format.bits - 1, search=search)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    # A denormal scale has no finite inverse; its group becomes zeros.
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 0, 1 / scales)


def _round(groups: torch.Tensor, inverse: torch.Tensor, zero: float, highest: int) -> torch.Tensor:
    """Codes, as float32, of the values nearest to `groups`; ties go up, as in ggml's `(int)(x / d + 8.5)`."""
    return torch.mul(groups, inverse).add_(zero + 0.5).float().floor_().clamp_(0, highest)


def _fused(groups: torch.Tensor) -> torch.Tensor:
    """Groups whose `_round` rounds once where it multiplies and adds: ggml is compiled to fused multiply-adds."""
    return groups.double()


def _encode_symmetric(groups: torch.Tensor, *, half: int, search: bool) -> _Encoded:
    """ggml's q4_0 and q5_0: the weight of largest magnitude, with its sign, becomes code 0, which stands for -half."""
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scales = extreme / -half
    if search:
        inverse = _inverse(scales)
        most, scales = torch.full_like(scales, -1.0), extreme * 0  # NaN stays NaN, to be refused
        for stretch in SYMMETRIC_STRETCHES:
            numbers = _round(groups, inverse * stretch, half, 2 * half - 1).sub_(half)
            dot, square = _dot(numbers, groups), _dot(numbers, numbers)
            # For fixed codes the best scale is dot / square, and dot^2 / square is what it takes off the squared error.
            best = dot / square.clamp_min(1e-30)
            better = dot * best > most
            most, scales = torch.where(better, dot * best, most), torch.where(better, best, scales)
        scales = scales.half().float()
    codes = _round(groups if search else _fused(groups), _inverse(scales), half, 2 * half - 1)
    return codes.to(torch.uint8), scales.half(), None


def _encode_asymmetric(groups: torch.Tensor, *, highest: int, search: bool) -> _Encoded:
    """ggml's q4_1 and q5_1: code 0 stands for the smallest weight, the highest code for the largest."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    scales, mins = (high - low) / highest, low
    if search:
        total, count = groups.sum(1, keepdim=True), groups.shape[1]
        most = torch.full_like(low, -1.0)
        for shrink in ASYMMETRIC_SHRINKS:
            step = (high - low) * (shrink / highest)
            start = (high + low) / 2 - step * (highest / 2)
            codes = _round(groups - start, _inverse(step), 0, highest)
            # Least squares of weight on code: slope and intercept, and the part of the squares that they explain.
            codes_total, dot = codes.sum(1, keepdim=True), _dot(codes, groups)
            spread = (count * _dot(codes, codes) - codes_total * codes_total).clamp_min(1e-30)
            slope = (count * dot - codes_total * total) / spread
            intercept = (total - slope * codes_total) / count
            explained = slope * dot + intercept * total
            better = explained > most
            most = torch.where(better, explained, most)
            scales, mins = torch.where(better, slope, scales), torch.where(better, intercept, mins)
        scales, mins = scales.half().float(), mins.half().float()
    above = groups - mins
    codes = _round(above if search else _fused(above), _inverse(scales), 0, highest)
    return codes.to(torch.uint8), scales.half(), mins.half()


def _encode_int8(groups: torch.Tensor) -> _Encoded:
    scales = groups.abs().amax(1, keepdim=True) / 127
    return torch.mul(groups, _inverse(scales)).round_().to(torch.int8), scales, None


def _encode_float8(groups: torch.Tensor, *, dtype: torch.dtype) -> _Encoded:
    scales = groups.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
    return torch.mul(groups, _inverse(scales)).to(dtype), scales, None


def _encode_table(groups: torch.Tensor, *, values: tuple[float, ...]) -> _Encoded:
    levels = torch.tensor(values, device=groups.device)
    scales = (groups.abs().amax(1, keepdim=True) / levels[-1]).half()
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(groups * _inverse(scales.float()), midpoints, out_int32=True)
    return codes.to(torch.uint8), scales, None


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.linalg.vecdot(left, right)
    return product.unsqueeze(1)
