"""The experts of a model from a GGUF file, packed from the blocks that are in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.utils import set_weight_attrs

from ipex_vllm.low_bit.experts import Expert
from ipex_vllm.low_bit.parts import own_inputs
from ipex_vllm.low_bit.readers import ggml
from ipex_vllm.low_bit.vllm.progress import Progress
from ipex_vllm.low_bit.vllm.stored_experts import StoredExperts
from ipex_vllm.machine.memory import forget_pages

# What vLLM calls gate, up and down.
SHARDS = ("w1", "w3", "w2", "gpt_oss_w13", "gpt_oss_w2")


class BlocksExpertsMethod(StoredExperts, FusedMoEMethodBase):  # type: ignore[misc]
    """Packs a layer's experts from their blocks: gate and up of one format, down of that or of another."""

    def __init__(self, moe: Any, kinds: tuple[str, str, str], progress: Progress) -> None:
        super().__init__(moe)
        self.kinds, self.progress = kinds, progress
        progress.expect_layer()

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        # Each expert's rows, where they lie in the mapped file, by vLLM's names of its parts: gpt-oss has gate and up
        # under one.
        self.rows: defaultdict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)

        def keep(
            param: nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            index = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if index >= 0:
                self.rows[index, shard_id].append(loaded_weight)
            return bool(index >= 0)

        for name in ("w13_weight", "w2_weight"):
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": keep})
            layer.register_parameter(name, parameter)
        if self.moe.has_bias:
            for name, size in (("w13_bias", 2 * intermediate_size_per_partition), ("w2_bias", hidden_size)):
                bias = nn.Parameter(torch.zeros(num_experts, size), requires_grad=False)
                layer.register_parameter(name, bias)

    def experts(self, layer: RoutedExperts) -> Iterator[Expert]:
        rank, ranks = self.moe.tp_rank, self.moe.tp_size
        for index in range(layer.local_num_experts):
            pieces = [rows for shard in SHARDS for rows in self.rows.pop((index, shard), ())]
            own = [*(rows.chunk(ranks)[rank] for rows in pieces[:2]), pieces[2]]
            gate, up, down = (ggml.decode(kind, rows) for kind, rows in zip(self.kinds, own, strict=True))
            yield gate, up, own_inputs(down, rank, ranks)
            for rows in pieces:
                forget_pages(rows)
