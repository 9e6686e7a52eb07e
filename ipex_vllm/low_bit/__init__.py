"""Low-bit weights in ipex-llm's formats, quantized on load, for vLLM and for Transformers."""

from __future__ import annotations

from typing import Any

from ipex_vllm.low_bit.formats import FORMATS, resolve


def vllm_arguments(low_bit: str | None, model_path: str, device: str) -> dict[str, Any]:
    """Return vLLM's engine arguments that serve the checkpoint `model_path` with its weights in `low_bit`.

    `low_bit` is a name from `formats.FORMATS` or `formats.ALIASES`, or None for the checkpoint as it is. A checkpoint
    that is quantized already is used as it is, and ValueError says so in one line if it is in another format than the
    one asked for, or if the format is unknown or does not run on `device` ("cpu" or "xpu").
    """
    from ipex_vllm.low_bit.readers import quantized_in

    format = None if low_bit is None else resolve(low_bit)
    if format is not None and format.kind == "dtype":
        return {"dtype": format.dtype}
    if format is not None and device == "xpu" and not format.runs_on_xpu:
        names = ", ".join(row.name for row in FORMATS.values() if row.runs_on_xpu)
        raise ValueError(f"{format.name} has no kernel on XPU; use one of {names}")
    existing = quantized_in(model_path)
    if existing is None:
        return {} if format is None else {"quantization": f"ipex_{format.name}"}
    if format is not None and format.name != existing.format_name:
        raise ValueError(
            f"{model_path} is already quantized ({existing.description}): leave --low-bit out to serve it as it is, or "
            f"give the original checkpoint to quantize that to {format.name}"
        )
    return existing.vllm_arguments
