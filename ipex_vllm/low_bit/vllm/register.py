"""Called by vLLM in each of its processes, through the entry point in `vllm.general_plugins`."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader import register_model_loader

from ipex_vllm.low_bit.readers import ipex_llm
from ipex_vllm.low_bit.vllm.config import CONFIGS
from ipex_vllm.low_bit.vllm.loader import IpexLlmLoader


def register() -> None:
    """Register with vLLM one quantization method per format, `ipex_sym_int4` and so on, and a loader."""
    allow_amx()
    for config_class in CONFIGS:
        register_quantization_config(config_class.get_name())(config_class)
    register_model_loader(ipex_llm.LOAD_FORMAT)(IpexLlmLoader)


def allow_amx() -> None:
    """Ask the kernel for AMX's registers, without which its instructions end the process (SIGILL).

    vLLM 0.32 chooses AMX for its attention in bfloat16 and leaves the asking to oneDNN, which does so at the first
    matmul that it computes with AMX: none, where layers are small or our kernels compute them.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
