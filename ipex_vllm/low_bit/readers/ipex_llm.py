"""Reading checkpoints that ipex-llm's `save_low_bit` wrote.

They are PyTorch files whose linear weights are flat uint8 tensors of ggml blocks, row after row, 64 weights to a block:

    sym_int4   float16 scale, 32 bytes                   a byte holds weight i below and weight i + 32 above
    asym_int4  float16 scale, float16 minimum, 32 bytes  likewise
    sym_int8   float32 scale, 64 signed bytes

ipex-llm merges some layers before it saves; they are cut apart again, so names are those of Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ipex_vllm.low_bit.architecture import linear_layers, read_config
from ipex_vllm.low_bit.formats import FORMATS, Format
from ipex_vllm.low_bit.layout import to_tensors
from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.readers.base import ExistingQuantization
from ipex_vllm.low_bit.recipe import Recipe

# The entry of config.json by which ipex-llm's `save_low_bit` names its format.
MARK = "bigdl_transformers_low_bit"
# vLLM's load format for these checkpoints.
LOAD_FORMAT = "ipex_llm_low_bit"
BLOCK = 64
BLOCK_BYTES = {"sym_int4": 34, "asym_int4": 36, "sym_int8": 68}
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def recognises(model_path: str, config: dict[str, Any]) -> ExistingQuantization | None:
    """What the checkpoint is, if ipex-llm wrote it; ValueError if that is in a format that cannot be read."""
    name = config.get(MARK)
    if name is None:
        return None
    if name not in BLOCK_BYTES:
        raise ValueError(f"{model_path} was saved by ipex-llm in {name}; readable are {', '.join(BLOCK_BYTES)}")
    arguments = {"quantization": f"ipex_{name}", "load_format": LOAD_FORMAT}
    return ExistingQuantization(name, f"{name}, saved by ipex-llm", arguments)


def recipe_of(format: Format) -> Recipe:
    """How ipex-llm stores a model: its head like the rest, and in blocks of one size."""
    return Recipe(format, BLOCK, format, falls_back=False)


def decode(blocks: torch.Tensor, format_name: str, in_features: int) -> QuantizedWeight:
    """The weight in `blocks`, flat uint8, of a layer with `in_features` inputs."""
    rows = blocks.view(-1, in_features // BLOCK, BLOCK_BYTES[format_name])
    if format_name == "sym_int8":
        scales = rows[..., :4].contiguous().view(torch.float32).squeeze(-1)
        codes = rows[..., 4:].contiguous().view(torch.int8).flatten(1)
        return QuantizedWeight(FORMATS[format_name], codes, scales)
    terms = rows[..., :-32].contiguous().view(torch.float16)
    codes = torch.cat((rows[..., -32:] & 15, rows[..., -32:] >> 4), dim=-1).flatten(1)
    mins = terms[..., 1].contiguous() if format_name == "asym_int4" else None
    return QuantizedWeight(FORMATS[format_name], codes, terms[..., 0].contiguous(), mins)


def read(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint's tensors under Transformers' names.

    Quantized weights come as `layout.to_tensors` lays them out, their codes untouched. The files are opened as plain
    tensors: one that would run code on loading is refused by PyTorch.
    """
    name = read_config(str(directory))[MARK]
    shapes = linear_layers(directory).shapes
    for file in sorted(directory.glob("pytorch_model*.bin")):
        for key, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
            layer, _, kind = key.rpartition(".")
            parent, _, last = layer.rpartition(".")
            layers = [layer] if layer in shapes else [f"{parent}.{part}" for part in MERGED.get(last, ())]
            if not layers or layers[0] not in shapes:
                yield key, tensor
                continue
            sizes = [shapes[part][0] for part in layers]
            in_features = shapes[layers[0]][1]
            if tensor.dtype != torch.uint8:
                for part, piece in zip(layers, tensor.split(sizes), strict=True):
                    yield f"{part}.{kind}", piece
                continue
            row_bytes = tensor.numel() // sum(sizes)
            for part, piece in zip(layers, tensor.split([size * row_bytes for size in sizes]), strict=True):
                weight = decode(piece, name, in_features)
                for suffix, value in to_tensors(weight).items():
                    yield f"{part}.{suffix}", value
