"""Low-bit weights in ipex-llm's formats, quantized on load, for vLLM and for Transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ipex_vllm.low_bit.formats import FORMATS, Format, resolve
from ipex_vllm.low_bit.recipe import on_load


def choose_format(low_bit: str | None, head: str | None, device: str) -> Format | None:
    """The format that `--low-bit` and `--low-bit-head` ask for; None if the weights stay as the checkpoint has them.

    Raises ValueError, in one line, for an unknown name, a format that does not run on `device` ("cpu" or "xpu"), or a
    head's format where nothing else is quantized.
    """
    format = None if low_bit is None else resolve(low_bit)
    if format is None or format.kind == "dtype":
        if head is not None:
            raise ValueError("a format for the output head (--low-bit-head) goes with one that quantizes the rest")
        return format
    if device == "xpu" and not format.runs_on_xpu:
        names = ", ".join(row.name for row in FORMATS.values() if row.runs_on_xpu)
        raise ValueError(f"{format.name} has no kernel on XPU; use one of {names}")
    on_load(format, head, device)
    return format


def vllm_arguments(low_bit: str | None, model_path: str, device: str, head: str | None = None) -> dict[str, Any]:
    """Return vLLM's engine arguments that serve the checkpoint `model_path` with its weights in `low_bit`.

    `low_bit` is a name from `formats.FORMATS` or `formats.ALIASES`, or None for the checkpoint as it is, and `head` the
    output head's (`recipe.on_load`), None for the default. A checkpoint that is quantized already is used as it is, and
    ValueError says so in one line if it is in another format than the one asked for. Raises also as `choose_format`.
    """
    format = choose_format(low_bit, head, device)
    if format is not None and format.kind == "dtype":
        return {"dtype": format.dtype}
    if head is None and is_plain(model_path):  # told without PyTorch, which the readers import
        return {} if format is None else {"quantization": f"ipex_{format.name}"}
    from ipex_vllm.low_bit.readers import ours, quantized_in

    existing = quantized_in(model_path)
    if existing is None:
        wishes = {} if head is None else {"additional_config": {ours.HEAD: head}}
        return {} if format is None else {"quantization": f"ipex_{format.name}", **wishes}
    if head is not None:
        raise ValueError(f"{model_path} is already quantized ({existing.description}): leave --low-bit-head out")
    if format is not None and format.name != existing.format_name:
        raise ValueError(
            f"{model_path} is already quantized ({existing.description}): leave --low-bit out to serve it as it is, or "
            f"give the original checkpoint to quantize that to {format.name}"
        )
    return existing.vllm_arguments


def is_plain(model_path: str) -> bool:
    """Whether the config.json of a directory has nothing that a quantized checkpoint's would have."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
        return not any(value and re.search("quant|compress|low_bit", name) for name, value in config.items())
    except (OSError, ValueError, AttributeError):
        return False
