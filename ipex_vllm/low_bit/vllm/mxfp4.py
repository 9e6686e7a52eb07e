"""MXFP4 checkpoints on CPUs: gpt-oss' experts, and compressed-tensors' layers and experts.

vLLM 0.32 has no kernel for MXFP4 layers on a CPU, and one for experts where there is AMX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.mxfp4 import MxFp4LinearKernel, MxFp4LinearLayerConfig
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_mxfp4 import (  # noqa: E501
    CompressedTensorsW4A4Mxfp4MoEMethod,
)
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, GptOssMxfp4MoEMethod
from vllm.platforms import PlatformEnum, current_platform

from ipex_vllm.low_bit.kernels.w4a8 import W4A8Linear
from ipex_vllm.low_bit.linear import make_linear
from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.readers import mxfp4
from ipex_vllm.low_bit.vllm.experts import unsuitable_reason
from ipex_vllm.low_bit.vllm.int4_kernel import leaves_to_upstream
from ipex_vllm.low_bit.vllm.progress import CheckpointProgress
from ipex_vllm.low_bit.vllm.stored_experts import StoredExperts


class IpexMxfp4LinearKernel(MxFp4LinearKernel):  # type: ignore[misc]
    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if not current_platform.is_cpu():
            return False, "is for CPUs"
        reason = W4A8Linear.missing()
        return reason is None, reason

    @classmethod
    def can_implement(cls, config: MxFp4LinearLayerConfig) -> tuple[bool, str | None]:
        return (False, "--upstream-kernels asks for another") if leaves_to_upstream() else (True, None)

    def __init__(self, config: MxFp4LinearLayerConfig) -> None:
        super().__init__(config)
        self.progress = CheckpointProgress.of_the_model()
        self.progress.expect_layer()

    def process_weights_after_loading(self, layer: Any) -> None:
        weight = mxfp4.quantized(mxfp4.nibbles(layer.weight.data), layer.weight_scale.data)
        layer.low_bit = make_linear(weight, layer.params_dtype)
        del layer.weight_scale
        # An adapter's layer (LoRA) asks the one that it wraps for the device and the dtype of its weight.
        layer.weight = nn.Parameter(torch.empty(0, dtype=layer.params_dtype), requires_grad=False)
        self.progress.finish_layer(layer.low_bit)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = layer.low_bit(x, bias)
        return y


class Mxfp4Experts(StoredExperts):
    def __init__(self, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # upstream's goes on to choose among its own kernels
        # Of what upstream asks its choice for: sizes are whole blocks, and nothing else.
        self.mxfp4_backend = Mxfp4MoeBackend.EMULATION
        self.group_size = mxfp4.BLOCK
        self.start()

    def matrix(self, *parts: torch.Tensor) -> QuantizedWeight:
        packed, exponents = parts
        return mxfp4.quantized(mxfp4.nibbles(packed), exponents)


class GptOssExpertsMethod(Mxfp4Experts, GptOssMxfp4MoEMethod):  # type: ignore[misc]
    names = ("weight", "weight_scale")


class CompressedMxfp4ExpertsMethod(Mxfp4Experts, CompressedTensorsW4A4Mxfp4MoEMethod):  # type: ignore[misc]
    names = ("weight_packed", "weight_scale")


def reason_for_upstream(layer: RoutedExperts) -> str | None:
    """Say why vLLM's own method has to compute these experts, or None where our operator does."""
    return "--upstream-kernels asks for it" if leaves_to_upstream() else unsuitable_reason(layer)


class OssConfig(GptOssMxfp4Config):  # type: ignore[misc]
    """gpt-oss' own checkpoints: experts in MXFP4, all else in bfloat16."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts) and reason_for_upstream(layer) is None:
            return GptOssExpertsMethod(layer.moe_config)
        return super().get_quant_method(layer, prefix)


def register_kernel() -> None:
    """Give vLLM a kernel for MXFP4 layers on CPUs, where it has none; a second call changes nothing."""
    possible = kernels._POSSIBLE_MXFP4_KERNELS.setdefault(PlatformEnum.CPU, [])
    if IpexMxfp4LinearKernel not in possible:
        possible.append(IpexMxfp4LinearKernel)
