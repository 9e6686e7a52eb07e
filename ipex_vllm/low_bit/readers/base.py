"""What a reader of checkpoints is, and what it says of one that it recognises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class ExistingQuantization:
    """How a checkpoint is quantized. `format_name` is None if that is none of ours, or several."""

    format_name: str | None
    description: str
    vllm_arguments: dict[str, Any] = field(default_factory=dict)
    runs_on_xpu: bool = True


class Reader(Protocol):
    """A module that reads one way of storing quantized weights."""

    def recognises(self, model_path: str, config: dict[str, Any]) -> ExistingQuantization | None:
        """What the checkpoint with this config.json is; None if it is for another reader.

        Raises ValueError if it is for this one and cannot be read.
        """

    def read(self, directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield its tensors, one at a time, under Transformers' names; quantized ones as `layout` lays them out."""
