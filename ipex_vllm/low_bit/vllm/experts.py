"""What vLLM does with a layer of experts: making its parameters, packing them, and calling the operator over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.platforms import current_platform

from ipex_vllm.low_bit.experts import Expert, LowBitExperts
from ipex_vllm.low_bit.kernels import experts as kernel
from ipex_vllm.low_bit.recipe import ExpertStorage, Recipe
from ipex_vllm.low_bit.vllm.linear import Kept, skip
from ipex_vllm.low_bit.vllm.progress import Progress
from ipex_vllm.machine.memory import forget_pages

ACTIVATIONS = {
    MoEActivation.SILU: "silu",
    MoEActivation.GELU: "gelu",
    MoEActivation.GELU_TANH: "gelu_tanh",
    MoEActivation.SWIGLUOAI: "clamped_swiglu",
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: "clamped_swiglu",
}
# Of clamped_swiglu, as the operator has them; a layer that says nothing means these.
LIMIT, ALPHA, BETA = 7.0, 1.702, 1.0


def experts_method(layer: RoutedExperts, recipe: Recipe, progress: Progress, prefix: str) -> FusedMoEMethodBase:
    """The method for a layer of experts: quantized while it loads, or left as it is, with a line that says so."""
    config = layer.moe_config
    storage = recipe.expert_storage(prefix, config.hidden_dim, config.intermediate_size_per_partition)
    reason = storage if isinstance(storage, str) else unsuitable_reason(layer)
    if reason is None:
        assert isinstance(storage, ExpertStorage)
        return QuantizeExpertsOnLoad(config, storage, progress, prefix)
    progress.keep_layer(prefix, reason)
    return KeptExpertsMethod(progress, config)


def unsuitable_reason(layer: RoutedExperts) -> str | None:
    """Say why the operator does not compute these experts, or None if it does."""
    if not current_platform.is_cpu():
        return "experts are quantized on CPUs only"
    if reason := kernel.unavailable_reason():
        return reason
    activation = layer.activation
    if activation not in ACTIVATIONS:
        return f"there is no kernel for experts with {activation.value}"
    usual = {"swiglu_limit": LIMIT, "swiglu_alpha": ALPHA, "swiglu_beta": BETA}
    is_clamped = ACTIVATIONS[activation] == "clamped_swiglu"
    for name, value in usual.items():
        if getattr(layer, name) not in ((None, value) if is_clamped else (None,)):
            return f"there is no kernel for experts with a {name} of {getattr(layer, name)}"
    if layer.moe_config.experts_per_token > kernel.MOST_CHOSEN:
        return f"there is no kernel for more than {kernel.MOST_CHOSEN} experts a token"
    return None


def gate_and_up(layer: RoutedExperts, num_rows: int) -> tuple[slice, slice]:
    """Which rows of w13 are the gate's, and which up's: the halves, or in gpt-oss each second one."""
    if layer.activation == MoEActivation.SWIGLUOAI:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(num_rows // 2), slice(num_rows // 2, None)


class KeptExpertsMethod(Kept, UnquantizedFusedMoEMethod):  # type: ignore[misc]
    pass


class WholeCopies(nn.Parameter):
    """A parameter that vLLM's gpt-oss fills by `copy_`, all experts at once and past its loader."""

    weight_loader: Callable[..., Any]

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self.weight_loader(self, source)
        return self


def drop_parameters(layer: RoutedExperts) -> None:
    """Give the memory of what was loaded back."""
    # vLLM may go on to offer the experts of other ranks, which has to find something.
    names = [name for name in layer._parameters if name.startswith(("w13_", "w2_"))]
    take_nothing(layer, names, lambda *arguments, **options: False)


