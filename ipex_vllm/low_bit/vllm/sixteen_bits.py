"""Layers that stay in 16 bits, multiplied by our kernel where the worker's plan found it the faster one.

vLLM gives them to oneDNN, which computes in bfloat16 and float16 slowly where the CPU has no instructions for them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers import utils

from ipex_vllm.low_bit import OWN_16_BITS
from ipex_vllm.low_bit.kernels import w16a16

# vLLM configures the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")

dispatch = utils.dispatch_cpu_unquantized_gemm


def mend() -> None:
    """Ask us first from now on; a second call changes nothing."""
    utils.dispatch_cpu_unquantized_gemm = dispatch_own


def dispatch_own(layer: Any, remove_weight: bool) -> None:
    """vLLM's function: set `layer.cpu_linear`, and keep the weight itself only where it is read elsewhere, too."""
    weight = layer.weight
    if weight.is_meta or weight.dim() != 2 or weight.dtype not in w16a16.WEIGHT_DTYPES or not is_wanted():
        dispatch(layer, remove_weight)
        return
    logger.info_once("layers in 16 bits use the kernel w16a16")
    outputs, packed = len(weight), w16a16.pack(weight.data)
    if not remove_weight:
        layer.cpu_linear = lambda x, weight, bias: w16a16.linear(x, packed, bias, outputs)
        return
    # A parameter, not a part of the function: the code compiled for a layer is then that of its likes.
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.cpu_linear = lambda x, weight, bias: w16a16.linear(x, weight, bias, outputs)


def is_wanted() -> bool:
    config = get_current_vllm_config_or_none()
    wishes = None if config is None else config.additional_config
    return isinstance(wishes, dict) and bool(wishes.get(OWN_16_BITS)) and w16a16.unavailable_reason() is None
