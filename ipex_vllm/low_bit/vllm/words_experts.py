"""Experts whose weights are in words, AWQ's, GPTQ's, AutoRound's or compressed-tensors', packed for our operator.

vLLM's own methods make and load the parameters; it computes such experts on CPUs with AMX alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMoEMethod
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)

from ipex_vllm.low_bit.experts import Expert, LowBitExperts
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.readers import words
from ipex_vllm.low_bit.recipe import EXPERT_TILE, ExpertStorage, Storage
from ipex_vllm.low_bit.vllm.experts import ACTIVATIONS, QuantizeExpertsOnLoad, unsuitable_reason
from ipex_vllm.low_bit.vllm.int4_kernel import leaves_to_upstream
from ipex_vllm.low_bit.vllm.progress import CheckpointProgress


def reason_for_upstream(layer: RoutedExperts, bits: int, group_size: int) -> str | None:
    """Say why vLLM's own method has to compute these experts, or None where our operator does."""
    if leaves_to_upstream():
        return "--upstream-kernels asks for it"
    if layer.moe_config.tp_size > 1 or layer.moe_config.ep_size > 1:
        return "experts in words are packed on one rank alone"
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


class WordsExperts:
    """What the three methods share. A parameter of theirs holds a tensor for each expert.

    Once packed, experts are computed as those are that were quantized while they loaded.
    """

    supports_eplb = QuantizeExpertsOnLoad.supports_eplb
    get_fused_moe_quant_config = QuantizeExpertsOnLoad.get_fused_moe_quant_config
    apply = QuantizeExpertsOnLoad.apply

    moe: Any
    is_symmetric: bool
    # The names of the words, the scales and the zero points, after w13_ and w2_.
    names: tuple[str, str, str]

    def start(self, is_symmetric: bool) -> None:
        self.is_symmetric = is_symmetric
        self.progress = CheckpointProgress.of_the_model()
        self.progress.expect_layer()

    def matrix(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> QuantizedWeight:
        """One expert's weight [out, in], from its part of the parameters; without zero points where `zeros` is None."""
        raise NotImplementedError

    def experts(self, layer: RoutedExperts) -> Iterator[Expert]:
        for index in range(layer.local_num_experts):
            gate_up, down = (self.matrix(*self.parts(layer, which, index)) for which in ("w13", "w2"))
            rows = len(gate_up.codes) // 2
            halves = []
            for part in (slice(rows), slice(rows, None)):
                mins = None if gate_up.mins is None else gate_up.mins[part]
                halves.append(replace(gate_up, codes=gate_up.codes[part], scales=gate_up.scales[part], mins=mins))
            yield halves[0], halves[1], down

    def parts(
        self, layer: RoutedExperts, which: str, index: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        weight, scales, zeros = self.names
        stored = None if self.is_symmetric else getattr(layer, f"{which}_{zeros}").data[index]
        return getattr(layer, f"{which}_{weight}").data[index], getattr(layer, f"{which}_{scales}").data[index], stored

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if hasattr(layer, "low_bit"):
            return
        sizes = [self.matrix(*self.parts(layer, which, 0)).group_size for which in ("w13", "w2")]
        format = FORMATS["sym_int4" if self.is_symmetric else "asym_int4"]
        storage = ExpertStorage(*(Storage(format, size) for size in sizes))
        biases: tuple[torch.Tensor, ...] = ()
        if self.moe.has_bias or layer._loaded_expert_biases:
            biases = (*layer.w13_bias.chunk(2, dim=1), layer.w2_bias)
        activation = ACTIVATIONS[layer.activation]
        layer.low_bit = LowBitExperts(self.experts(layer), layer.local_num_experts, storage, activation, *biases)
        for name in list(layer._parameters):
            if name.startswith(("w13_", "w2_")):
                setattr(layer, name, nn.Parameter(torch.empty(0), requires_grad=False))
        self.progress.finish_layer(layer.low_bit)


class AwqExpertsMethod(WordsExperts, AutoAWQMoEMethod):  # type: ignore[misc]
    names = ("qweight", "scales", "qzeros")

    def __init__(self, quant_config: AutoAWQConfig, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)  # upstream's goes on to choose among its own kernels
        self.quant_config, self.input_dtype = quant_config, None
        self.start(is_symmetric=False)

    def matrix(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> QuantizedWeight:
        assert zeros is not None
        return words.quantized(4, words.unpack_awq(weight).t(), scales.t(), words.unpack_awq(zeros).t())


class GptqExpertsMethod(WordsExperts, AutoGPTQMoEMethod):  # type: ignore[misc]
    names = ("qweight", "scales", "qzeros")

    def __init__(self, quant_config: AutoGPTQConfig, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.quant_config, self.input_dtype = quant_config, None
        self.zero_offset = 0 if quant_config.full_config.get("checkpoint_format") == "gptq_v2" else 1
        self.start(quant_config.is_sym)

    def matrix(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> QuantizedWeight:
        points = None if zeros is None else ((words.unpack(zeros, 4) + self.zero_offset) & 15).t()
        return words.quantized(4, words.unpack(weight.t(), 4), scales.t(), points)


class CompressedExpertsMethod(WordsExperts, CompressedTensorsWNA16MoEMethod):  # type: ignore[misc]
    names = ("weight_packed", "weight_scale", "weight_zero_point")

    def __init__(self, weight_quant: Any, moe: Any) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        self.symmetric, self.num_bits, self.strategy = weight_quant.symmetric, 4, weight_quant.strategy
        self.packed_factor = 8
        self.group_size = weight_quant.group_size or -1
        self.start(weight_quant.symmetric)

    def matrix(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> QuantizedWeight:
        points = None if zeros is None else words.unpack(zeros.t(), 4).t()
        return words.quantized(4, words.unpack(weight, 4), scales, points)
