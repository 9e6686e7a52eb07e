"""Our matmuls as one of vLLM's kernels for weights in words: AWQ's, GPTQ's, AutoRound's and compressed-tensors'.

vLLM's own configurations read those checkpoints, and ask a list of kernels which of them computes a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from ipex_vllm.low_bit import UPSTREAM_KERNELS
from ipex_vllm.low_bit.kernels.w4a8 import W4A8Linear
from ipex_vllm.low_bit.linear import make_linear
from ipex_vllm.low_bit.readers import words
from ipex_vllm.low_bit.vllm.progress import CheckpointProgress

BITS = {scalar_types.uint4: 4, scalar_types.uint4b8: 4, scalar_types.uint8b128: 8}


def leaves_to_upstream() -> bool:
    """Whether the model being built is one whose user wants vLLM's own kernels (`--upstream-kernels`)."""
    config = get_current_vllm_config_or_none()
    wishes = None if config is None else config.additional_config
    return isinstance(wishes, dict) and bool(wishes.get(UPSTREAM_KERNELS))


class IpexInt4LinearKernel(MPLinearKernel):  # type: ignore[misc]
    """Weights of 4 bits, with zero points or without, and of 8 without."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1  # of CUDA GPUs

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        inputs = c.partition_weight_shape[0]
        group_size = inputs if c.group_size == -1 else c.group_size
        if leaves_to_upstream():
            return False, "--upstream-kernels asks for another"
        if c.weight_type not in BITS:
            return False, f"it computes weights of 4 and 8 bits, not {c.weight_type}"
        if inputs % group_size or words.fitting_group_size(BITS[c.weight_type], group_size) is None:
            return False, f"it does not take {inputs} inputs in groups of {group_size}"
        reason = W4A8Linear.missing()
        return reason is None, reason

    def __init__(self, c: MPLinearLayerConfig, *names: str, **named: str) -> None:
        super().__init__(c, *names, **named)
        # What is added to the zero points as they are stored: GPTQ's first version has them less one.
        self.zero_offset = 0
        self.progress = CheckpointProgress.of_the_model()
        self.progress.expect_layer()

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "low_bit"):
            return
        bits = BITS[self.config.weight_type]
        weight, scales, zeros = self._get_weight_params(layer)
        codes = words.unpack(by_outputs(weight), bits)
        zero_points = None
        if self.config.weight_type == scalar_types.uint4:
            # [groups, outputs], where the last word of a group may have codes to spare.
            stored = words.unpack(zeros.data.t() if zeros.output_dim == 0 else zeros.data, bits)[:, : len(codes)]
            zero_points = ((stored + self.zero_offset) & 15).t()
        order = getattr(layer, "input_order", None)
        if order is not None:
            codes = codes[:, order]
        layer.low_bit = make_linear(words.quantized(bits, codes, by_outputs(scales), zero_points), self.config.act_type)
        for name in (self.w_s_name, self.w_zp_name):
            if name is not None and hasattr(layer, name):
                delattr(layer, name)
        # An adapter's layer (LoRA) asks the one that it wraps for the device and the dtype of its weight.
        empty = torch.empty(0, dtype=self.config.act_type)
        setattr(layer, self.w_q_name, nn.Parameter(empty, requires_grad=False))
        self.progress.finish_layer(layer.low_bit)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if hasattr(layer, "input_order"):
            x = x.index_select(-1, layer.input_order)
        y: torch.Tensor = layer.low_bit(x, bias)
        return y


def by_outputs(parameter: Any) -> torch.Tensor:
    """The parameter's values with a row for each output."""
    data: torch.Tensor = parameter.data
    return data if parameter.output_dim == 0 else data.t()


def register_kernel() -> None:
    """Put the kernel before vLLM's own ones for CPUs; a second call changes nothing."""
    possible = kernels._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if IpexInt4LinearKernel not in possible:
        possible.insert(0, IpexInt4LinearKernel)
