"""The low-bit formats on a Transformers model: its linear layers, replaced in place."""

from __future__ import annotations

import logging

import torch
from torch import nn
from tqdm import tqdm

from ipex_vllm.low_bit.formats import resolve
from ipex_vllm.low_bit.linear import make_linear, summarize
from ipex_vllm.low_bit.quantize import quantize, unsuitable_reason

logger = logging.getLogger(__name__)


class HfLowBitLinear(nn.Module):
    """An `nn.Linear` whose weight is quantized."""

    def __init__(self, linear: nn.Linear, format_name: str) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.low_bit = make_linear(quantize(weight, resolve(format_name)), weight.dtype)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.low_bit(x, self.bias)
        return y


def quantize_model(model: nn.Module, format_name: str, device: str = "cpu") -> nn.Module:
    """Quantize every `nn.Linear` of `model`, in place, to the format called `format_name`, and return the model.

    Layers are replaced one at a time, so the peak is one layer above what is there already. Embeddings stay as they
    are, also where the output head shares their weight. bf16, fp16 and fp32 only change the model's dtype. The model
    is moved to `device` first. Raises ValueError for an unknown format, or one without a kernel on `device`.
    """
    format = resolve(format_name)
    if format.kind == "dtype":
        return model.to(device, getattr(torch, str(format.dtype)))
    if device != "cpu":
        raise ValueError(f"{format.name} on a Transformers model runs on the CPU only; use bf16 or fp16 on {device}")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    replaced = []
    for name, linear in tqdm(linears, desc=f"Quantizing to {format.name}", unit="layer"):
        if reason := unsuitable_reason(format, linear.in_features):
            logger.warning("%s stays in %s: %s", name, linear.weight.dtype, reason)
            continue
        parent, _, child = name.rpartition(".")
        replacement = HfLowBitLinear(linear, format_name)
        setattr(model.get_submodule(parent), child, replacement)
        replaced.append(replacement.low_bit)
    for line in summarize(replaced):
        logger.info("%s", line)
    return model
