"""Experts as `save` stores them, one by one, in `layout`'s tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from ipex_vllm.low_bit.layout import from_tensors, meta_tensors
from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.recipe import EXPERT_TILE, ExpertStorage, Recipe
from ipex_vllm.low_bit.vllm.experts import KeptExpertsMethod, unsuitable_reason
from ipex_vllm.low_bit.vllm.progress import Progress
from ipex_vllm.low_bit.vllm.stored_experts import StoredExperts


def saved_experts_method(layer: RoutedExperts, recipe: Recipe, progress: Progress, prefix: str) -> FusedMoEMethodBase:
    """The method for a layer of experts of a saved checkpoint: as they are stored there.

    Raises ValueError where there is no kernel for them.
    """
    config = layer.moe_config
    # What was decided when they were saved, whatever the ranks there are now.
    storage = recipe.expert_storage(prefix, config.hidden_dim, config.intermediate_size_per_partition * config.tp_size)
    if isinstance(storage, str):
        progress.keep_layer(prefix, storage)
        return KeptExpertsMethod(progress, config)
    part, group = config.intermediate_size_per_partition, storage.down.group_size
    reason = unsuitable_reason(layer)
    if part % (group or EXPERT_TILE):
        reason = f"a rank's {part} intermediate features are no multiple of {group or EXPERT_TILE}"
    if reason is not None:
        raise ValueError(f"{prefix} cannot be opened as it was saved: {reason}")
    return OpenSavedExperts(config, storage, progress)


class OpenSavedExperts(StoredExperts, FusedMoEMethodBase):  # type: ignore[misc]
    # Its parameters take memory from the first of a layer's tensors to the last.
    uses_meta_device = True

    def __init__(self, moe: Any, storage: ExpertStorage, progress: Progress) -> None:
        super().__init__(moe)
        self.storage, self.progress = storage, progress

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shapes = {
            "w13": (self.storage.gate_up, 2 * intermediate_size_per_partition, hidden_size),
            "w2": (self.storage.down, hidden_size, intermediate_size_per_partition),
        }
        for which, (storage, out_features, in_features) in shapes.items():
            scales = FusedMoeWeightScaleSupported.GROUP if storage.group_size else FusedMoeWeightScaleSupported.CHANNEL
            tensors = meta_tensors(storage, out_features, in_features)
            self.names = tuple(name for name in tensors if name != "weight_shape")
            for name, like in tensors.items():
                data = torch.empty((num_experts, *like.shape), dtype=like.dtype, device="meta")
                parameter = nn.Parameter(data, requires_grad=False)
                set_weight_attrs(parameter, {**extra_weight_attrs, "quant_method": scales.value})
                layer.register_parameter(f"{which}_{name}", parameter)
        initialize_online_processing(layer)
        self.progress.expect_layer()

    def matrix(self, *parts: torch.Tensor) -> QuantizedWeight:
        return from_tensors(self.storage.gate_up.format, dict(zip(self.names, parts, strict=True)))
