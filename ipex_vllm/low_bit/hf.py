"""The low-bit formats on a Transformers model: its linear layers, replaced in place."""

from __future__ import annotations

import logging

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from ipex_vllm.low_bit import importance
from ipex_vllm.low_bit.formats import resolve
from ipex_vllm.low_bit.linear import make_linear, summarize
from ipex_vllm.low_bit.quantize import quantize
from ipex_vllm.low_bit.recipe import Storage, count_layers, on_load, summarize_kept

logger = logging.getLogger(__name__)


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


def quantize_model(
    model: nn.Module,
    format_name: str,
    device: str = "cpu",
    head: str | None = None,
    group_size: int | None = None,
    outer: str | None = None,
) -> nn.Module:
    """Quantize the `nn.Linear`s of `model`, in place, to the format called `format_name`, and return the model.

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
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    recipe = on_load(format, head, group_size=group_size, outer=outer, num_layers=count_layers(names))
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    importances = importance.of_model(model)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    replaced, kept = [], []
    for name, linear in tqdm(linears, desc=f"Quantizing to {format.name}", unit="layer"):
        storage = recipe.storage(name, linear.in_features, is_head=linear is output)
        if isinstance(storage, str):
            kept.append((name, storage))
            continue
        parent, _, child = name.rpartition(".")
        replacement = HfLowBitLinear(linear, storage, importances.get(name))
        setattr(model.get_submodule(parent), child, replacement)
        replaced.append(replacement.low_bit)
    for line in (*summarize(replaced), *summarize_kept(kept)):
        logger.info("%s", line)
    return model
