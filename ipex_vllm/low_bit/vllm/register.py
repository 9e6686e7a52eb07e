"""Called by vLLM in each of its processes, through the entry point in `vllm.general_plugins`."""

from __future__ import annotations

from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import register_model_loader

from ipex_vllm.low_bit.readers import ipex_llm
from ipex_vllm.low_bit.vllm import upstream
from ipex_vllm.low_bit.vllm.config import CONFIGS
from ipex_vllm.low_bit.vllm.loader import IpexLlmLoader


def register() -> None:
    """Give vLLM one quantization method per format, `ipex_sym_int4` and so on, and a loader; mend its own faults."""
    upstream.mend()
    for config_class in CONFIGS:
        register_quantization_config(config_class.get_name())(config_class)
    register_model_loader(ipex_llm.LOAD_FORMAT)(IpexLlmLoader)
