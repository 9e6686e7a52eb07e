"""Importing vLLM without what only a compiler needs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LOWERING = "torch._inductor.lowering"


def import_vllm() -> None:
    """Import vLLM, and leave the larger part of PyTorch's compiler for when something compiles.

    A model that runs eagerly has no use for it. vLLM 0.32 imports it all the same, twice: to let its own operators into
    a list of the lowering, as soon as it is imported itself (told that the lowering is not there, it goes on without;
    the list is extended when that is imported, before anybody reads it); and as PyTorch does, where `torch.compile`
    decorates a function, to ask for the compiler's settings.
    """
    if "vllm" in sys.modules or LOWERING in sys.modules:
        return
    sys.modules[LOWERING] = None  # type: ignore[assignment]
    try:
        import vllm  # noqa: F401
    finally:
        del sys.modules[LOWERING]
    sys.meta_path.insert(0, ExtendOnImport)
    import torch

    torch._TorchCompileInductorWrapper.get_compiler_config = compiler_config  # type: ignore[method-assign]


def compiler_config(self: Any) -> dict[str, Any]:
    """The settings that `torch.compile` was given and the compiler's own, which PyTorch asks its whole compiler for."""
    from torch._inductor import config

    with config.patch(self.config):
        settings: dict[str, Any] = config.get_config_copy()
    return settings


class ExtendOnImport:
    """Asked for each module; finds the one, once."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != LOWERING:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            from vllm import env_override

            execute(module)
            env_override._patch_inductor_fallback_allow_list()

        loader.exec_module = execute_and_extend
        return spec
