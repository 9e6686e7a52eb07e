"""Called by vLLM in each of its processes, through the entry point in `vllm.general_plugins`."""

from __future__ import annotations

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import register_model_loader

from ipex_vllm.low_bit.readers import FORMATS_OF_FILES, gguf
from ipex_vllm.low_bit.vllm import upstream
from ipex_vllm.low_bit.vllm.checkpoints import register_checkpoints
from ipex_vllm.low_bit.vllm.config import CONFIGS
from ipex_vllm.low_bit.vllm.gguf import GgufConfig
from ipex_vllm.low_bit.vllm.loader import FilesLoader
from ipex_vllm.low_bit.vllm.scaled_kernels import register_scaled_kernels


def register() -> None:
    """Give vLLM our quantization methods, `ipex_sym_int4` and so on, and what reads other files; mend its faults."""
    upstream.mend()
    for config_class in CONFIGS:
        register_quantization_config(config_class.get_name())(config_class)
    register_quantization_config(gguf.METHOD)(GgufConfig)
    register_checkpoints()
    register_scaled_kernels()
    for load_format in FORMATS_OF_FILES:
        register_model_loader(load_format)(FilesLoader)
