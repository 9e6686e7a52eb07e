"""A layer of experts with quantized weights: what `linear.py` is for one matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Self

import torch
from torch import nn

from ipex_vllm.low_bit.kernels import experts as kernel
from ipex_vllm.low_bit.quantize import QuantizedWeight, quantize
from ipex_vllm.low_bit.recipe import ExpertStorage, Storage

# A weight, or one that is quantized already, as its storage says.
Weight = torch.Tensor | QuantizedWeight
# The weights of one expert: gate [intermediate, hidden], up likewise, down [hidden, intermediate].
Expert = tuple[Weight, Weight, Weight]


def quantized(weight: Weight, storage: Storage) -> QuantizedWeight:
    if isinstance(weight, QuantizedWeight):
        return weight
    return quantize(weight.detach(), storage.format, storage.group_size or 0)


def in_turn(gate: QuantizedWeight, up: QuantizedWeight) -> QuantizedWeight:
    """Both as one weight, in the order of `kernel.in_turn`."""
    mins = None if gate.mins is None or up.mins is None else kernel.in_turn(gate.mins, up.mins)
    codes, scales = kernel.in_turn(gate.codes, up.codes), kernel.in_turn(gate.scales, up.scales)
    return replace(gate, codes=codes, scales=scales, mins=mins)


class LowBitExperts(nn.Module):
    """The experts of one layer, of which each token goes through a few.

    Attributes:
        kernel, format: as of `LowBitLinear`; the format is that of gate and up.
    """

    kernel = "experts"
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def __init__(
        self,
        experts: Iterable[Expert],
        num_experts: int,
        storage: ExpertStorage,
        activation: str,
        gate_bias: torch.Tensor | None = None,
        up_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
    ) -> None:
        """Pack the `experts` one by one, quantizing those that are not quantized.

        Nothing but what is packed is kept of one when the next is taken.

        `activation` is one of `kernel.ACTIVATIONS`; biases are [experts, features].
        Raises ValueError for weights that are not finite or too large for the scale.
        """
        super().__init__()
        self.describe(storage, activation)
        for index, (gate, up, down) in enumerate(experts):
            halves = [quantized(half, storage.gate_up) for half in (gate, up)]
            for name, weight in (("gate_up", in_turn(*halves)), ("down", quantized(down, storage.down))):
                packed = kernel.pack(weight)
                if index == 0:
                    self.intermediate = len(halves[0].codes)
                    buffer = torch.empty(num_experts, len(packed), dtype=torch.uint8)
                    self.register_buffer(name, buffer, persistent=False)
                getattr(self, name)[index] = packed
        gate_up_bias = None
        if gate_bias is not None and up_bias is not None:
            gate_up_bias = kernel.in_turn(gate_bias.float().t(), up_bias.float().t()).t().contiguous()
        self.register_buffer("gate_up_bias", gate_up_bias, persistent=False)
        down_bias = None if down_bias is None else down_bias.detach().float().contiguous()
        self.register_buffer("down_bias", down_bias, persistent=False)

    @classmethod
    def of_buffers(
        cls, storage: ExpertStorage, activation: str, intermediate: int, buffers: Mapping[str, torch.Tensor]
    ) -> Self:
        """A layer of the `named_buffers` of another."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.describe(storage, activation)
        self.intermediate = intermediate
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            self.register_buffer(name, buffers.get(name), persistent=False)
        return self

    def describe(self, storage: ExpertStorage, activation: str) -> None:
        """Set what depends on no weight."""
        self.format, self.storage = storage.gate_up.format, storage
        self.activation = kernel.ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The experts `ids` [tokens, chosen] of x [tokens, hidden], each times its weight, summed."""
        gate_up, down = self.storage.gate_up, self.storage.down
        return kernel.forward(
            x,
            self.gate_up,
            self.down,
            self.gate_up_bias,
            self.down_bias,
            weights.float(),
            ids.to(torch.int32),
            kernel.FORMATS[gate_up.format.name],
            kernel.FORMATS[down.format.name],
            self.intermediate,
            gate_up.group_size or 0,
            down.group_size or 0,
            self.activation,
        )
