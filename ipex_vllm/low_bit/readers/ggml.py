"""ggml's blocks as weights of our formats.

    q4_0                    sym_int4 in groups of 32        its codes and scales as they are
    q4_1, q4_k              asym_int4 in groups of 32       its codes; q4_k's scale of a group is a product, rounded to
                                                            float16
    mxfp4                   fp4 in groups of 32             its codes, in the order of our table
    q8_0, q5_0, iq4_nl      sym_int8 in groups of 32        its codes, or the whole numbers that they stand for
    q5_k, q6_k, q5_1,       sym_int8 in groups of 32        rounded to the nearest of 255 steps, a quarter of their own
    q2_k, q3_k, iq4_xs                                      or less
    bf16, f16, f32          not quantized

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.quantize import QuantizedWeight, quantize
from ipex_vllm.low_bit.quantize import dequantize as dequantize_weight
from ipex_vllm.low_bit.readers import mxfp4
from ipex_vllm.low_bit.rounding import CHUNK_WEIGHTS

GROUP = 32
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# ggml's numbers of the types that are read through Transformers.
ROUNDED = {"q2_k": 10, "q3_k": 11, "q5_k": 13, "q6_k": 14, "iq4_xs": 23}
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def format_of(kind: str) -> str:
    """The name of the format that blocks of this type become, or "none" where they are not quantized."""
    if kind in FLOATS:
        return "none"
    return {"q4_0": "sym_int4", "q4_1": "asym_int4", "q4_k": "asym_int4", "mxfp4": "fp4"}.get(kind, "sym_int8")


def decode(kind: str, rows: torch.Tensor) -> torch.Tensor | QuantizedWeight:
    """The weight in `rows`, uint8 [out_features, bytes of a row], of ggml's type `kind`.

    A tensor [out_features, in_features] where that is a float type, over the same memory.
    """
    if kind in FLOATS:
        return rows.view(FLOATS[kind])
    if kind in EXACT:
        return EXACT[kind](rows)
    return _rounded(kind, rows)


def _weight(
    format_name: str, codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None = None
) -> QuantizedWeight:
    num_rows = len(codes)
    terms = [None if term is None else term.reshape(num_rows, -1).contiguous() for term in (scales, mins)]
    assert terms[0] is not None
    return QuantizedWeight(FORMATS[format_name], codes.reshape(num_rows, -1), terms[0], terms[1])


def _blocks(rows: torch.Tensor, num_bytes: int) -> torch.Tensor:
    return rows.reshape(len(rows), -1, num_bytes)


def _halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 at the byte `start` of each block, [out, blocks]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """All low nibbles of a block, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _q4_0(rows: torch.Tensor) -> QuantizedWeight:
    blocks = _blocks(rows, 18)
    return _weight("sym_int4", _nibbles(blocks[..., 2:]), _halves(blocks, 0))


def _q4_1(rows: torch.Tensor) -> QuantizedWeight:
    blocks = _blocks(rows, 20)
    return _weight("asym_int4", _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _q4_k(rows: torch.Tensor) -> QuantizedWeight:
    blocks = _blocks(rows, 144)
    packed = blocks[..., 4:16]
    low, high, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((low & 63, (rest & 15) | (low >> 6) << 4), dim=-1)
    mins = torch.cat((high & 63, rest >> 4 | (high >> 6) << 4), dim=-1)
    # 64 weights lie in 32 bytes: 32 of them below, the next 32 above.
    codes = _nibbles(blocks[..., 16:].reshape(len(rows), -1, 4, GROUP))
    return _weight(
        "asym_int4",
        codes,
        (_halves(blocks, 0).float().unsqueeze(-1) * scales).half(),
        (_halves(blocks, 2).float().unsqueeze(-1) * mins).neg().half(),
    )


def _q8_0(rows: torch.Tensor) -> QuantizedWeight:
    blocks = _blocks(rows, 34)
    return _weight("sym_int8", blocks[..., 2:].view(torch.int8), _halves(blocks, 0).float())


def _fifth_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The bits of the four bytes at `start`, 16 for the value of that bit in a code: uint8 [out, blocks, 32]."""
    bits = blocks[..., start : start + 4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)
    return (bits.flatten(-2) & 1) << 4


def _q5_0(rows: torch.Tensor) -> QuantizedWeight:
    blocks = _blocks(rows, 22)
    codes = (_nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2)).view(torch.int8) - 16
    return _weight("sym_int8", codes, _halves(blocks, 0).float())


def _levels(levels: tuple[int, ...], packed: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(packed)
    return torch.tensor(levels, dtype=torch.int8).index_select(0, codes.flatten().int()).view(codes.shape)


def _iq4_nl(rows: torch.Tensor) -> QuantizedWeight:
    blocks = _blocks(rows, 18)
    return _weight("sym_int8", _levels(IQ4_NL_LEVELS, blocks[..., 2:]), _halves(blocks, 0).float())


def _mxfp4(rows: torch.Tensor) -> QuantizedWeight:
    blocks = _blocks(rows, 17)
    return mxfp4.quantized(_nibbles(blocks[..., 1:]).flatten(1), blocks[..., 0])


EXACT: dict[str, Callable[[torch.Tensor], QuantizedWeight]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q5_0": _q5_0,
    "q8_0": _q8_0,
    "iq4_nl": _iq4_nl,
    "mxfp4": _mxfp4,
}


def _rounded(kind: str, rows: torch.Tensor) -> QuantizedWeight:
    """Written out in float32 a few rows at a time, and rounded to the nearest."""
    parts = []
    step = max(1, CHUNK_WEIGHTS // rows.shape[1])
    for start in range(0, len(rows), step):
        floats = dequantize(kind, rows[start : start + step])
        parts.append(quantize(floats, FORMATS["sym_int8"], GROUP, search=False))
    return QuantizedWeight(
        FORMATS["sym_int8"], torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
    )


def dequantize(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """The weight in `rows`, as `decode` takes them, in float32."""
    if kind in FLOATS:
        return rows.view(FLOATS[kind]).float()
    if kind == "q5_1":
        blocks = _blocks(rows, 24)
        codes = (_nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4)).float()
        scales, mins = (_halves(blocks, start).float().unsqueeze(-1) for start in (0, 2))
        return (codes * scales + mins).flatten(1)
    if kind in ROUNDED:
        from transformers.integrations.gguf import dequant

        floats: torch.Tensor = dequant.dequantize(rows.flatten(), ROUNDED[kind])
        return floats.view(len(rows), -1)
    return dequantize_weight(EXACT[kind](rows))
