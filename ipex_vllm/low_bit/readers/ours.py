"""Reading checkpoints that `save` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ipex_vllm.low_bit.readers.base import ExistingQuantization

# The entry of config.json's `quantization_config` that marks a checkpoint as written here.
MARK = "ipex_vllm_format"


def recognises(model_path: str, config: dict[str, Any]) -> ExistingQuantization | None:
    """What the checkpoint is, if it was written here."""
    name = (config.get("quantization_config") or {}).get(MARK)
    return ExistingQuantization(name, name, {"quantization": f"ipex_{name}"}) if name else None


def read(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the checkpoint, or of any other in safetensors files, one at a time."""
    for file in sorted(directory.glob("*.safetensors")):
        yield from tensors_of(file)


def tensors_of(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of one safetensors file, by name."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            yield name, tensors.get_tensor(name)
