"""The systems that can be compared: one small module each, with `launch()` saying how it is started."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare.systems.base import Launch
from benchmarks.options import BenchmarkError


def system_names() -> list[str]:
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name not in ("base", "openvino_server")
    )


def launch(system: str, model: Path, port: int, flags: Sequence[str]) -> Launch:
    """How `system` serves the model directory `model` on `port`, with more `flags` for its command line.

    A system of several processes takes the ports that follow as well. Raises BenchmarkError for an unknown system
    and Absent for one that is not installed.
    """
    if system not in system_names():
        raise BenchmarkError(f"system {system!r}: expected one of {', '.join(system_names())}")
    module = importlib.import_module(f"benchmarks.compare.systems.{system}")
    result = module.launch(model, port, list(flags))
    assert isinstance(result, Launch)
    return result
