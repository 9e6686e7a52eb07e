"""Low-bit weights in ipex-llm's formats, quantized on load, for vLLM and for Transformers."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from ipex_vllm.low_bit.formats import FORMATS, Format, resolve
from ipex_vllm.low_bit.recipe import on_load
from ipex_vllm.machine.gguf import find_files

# The kernels' library (`native.py`), whether it was built or not.
LIBRARY = Path(__file__).parent / "libkernels.so"
# The entry of vLLM's `additional_config` that leaves quantized checkpoints to its own kernels.
UPSTREAM_KERNELS = "ipex_vllm_upstream_kernels"
# The one that has our kernel multiply the layers that stay in 16 bits: which is faster, the machine decides.
OWN_16_BITS = "ipex_vllm_own_16_bits"
# The variable of vLLM's processes that names the folder of `vllm/packed_cache.py`. It is none of vLLM's arguments, of
# which another value has the model compiled anew.
LOW_BIT_CACHE = "IPEX_VLLM_LOW_BIT_CACHE"
# The one, set to anything, that has a model compiled beside the service, by a fork (`vllm/compile_beside.py`).
COMPILE_BESIDE = "IPEX_VLLM_COMPILE_BESIDE"


@cache
def library_digest() -> str | None:
    """What tells the kernels' library from every other; None where there is none. Takes no PyTorch."""
    return hashlib.sha256(LIBRARY.read_bytes()).hexdigest() if LIBRARY.exists() else None


def choose_format(low_bit: str | None, head: str | None, device: str, outer: str | None = None) -> Format | None:
    """The format that `--low-bit` and its two companions ask for; None if the weights stay as the checkpoint has them.

    Raises ValueError, in one line, for an unknown name, a format that does not run on `device` ("cpu" or "xpu"), or a
    format of the head or of the outer layers where nothing else is quantized.
    """
    format = None if low_bit is None else resolve(low_bit)
    if format is None or format.kind == "dtype":
        if head is not None:
            raise ValueError("a format for the output head (--low-bit-head) goes with one that quantizes the rest")
        if outer is not None:
            raise ValueError("a format for the outer layers (--low-bit-outer) goes with one that quantizes the rest")
        return format
    if device == "xpu" and not format.runs_on_xpu:
        names = ", ".join(row.name for row in FORMATS.values() if row.runs_on_xpu)
        raise ValueError(f"{format.name} has no kernel on XPU; use one of {names}")
    on_load(format, head, device, outer=outer)
    return format


def vllm_arguments(
    low_bit: str | None, model_path: str, device: str, head: str | None = None, outer: str | None = None
) -> dict[str, Any]:
    """Return vLLM's engine arguments that serve the checkpoint `model_path` with its weights in `low_bit`.

    `low_bit` is a name from `formats.FORMATS` or `formats.ALIASES`, or None for the checkpoint as it is, and `head` and
    `outer` the output head's and the outer layers' (`recipe.on_load`), None for the default. A checkpoint that is
    quantized already is used as it is, and ValueError says so in one line if it is in another format than the one asked
    for. Raises also as `choose_format`.
    """
    format = choose_format(low_bit, head, device, outer)
    is_dtype = format is not None and format.kind == "dtype"
    dtype = {"dtype": format.dtype} if format is not None and is_dtype else {}
    if head is None and outer is None and is_plain(model_path):  # told without PyTorch, which the readers import
        return dtype if format is None or is_dtype else {"quantization": f"ipex_{format.name}"}
    from ipex_vllm.low_bit.readers import ours, quantized_in

    try:
        existing = quantized_in(model_path)
    except ValueError:
        if is_dtype:  # vLLM says it, of a name that is only known to it
            return dtype
        raise
    if existing is None:
        if format is None or is_dtype:
            return dtype
        wishes = {name: wish for name, wish in ((ours.HEAD, head), (ours.OUTER, outer)) if wish is not None}
        return {"quantization": f"ipex_{format.name}"} | ({"additional_config": wishes} if wishes else {})
    for flag, wish in (("--low-bit-head", head), ("--low-bit-outer", outer)):
        if wish is not None:
            raise ValueError(f"{model_path} is already quantized ({existing.description}): leave {flag} out")
    if format is not None and not is_dtype and format.name != existing.format_name:
        raise ValueError(
            f"{model_path} is already quantized ({existing.description}): leave --low-bit out to serve it as it is, or "
            f"give the original checkpoint to quantize that to {format.name}"
        )
    if device == "xpu" and not existing.runs_on_xpu:
        raise ValueError(f"{model_path} has no kernel on XPU ({existing.description})")
    return existing.vllm_arguments | dtype


def quantization_line(method: str | None, upstream_kernels: bool) -> str | None:
    """Whose kernels compute a checkpoint that another tool has quantized by vLLM's `method`; None for any other."""
    if method is None or method.startswith("ipex_"):
        return None
    if upstream_kernels:
        return f"quantization: {method}, left to vLLM's own kernels (chosen with --upstream-kernels)"
    return (
        f"quantization: {method}, by our kernels where they take it, integers with activations in 8 bits "
        "(--upstream-kernels leaves it to vLLM's own)"
    )


def gguf_directory(model_path: str) -> Path | None:
    """The directory that stands for a GGUF file, or for a directory with one; None for any other model.

    Raises ValueError, in one line, for a file that is broken, or whose model is not read.
    """
    files = find_files(model_path)
    if not files:
        return None
    try:
        from ipex_vllm.low_bit.readers.gguf import model_directory
    except ImportError as error:
        raise ValueError(f"{model_path} is a GGUF file, for which {error.name} has to be installed") from error
    return model_directory(files)


def is_plain(model_path: str) -> bool:
    """Whether the config.json of a directory has nothing that a quantized checkpoint's would have."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text())
        return not any(value and re.search("quant|compress|low_bit", name) for name, value in config.items())
    except (OSError, ValueError, AttributeError):
        return False
