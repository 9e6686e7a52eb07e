"""Experts of checkpoints in 8-bit floats, packed for our operator: in blocks, with a scale an output, or one a matrix.

Activations stay as they are. vLLM 0.32 computes those in blocks of 128 x 128 on CPUs with AMX, and no others.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8 import (  # noqa: E501
    CompressedTensorsW8A8Fp8MoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod

from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.recipe import EXPERT_TILE
from ipex_vllm.low_bit.vllm.experts import unsuitable_reason
from ipex_vllm.low_bit.vllm.int4_kernel import leaves_to_upstream
from ipex_vllm.low_bit.vllm.scaled_kernels import E4M3, block_scales, group_size
from ipex_vllm.low_bit.vllm.stored_experts import StoredExperts

UPSTREAM_BLOCK = [128, 128]


def reason_for_upstream(layer: RoutedExperts, block: list[int] | None) -> str | None:
    """Say why vLLM's own method has to compute these experts, or None where our operator does."""
    if leaves_to_upstream():
        return "--upstream-kernels asks for it"
    moe = layer.moe_config
    if (
        block == UPSTREAM_BLOCK
        and CPUExpertsFp8._supports_current_device()
        and moe.in_dtype == torch.bfloat16
        and layer.activation == MoEActivation.SILU
        and not moe.has_bias
    ):
        return "vLLM has a kernel for AMX"
    hidden, intermediate = moe.hidden_dim, moe.intermediate_size_per_partition
    if block is not None:
        rows, columns = block
        if intermediate % rows or None in (group_size(hidden, columns), group_size(intermediate, columns)):
            return f"there is no kernel for {intermediate} intermediate features in blocks of {rows} x {columns}"
    if intermediate % EXPERT_TILE:
        return f"{intermediate} intermediate features are no multiple of {EXPERT_TILE}"
    return unsuitable_reason(layer)


class Fp8Experts(StoredExperts):
    block: list[int] | None

    def matrix(self, *parts: torch.Tensor) -> QuantizedWeight:
        codes, scales = parts
        if self.block is not None:
            return QuantizedWeight(E4M3, codes, block_scales(scales, codes.shape, self.block))
        rows = scales.float().reshape(-1, 1)  # of each output, of the gate and of up, or of all
        return QuantizedWeight(E4M3, codes, rows.repeat_interleave(len(codes) // len(rows), dim=0))


class Fp8ExpertsMethod(Fp8Experts, Fp8MoEMethod):  # type: ignore[misc]
    def __init__(self, quant_config: Fp8Config, layer: RoutedExperts) -> None:
        FusedMoEMethodBase.__init__(self, layer.moe_config)  # upstream's goes on to choose among its own kernels
        self.quant_config = quant_config
        self.block = self.weight_block_size = self.moe_block_shape = quant_config.weight_block_size
        self.block_quant, self.weight_scale_refine = self.block is not None, None
        self.weight_scale_name = "weight_scale_inv" if self.block_quant else "weight_scale"
        self.names = ("weight", self.weight_scale_name)
        self.start()


class CompressedFp8ExpertsMethod(Fp8Experts, CompressedTensorsW8A8Fp8MoEMethod):  # type: ignore[misc]
    names = ("weight", "weight_scale")

    def __init__(self, weight_quant: Any, input_quant: Any, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.weight_quant, self.input_quant = weight_quant, input_quant
        self.block = self.weight_block_size = weight_quant.block_structure
        self.block_quant = self.block is not None
        self.static_input_scales = not input_quant.dynamic
        self.start()
