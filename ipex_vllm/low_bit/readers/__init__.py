"""The checkpoints that are quantized already: a module for each way of storing them."""

from __future__ import annotations

from typing import Any

from ipex_vllm.low_bit.architecture import read_config
from ipex_vllm.low_bit.readers import gguf, ipex_llm, ours
from ipex_vllm.low_bit.readers.base import ExistingQuantization, Reader

READERS: tuple[Reader, ...] = (ours, ipex_llm, gguf)
# The readers of files that vLLM does not read, by the load format under which they are registered with it.
FORMATS_OF_FILES: dict[str, Reader] = {ipex_llm.LOAD_FORMAT: ipex_llm, gguf.LOAD_FORMAT: gguf}


def quantized_in(model_path: str) -> ExistingQuantization | None:
    """Say how the checkpoint at `model_path`, a directory or a Hugging Face name, is quantized; None if it is not.

    Raises ValueError if there is no configuration to read, or if ipex-llm wrote it in a format that cannot be read.
    """
    config = read_config(model_path)
    for reader in READERS:
        if existing := reader.recognises(model_path, config):
            return existing
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization is None:
        return None
    method = str(quantization.get("quant_method"))
    return ExistingQuantization(_format_of(method, quantization), method)


def _format_of(method: str, quantization: dict[str, Any]) -> str | None:
    """Our name for what another tool's `quantization_config` describes, or None."""
    if method == "fp8":
        return "fp8_e4m3"
    if method == "compressed-tensors":
        weights = next(iter(quantization["config_groups"].values()))["weights"]
        kind, bits, symmetric = weights["type"], weights["num_bits"], weights["symmetric"]
    else:
        kind, bits = "int", quantization.get("bits", quantization.get("w_bit"))
        symmetric = quantization.get("sym", not quantization.get("zero_point", False))
    names = {
        ("int", 4, True): "sym_int4",
        ("int", 4, False): "asym_int4",
        ("int", 8, True): "sym_int8",
        ("float", 8, True): "fp8_e4m3",
    }
    return names.get((kind, bits, symmetric))
