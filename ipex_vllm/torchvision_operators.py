"""Lets PyPI's torchvision be imported beside PyTorch's CPU build.

PyPI has torchvision for CUDA alone. Its library of operators does not load without CUDA's, which torchvision takes in
its stride, but for two operators that it describes to PyTorch without asking whether they are there
(`operator torchvision::nms does not exist`). Image processors call neither, so the two names are all it needs.

Our programs have this with the package (`ipex_vllm/__init__.py`); all others in the environment that `make` sets up,
vLLM's own and FastChat's, from a line there that Python runs at its start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

DESCRIBING = "torchvision._meta_registrations"
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DefineBeforeImport:
    """Finds no module; is asked for each, and defines what is missing before the one that describes it is imported."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == DESCRIBING:
            define_missing()


def define_missing() -> None:
    import torch
    from torchvision.extension import _has_ops

    for operator in OPERATORS:
        if not _has_ops() and not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", SCHEMA)


def install() -> None:
    """Be there before torchvision is; costs nothing where that is never imported."""
    sys.meta_path.insert(0, DefineBeforeImport)
