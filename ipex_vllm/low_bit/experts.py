"""A layer of experts with quantized weights: what `linear.py` is for one matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ipex_vllm.low_bit.kernels import experts as kernel
from ipex_vllm.low_bit.quantize import quantize
from ipex_vllm.low_bit.recipe import ExpertStorage

# The weights of one expert: gate [intermediate, hidden], up likewise, down [hidden, intermediate].
Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class LowBitExperts(nn.Module):
    """The experts of one layer, of which each token goes through a few.

    Attributes:
        kernel, format: as of `LowBitLinear`.
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
        """Quantize the `experts` one by one; nothing but what is packed is kept of one when the next is taken.

        `activation` is one of `kernel.ACTIVATIONS`; biases are [experts, features].
        Raises ValueError for weights that are not finite or too large for the scale.
        """
        super().__init__()
        self.format, self.storage = storage.gate_up.format, storage
        self.activation = kernel.ACTIVATIONS[activation]
        for index, (gate, up, down) in enumerate(experts):
            pieces = {
                "gate_up": (kernel.in_turn(gate.detach(), up.detach()), storage.gate_up),
                "down": (down.detach(), storage.down),
            }
            for name, (weight, how) in pieces.items():
                packed = kernel.pack(quantize(weight, how.format, how.group_size or 0))
                if index == 0:
                    self.intermediate = len(gate)
                    buffer = torch.empty(num_experts, len(packed), dtype=torch.uint8)
                    self.register_buffer(name, buffer, persistent=False)
                getattr(self, name)[index] = packed
        gate_up_bias = None
        if gate_bias is not None and up_bias is not None:
            gate_up_bias = kernel.in_turn(gate_bias.float().t(), up_bias.float().t()).t().contiguous()
        self.register_buffer("gate_up_bias", gate_up_bias, persistent=False)
        down_bias = None if down_bias is None else down_bias.detach().float().contiguous()
        self.register_buffer("down_bias", down_bias, persistent=False)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The experts `ids` [tokens, chosen] of x [tokens, hidden], each times its weight, summed."""
        groups = (self.storage.gate_up.group_size or 0, self.storage.down.group_size or 0)
        return kernel.forward(
            x,
            self.gate_up,
            self.down,
            self.gate_up_bias,
            self.down_bias,
            weights.float(),
            ids.to(torch.int32),
            self.format.bits,
            self.intermediate,
            *groups,
            self.format.symmetric,
            self.activation,
        )
