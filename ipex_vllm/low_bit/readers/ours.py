"""Reading checkpoints that `save` wrote."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ipex_vllm.low_bit.formats import resolve
from ipex_vllm.low_bit.readers.base import ExistingQuantization
from ipex_vllm.low_bit.recipe import NONE, Recipe
from ipex_vllm.machine.checkpoint import weight_files

# The entry of config.json's `quantization_config` that marks a checkpoint as written here.
MARK = "ipex_vllm_format"
# Beside it, the other parts of the recipe: a number (absent: 64, and no layer fell back to less), a format's name or
# "none" (absent: the format of the other layers), and where the outer layers have their own, that and their number.
GROUP_SIZE, HEAD = "ipex_vllm_group_size", "ipex_vllm_head"
OUTER, NUM_LAYERS = "ipex_vllm_outer", "ipex_vllm_num_layers"
# Whether the experts are quantized in the file, or when it is opened (absent).
EXPERTS = "ipex_vllm_experts"


def recognises(model_path: str, config: dict[str, Any]) -> ExistingQuantization | None:
    """What the checkpoint is, if it was written here."""
    name = (config.get("quantization_config") or {}).get(MARK)
    return ExistingQuantization(name, name, {"quantization": f"ipex_{name}"}) if name else None


def mark(recipe: Recipe) -> dict[str, Any]:
    """The entries of `quantization_config` that say how a checkpoint was written."""
    format, head = recipe.format, recipe.head
    group_size = format.group_size if recipe.group_size is None else recipe.group_size
    entries = {MARK: format.name, GROUP_SIZE: group_size or 0, HEAD: head.name if head is not None else NONE}
    return entries | ({OUTER: recipe.outer.name, NUM_LAYERS: recipe.num_layers} if recipe.outer is not None else {})


def recipe_of(quantization: dict[str, Any]) -> Recipe:
    """The recipe that a checkpoint with this `quantization_config` was written by: the inverse of `mark`."""
    format = resolve(quantization[MARK])
    head = quantization.get(HEAD, format.name)
    return Recipe(
        format,
        quantization.get(GROUP_SIZE, 64 if format.bits < 8 else 0),
        None if head == NONE else resolve(head),
        outer=resolve(quantization[OUTER]) if OUTER in quantization else None,
        num_layers=quantization.get(NUM_LAYERS, 0),
        falls_back=GROUP_SIZE in quantization,
    )


def read(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the checkpoint, or of any other that is not quantized, one at a time."""
    for file in weight_files(directory):
        yield from tensors_of(file)


def tensors_of(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of one file, by name; of a `.bin` as plain tensors, so one that would run code is refused."""
    if file.suffix == ".bin":
        try:
            yield from torch.load(file, map_location="cpu", weights_only=True).items()
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is cut off, or holds more than tensors: it is not opened") from error
        return
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            yield name, tensors.get_tensor(name)
