"""The tensors that stand for a quantized weight in a checkpoint: their names, shapes and dtypes."""

from __future__ import annotations

import torch

from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.quantize import QuantizedWeight, pack_nibbles, unpack_nibbles
from ipex_vllm.low_bit.recipe import Storage


def to_tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors that stand for a linear layer's weight in a checkpoint, by the ends of their names.

    4-bit codes are packed as compressed-tensors' "pack-quantized" wants them: `weight_packed` int32 [out, in / 8],
    `weight_scale` [out, in / group] and `weight_shape` [2]; wider codes are `weight` [out, in] and `weight_scale`.
    """
    if weight.format.bits == 4:
        tensors = {"weight_packed": pack_nibbles(weight.codes), "weight_shape": torch.tensor(weight.codes.shape)}
    else:
        tensors = {"weight": weight.codes}
    tensors["weight_scale"] = weight.scales
    if weight.mins is not None:
        tensors["weight_min"] = weight.mins
    return tensors


def from_tensors(format: Format, tensors: dict[str, torch.Tensor]) -> QuantizedWeight:
    """The inverse of `to_tensors`."""
    codes = unpack_nibbles(tensors["weight_packed"]) if format.bits == 4 else tensors["weight"]
    return QuantizedWeight(format, codes, tensors["weight_scale"], tensors.get("weight_min"))


def meta_tensors(storage: Storage, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    """Tensors on the meta device, shaped and typed as `to_tensors` makes them for such a layer."""
    format = storage.format
    with torch.device("meta"):
        groups = in_features // (storage.group_size or in_features)
        scales = torch.empty((out_features, groups), dtype=torch.float32 if format.bits == 8 else torch.float16)
        shape = (out_features, in_features)
        if format.bits == 4:
            codes = {"weight_packed": torch.empty((out_features, in_features // 8), dtype=torch.int32)}
            codes["weight_shape"] = torch.empty(2, dtype=torch.int64)
        elif format.values is not None:
            codes = {"weight": torch.empty(shape, dtype=torch.uint8)}
        else:
            codes = {"weight": torch.empty(shape, dtype=getattr(torch, format.dtype or "int8"))}
    return codes | {"weight_scale": scales} | ({} if format.symmetric else {"weight_min": scales})
