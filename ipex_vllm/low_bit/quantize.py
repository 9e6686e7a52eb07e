"""Weights to codes and scales, and back. Pure PyTorch, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ipex_vllm.low_bit.formats import Format, fitting_group_size, unsuitable_reason
from ipex_vllm.low_bit.rounding import CHUNK_WEIGHTS, encoder, input_scales

# What every input counts for, as a part of the layer's mean importance: one that a few tokens left at zero may be used
# by others.
IMPORTANCE_FLOOR = 1e-3


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out_features, in_features] as codes of a format.

    `codes` [out, in] holds one code per element: uint8 indices of `format.values`, or int8 or 8-bit floats where that
    is None. `scales` [out, in / group] is float16 for the formats of fewer than 8 bits and float32 for the others,
    [out, 1] if a whole output channel has one; `mins`, of the same shape and dtype, belongs to the asymmetric formats.
    `input_scales`, float32 [in], multiply the inputs before they meet the weight; None means 1.
    weight = (value(code) * scale + min) * input scale.
    """

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None = None
    input_scales: torch.Tensor | None = None

    @property
    def group_size(self) -> int | None:
        """How many inputs share a scale; None if all of an output channel's do."""
        groups = self.scales.shape[1]
        return None if groups == 1 and self.format.bits == 8 else self.codes.shape[1] // groups


def quantize(
    weight: torch.Tensor,
    format: Format,
    group_size: int | None = None,
    importance: torch.Tensor | None = None,
    *,
    search: bool = True,
    scales_inputs: bool = False,
) -> QuantizedWeight:
    """Quantize `weight` [out_features, in_features], of any float dtype, to `format`.

    `group_size` inputs share a scale (0: all; None: the format's own number), or fewer where it does not divide them.
    The scale is the one of least squared error among a few, each input weighed by its `importance` [in_features]
    (`importance.py`). Without `search` there is one candidate: weights are rounded as ggml rounds q4_0, q4_1, q5_0 and
    q5_1 (ipex-llm's sym_int4, asym_int4, sym_int5 and asym_int5). With `scales_inputs` and an importance,
    integers of fewer than 8 bits also get `input_scales`. Raises ValueError for a dtype format, an unsuitable shape, or
    weights that are not finite or too large for the scale.
    """
    if format.kind == "dtype":
        raise ValueError(f"{format.name} is a dtype, not a quantized format")
    if reason := unsuitable_reason(format, weight.shape[1], group_size):
        raise ValueError(f"{format.name} does not fit a weight of shape {tuple(weight.shape)}: {reason}")
    encode = encoder(format, search)
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    size = fitting_group_size(format, weight.shape[1], group_size) or weight.shape[1]
    if importance is not None:
        importance = importance + importance.mean() * IMPORTANCE_FLOOR
    columns = None
    # The levels of tables and of floats are closer where weights are small, which is what the scales would be for.
    if scales_inputs and importance is not None and format.kind == "integer" and format.bits < 8:
        columns = input_scales(weight, importance)
        importance = importance * columns.square()
    grouped_importance = None if importance is None else importance.view(-1, size)
    codes, scales, mins = [], [], []
    for start in range(0, len(weight), rows):
        chunk = weight[start : start + rows].float().contiguous()
        if columns is not None:
            chunk = chunk / columns
        chunk_codes, chunk_scales, chunk_mins = encode(chunk.reshape(len(chunk), -1, size), grouped_importance)
        codes.append(chunk_codes.flatten(1))
        scales.append(chunk_scales.flatten(1))
        if chunk_mins is not None:
            mins.append(chunk_mins.flatten(1))
    quantized = QuantizedWeight(format, torch.cat(codes), torch.cat(scales), torch.cat(mins) if mins else None, columns)
    if not quantized.scales.isfinite().all():
        raise ValueError(f"cannot quantize to {format.name}: a weight is not finite, or too large for the scale")
    return quantized


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the weight [out_features, in_features] that the codes stand for; computed in float32, then cast."""
    result = torch.empty(weight.codes.shape, dtype=dtype, device=weight.codes.device)
    rows = max(1, CHUNK_WEIGHTS // weight.codes.shape[1])
    for start in range(0, len(result), rows):
        part = slice(start, start + rows)
        grouped = numbers(weight.codes[part], weight.format).view(*weight.scales[part].shape, -1)
        grouped *= weight.scales[part].float().unsqueeze(-1)
        if weight.mins is not None:
            grouped += weight.mins[part].float().unsqueeze(-1)
        rounded = grouped.flatten(1)
        result[part] = rounded if weight.input_scales is None else rounded * weight.input_scales
    return result


def numbers(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """What the codes stand for before the scale is applied, in float32."""
    if format.kind == "table":
        # Three times as fast as indexing, which does not know that the table has one dimension.
        table = torch.tensor(format.values, dtype=torch.float32, device=codes.device)
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
