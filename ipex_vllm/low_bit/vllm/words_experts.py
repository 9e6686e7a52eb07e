"""Experts whose weights are in words, AWQ's, GPTQ's, AutoRound's or compressed-tensors', packed for our operator."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)

from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.readers import words
from ipex_vllm.low_bit.recipe import EXPERT_TILE
from ipex_vllm.low_bit.vllm.experts import unsuitable_reason
from ipex_vllm.low_bit.vllm.int4_kernel import leaves_to_upstream
from ipex_vllm.low_bit.vllm.stored_experts import StoredExperts


def reason_for_upstream(layer: RoutedExperts, bits: int, group_size: int) -> str | None:
    """Say why vLLM's own method has to compute these experts, or None where our operator does."""
    if leaves_to_upstream():
        return "--upstream-kernels asks for it"
    if bits != 4:
        return f"there is no kernel for experts of {bits} bits in words"
    if layer.activation == MoEActivation.SWIGLUOAI:
        return "gate and up are not halves"
    hidden, intermediate = layer.moe_config.hidden_dim, layer.moe_config.intermediate_size_per_partition
    for inputs in (hidden, intermediate):
        size = inputs if group_size == -1 else group_size
        if inputs % size or words.fitting_group_size(bits, size) is None:
            return f"there is no kernel for {inputs} inputs in groups of {group_size}"
    if intermediate % EXPERT_TILE:
        return f"{intermediate} intermediate features are no multiple of {EXPERT_TILE}"
    return unsuitable_reason(layer)


class WordsExperts(StoredExperts):
    """What the three methods share: `matrix` gets words, scales and, but where codes are symmetric, zero points."""

    def start_words(self, names: tuple[str, str, str], is_symmetric: bool) -> None:
        self.names = names[:2] if is_symmetric else names
        self.start()


class AwqExpertsMethod(WordsExperts, AutoAWQMoEMethod):  # type: ignore[misc]
    def __init__(self, quant_config: AutoAWQConfig, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # upstream's goes on to choose among its own kernels
        self.quant_config, self.input_dtype = quant_config, None
        self.start_words(("qweight", "scales", "qzeros"), False)

    def matrix(self, *parts: torch.Tensor) -> QuantizedWeight:
        weight, scales, zeros = parts
        return words.quantized(4, words.unpack_awq(weight).t(), scales.t(), words.unpack_awq(zeros).t())


class GptqExpertsMethod(WordsExperts, AutoGPTQMoEMethod):  # type: ignore[misc]
    def __init__(self, quant_config: AutoGPTQConfig, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.quant_config, self.input_dtype = quant_config, None
        self.zero_offset = 0 if quant_config.full_config.get("checkpoint_format") == "gptq_v2" else 1
        self.start_words(("qweight", "scales", "qzeros"), quant_config.is_sym)

    def matrix(self, *parts: torch.Tensor) -> QuantizedWeight:
        weight, scales, *zeros = parts
        points = ((words.unpack(zeros[0], 4) + self.zero_offset) & 15).t() if zeros else None
        return words.quantized(4, words.unpack(weight.t(), 4), scales.t(), points)


class CompressedExpertsMethod(WordsExperts, CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    def __init__(self, weight_quant: Any, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.symmetric, self.num_bits, self.strategy = weight_quant.symmetric, 4, weight_quant.strategy
        self.packed_factor = 8
        self.group_size = weight_quant.group_size or -1
        self.start_words(("weight_packed", "weight_scale", "weight_zero_point"), weight_quant.symmetric)

    def matrix(self, *parts: torch.Tensor) -> QuantizedWeight:
        weight, scales, *zeros = parts
        points = words.unpack(zeros[0].t(), 4).t() if zeros else None
        return words.quantized(4, words.unpack(weight, 4), scales, points)
