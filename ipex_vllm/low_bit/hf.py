"""The low-bit formats on a Transformers model: its linear layers and its experts, replaced in place."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ipex_vllm.low_bit import importance
from ipex_vllm.low_bit.experts import LowBitExperts
from ipex_vllm.low_bit.formats import resolve
from ipex_vllm.low_bit.kernels import experts as experts_kernel
from ipex_vllm.low_bit.linear import make_linear, summarize
from ipex_vllm.low_bit.quantize import quantize
from ipex_vllm.low_bit.recipe import ExpertStorage, Recipe, Storage, count_layers, on_load, summarize_kept

logger = logging.getLogger(__name__)

# By what configurations call them.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class HfLowBitLinear(nn.Module):
    """An `nn.Linear` whose weight is quantized."""

    def __init__(self, linear: nn.Linear, storage: Storage, importance: torch.Tensor | None) -> None:
        super().__init__()
        weight = linear.weight.detach()
        quantized = quantize(weight, storage.format, storage.group_size or 0, importance, scales_inputs=True)
        self.low_bit = make_linear(quantized, weight.dtype)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.low_bit(x, self.bias)
        return y


class HfLowBitExperts(nn.Module):
    """A layer's stacked experts, quantized."""

    def __init__(self, experts: Any, storage: ExpertStorage, activation: str) -> None:
        super().__init__()

        def gate_and_up(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if experts.is_concatenated:
                gate, up = rows.chunk(2, dim=1)
                return gate, up
            return rows[:, 0::2], rows[:, 1::2]

        gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        if experts.is_transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        biases: tuple[torch.Tensor | None, ...] = (None, None, None)
        if experts.has_bias:
            biases = (*gate_and_up(experts.gate_up_proj_bias.detach()), experts.down_proj_bias)
        weights = zip(*gate_and_up(gate_up), down, strict=True)
        self.low_bit = LowBitExperts(weights, len(down), storage, activation, *biases)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        y: torch.Tensor = self.low_bit(hidden_states, top_k_weights, top_k_index)
        return y


def activation_of(experts: Any) -> str | None:
    """What the operator calls the activation of Transformers' stacked `experts`; None if it has none like it."""
    from transformers.integrations import moe  # from Transformers 5 on, which alone has stacked experts of this kind

    if not experts.has_gate:
        return None
    if type(experts)._apply_gate is moe._default_apply_gate:
        return ACTIVATIONS.get(getattr(experts.config, "hidden_act", "")) if experts.is_concatenated else None
    is_gpt_oss = type(experts).__name__ == "GptOssExperts" and (experts.alpha, experts.limit) == (1.702, 7.0)
    return "clamped_swiglu" if is_gpt_oss else None


def replace_experts(model: nn.Module, recipe: Recipe) -> tuple[list[LowBitExperts], list[tuple[str, str]]]:
    """Quantize the stacked experts of `model` in place; those now in it, and which stay and why."""
    replaced, kept = [], []
    layers = [(name, each) for name, each in model.named_modules() if hasattr(each, "is_concatenated")]
    for name, experts in tqdm(layers, desc="Quantizing experts", unit="layer", disable=not layers):
        hidden, intermediate = experts.down_proj.shape[1:]
        if experts.is_transposed:
            hidden, intermediate = intermediate, hidden
        storage, activation = recipe.expert_storage(name, hidden, intermediate), activation_of(experts)
        reason = storage if isinstance(storage, str) else experts_kernel.unavailable_reason()
        if activation is None:
            reason = f"there is no kernel for {type(experts).__name__}"
        if reason is not None or isinstance(storage, str) or activation is None:
            kept.append((name, str(reason)))
            continue
        parent, _, child = name.rpartition(".")
        replacement = HfLowBitExperts(experts, storage, activation)
        setattr(model.get_submodule(parent), child, replacement)
        replaced.append(replacement.low_bit)
    return replaced, kept


def quantize_model(
    model: nn.Module,
    format_name: str,
    device: str = "cpu",
    head: str | None = None,
    group_size: int | None = None,
    outer: str | None = None,
) -> nn.Module:
    """Quantize the linear layers and stacked experts of `model`, in place, to the format `format_name`; return it.

    Which inputs of a layer matter is measured first (`importance.py`), and rounding follows that. Layers are replaced
    one at a time, so the peak is one layer above what is there already. Embeddings stay as they are, also where the
    output head shares their weight. `head`, `group_size` and `outer` are those of `recipe.on_load`. bf16, fp16 and fp32
    only change the model's dtype. The model is moved to `device` first. Raises ValueError for an unknown format, or one
    without a kernel on `device`.
    """
    format = resolve(format_name)
    if format.kind == "dtype":
        return model.to(device, getattr(torch, str(format.dtype)))
    if device != "cpu":
        raise ValueError(f"{format.name} on a Transformers model runs on the CPU only; use bf16 or fp16 on {device}")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    recipe = on_load(format, head, group_size=group_size, outer=outer, num_layers=count_layers(linears))
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    importances = importance.of_model(model)
    replaced, kept = [], []
    for name, linear in tqdm(linears.items(), desc=f"Quantizing to {format.name}", unit="layer"):
        storage = recipe.storage(name, linear.in_features, is_head=linear is output)
        if isinstance(storage, str):
            kept.append((name, storage))
            continue
        parent, _, child = name.rpartition(".")
        replacement = HfLowBitLinear(linear, storage, importances.get(name))
        setattr(model.get_submodule(parent), child, replacement)
        replaced.append(replacement.low_bit)
    experts, kept_experts = replace_experts(model, recipe)
    for line in (*summarize([*replaced, *experts]), *summarize_kept(kept + kept_experts)):
        logger.info("%s", line)
    return model
