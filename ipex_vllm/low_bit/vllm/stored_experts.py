"""Experts that are quantized in the checkpoint: what the methods for each layout share.

vLLM's own methods make and load the parameters; it computes such experts on CPUs with AMX alone, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts

from ipex_vllm.low_bit.experts import Expert, LowBitExperts
from ipex_vllm.low_bit.parts import outputs
from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.recipe import ExpertStorage, Storage
from ipex_vllm.low_bit.vllm.experts import ACTIVATIONS, QuantizeExpertsOnLoad, drop_parameters, gate_and_up
from ipex_vllm.low_bit.vllm.progress import CheckpointProgress, Progress


class StoredExperts:
    """Before one of vLLM's methods. A parameter of theirs holds a tensor for each expert.

    Once packed, experts are computed as those are that were quantized while they loaded.

    Attributes:
        names: of the parameters that `matrix` takes, after w13_ and w2_.
    """

    supports_eplb = QuantizeExpertsOnLoad.supports_eplb
    get_fused_moe_quant_config = QuantizeExpertsOnLoad.get_fused_moe_quant_config
    apply = QuantizeExpertsOnLoad.apply

    moe: Any
    names: tuple[str, ...]
    progress: Progress

    def start(self) -> None:
        self.progress = CheckpointProgress.of_the_model()
        self.progress.expect_layer()

    def matrix(self, *parts: torch.Tensor) -> QuantizedWeight:
        """One expert's weight [out, in], from its parts of the parameters `names`."""
        raise NotImplementedError

    def experts(self, layer: RoutedExperts) -> Iterator[Expert]:
        """The experts that this rank has, quantized as they are stored."""
        for index in range(layer.local_num_experts):
            gate_up, down = (
                self.matrix(*(getattr(layer, f"{which}_{name}").data[index] for name in self.names))
                for which in ("w13", "w2")
            )
            gate, up = (outputs(gate_up, rows) for rows in gate_and_up(layer, len(gate_up.codes)))
            yield gate, up, down

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        if hasattr(layer, "low_bit"):
            return
        experts = self.experts(layer)
        first = next(experts)
        gate, _, down = (Storage(each.format, each.group_size) for each in first)  # type: ignore[union-attr]
        biases: tuple[torch.Tensor, ...] = ()
        if self.moe.has_bias or layer._loaded_expert_biases:
            rows = gate_and_up(layer, layer.w13_bias.shape[1])
            biases = (*(layer.w13_bias[:, part] for part in rows), layer.w2_bias)
        activation = ACTIVATIONS[layer.activation]
        whole = chain((first,), experts)
        storage = ExpertStorage(gate, down)
        layer.low_bit = LowBitExperts(whole, layer.local_num_experts, storage, activation, *biases)
        drop_parameters(layer)
        self.progress.finish_layer(layer.low_bit)