def loading(layer: RoutedExperts) -> Callable[..., bool | None]:
    """The layer's loader, which also takes the tensor of all experts; a mapped one takes no memory afterwards."""

    def load(
        param: nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str = "",
        shard_id: str = "",
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> bool | None:
        done: bool | None = True
        if expert_id is None:
            param.data.as_subclass(torch.Tensor).copy_(loaded_weight)
        else:
            arguments = (param, loaded_weight, weight_name, shard_id, expert_id)
            done = layer.weight_loader(*arguments, return_success=return_success)
        if loaded_weight.is_contiguous() and not param.is_meta:
            forget_pages(loaded_weight)
        return done

    return load


def take_nothing(layer: RoutedExperts, names: Iterable[str], weight_loader: Callable[..., bool]) -> None:
    """Give a layer empty parameters, whose loader says whether what it is offered is this layer's."""
    for name in list(names):
        parameter = WholeCopies(torch.empty(0), requires_grad=False)
        parameter.weight_loader = weight_loader
        setattr(layer, name, parameter)


class QuantizeExpertsOnLoad(OnlineMoEMethodBase):  # type: ignore[misc]
    """Packs a layer's experts one by one, as soon as the last of the layer's weights has been read."""

    def __init__(self, moe: Any, storage: ExpertStorage, progress: Progress, prefix: str) -> None:
        super().__init__(moe)
        self.storage, self.progress, self.prefix = storage, progress, prefix
        self.is_done = False

    @property
    def supports_eplb(self) -> bool:
        return False

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self.progress.expect_layer()
        self.about = {
            "kernel": LowBitExperts.kernel,
            "storage": repr(self.storage),
            "shape": [num_experts, hidden_size, intermediate_size_per_partition],
        }
        found = None if self.progress.cache is None else self.progress.cache.read(self.prefix)
        if found is not None and found[0] == self.about:
            layer.low_bit = LowBitExperts.of_buffers(
                self.storage, ACTIVATIONS[layer.activation], intermediate_size_per_partition, found[1]
            )
            names = ("w13_weight", "w2_weight", *(("w13_bias", "w2_bias") if self.moe.has_bias else ()))
            take_nothing(layer, names, skip)
            return
        extra_weight_attrs["weight_loader"] = loading(layer)
        arguments = (num_experts, hidden_size, intermediate_size_per_partition, params_dtype)
        super().create_weights(layer, *arguments, **extra_weight_attrs)
        for parameter in layer.parameters(recurse=False):
            parameter.__class__ = WholeCopies

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        # vLLM calls this once when the layer is complete, and for all layers at the end.
        if self.is_done:
            return
        self.is_done = True
        if hasattr(layer, "low_bit"):  # as an earlier start has packed it
            self.progress.finish_layer(layer.low_bit)
            return
        self._zero_padding(layer)
        biases: tuple[torch.Tensor, ...] = ()
        if self.moe.has_bias:
            biases = (*self.gate_and_up(layer, layer.w13_bias), layer.w2_bias)
        layer.low_bit = LowBitExperts(
            self.experts(layer),
            len(layer.w13_weight),
            self.storage,
            ACTIVATIONS[layer.activation],
            *biases,
        )
        drop_parameters(layer)
        if self.progress.cache is not None:
            self.progress.cache.write(self.prefix, self.about, dict(layer.low_bit.named_buffers()))
        self.progress.finish_layer(layer.low_bit)

    def gate_and_up(self, layer: RoutedExperts, both: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of [experts, 2 * intermediate, ...]."""
        both = both.detach().as_subclass(torch.Tensor)
        return tuple(both[:, rows] for rows in gate_and_up(layer, both.shape[1]))

    def experts(self, layer: RoutedExperts) -> Iterator[Expert]:
        down = layer.w2_weight.detach().as_subclass(torch.Tensor)
        gate, up = self.gate_and_up(layer, layer.w13_weight)
        return zip(gate, up, down, strict=True)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)  # of the one expert that such models choose
            topk_weights = torch.ones_like(topk_weights)
        if layer.expert_map is not None:  # this rank has a part of the experts; those of others are -1
            mapped = layer.expert_map[topk_ids.clamp(min=0).long()]
            topk_ids = torch.where(topk_ids < 0, -1, mapped)
        y: torch.Tensor = layer.low_bit(x, topk_weights, topk_ids)
        return y
