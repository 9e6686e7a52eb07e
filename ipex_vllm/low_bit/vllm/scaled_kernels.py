"""Our matmuls as vLLM's kernels for checkpoints of 8 bits: integers, and floats, with a scale an output or in blocks.

On CPUs vLLM 0.32 has none for blocks of floats without AMX, and rounds activations to 8-bit floats in the others; ours
leaves them as they are. Integers it gives to oneDNN where there is no AMX, which is wrong without VNNI: it adds
products in pairs and cuts the sum off at 16 bits. Ours rounds activations itself, in groups of inputs, where the
checkpoint has one scale for a token or for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear import (
    Fp8BlockScaledMMLinearKernel,
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8PerTensorScaledMMLinearKernel
from vllm.platforms import PlatformEnum, current_platform

from ipex_vllm.low_bit.formats import FORMATS, Format
from ipex_vllm.low_bit.kernels import w8a16
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.kernels.w8a8 import W8A8Linear
from ipex_vllm.low_bit.kernels.w8a16 import W8A16Linear
from ipex_vllm.low_bit.linear import make_linear
from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.vllm.int4_kernel import leaves_to_upstream
from ipex_vllm.low_bit.vllm.progress import CheckpointProgress

E4M3 = FORMATS["fp8_e4m3"]


class ScaledKernel:
    """What all of them share, before vLLM's base class."""

    format: ClassVar[Format]
    computed_by: ClassVar[type[LowBitLinear]]

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if not current_platform.is_cpu():
            return False, "is for CPUs"
        reason = cls.computed_by.missing()
        return reason is None, reason

    def start(self) -> None:
        self.progress = CheckpointProgress.of_the_model()
        self.progress.expect_layer()

    def finish(self, layer: Any, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """Pack the weight with these codes [out, in] and scales [out, groups], for activations of this dtype."""
        layer.low_bit = make_linear(QuantizedWeight(self.format, codes.contiguous(), scales), dtype)
        self.progress.finish_layer(layer.low_bit)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        y: torch.Tensor = layer.low_bit(x, bias)
        return y


def drop(layer: Any, names: Iterable[str], dtype: torch.dtype) -> None:
    """Leave empty parameters of these names: adapters (LoRA) ask for a weight's device and dtype.

    But where latent attention multiplies with the halves of a weight, which it takes as it was.
    """
    if not getattr(layer, "_cpu_skip_gemm_dispatch", False):
        for name in names:
            setattr(layer, name, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))


class IpexInt8LinearKernel(ScaledKernel, Int8ScaledMMLinearKernel):  # type: ignore[misc]
    format = FORMATS["sym_int8"]
    computed_by = W8A8Linear

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        return not leaves_to_upstream(), "--upstream-kernels asks for another"

    def __init__(self, c: Int8ScaledMMLinearLayerConfig, layer_param_names: Any) -> None:
        super().__init__(c, layer_param_names)
        self.start()

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale, *_ = self._get_layer_params(layer)  # the weight as [out, in]
        scales, dtype = scale.data.float().flatten(), torch.get_default_dtype()
        if not self.config.is_channelwise:  # one for each of the layers that are merged in this one
            scales = scales.repeat_interleave(torch.tensor(layer.logical_widths))
        self.finish(layer, weight.data, scales.unsqueeze(1), dtype)
        drop(layer, self.layer_param_names[:2], dtype)


class Fp8Kernel(ScaledKernel):
    format = E4M3
    computed_by = W8A16Linear


class IpexFp8LinearKernel(Fp8Kernel, FP8ScaledMMLinearKernel):  # type: ignore[misc]
    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if leaves_to_upstream():
            return False, "--upstream-kernels asks for another"
        shape = c.weight_quant_key.scale.group_shape
        if not shape.is_per_tensor() and not shape.is_per_channel():
            return False, f"computes a scale an output or a layer, not {shape}"
        return True, None

    def __init__(self, c: FP8ScaledMMLinearLayerConfig, layer_param_names: Any) -> None:
        super().__init__(c, layer_param_names)
        self.start()

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale, _, _ = self._get_layer_params(layer)  # the weight as [in, out]
        codes = weight.data.t()
        scales = scale.data.float().reshape(-1, 1).expand(len(codes), 1).contiguous()
        self.finish(layer, codes, scales, self.config.input_dtype)
        drop(layer, self.layer_param_names[:2], self.config.input_dtype)

    def apply_scaled_mm(self, **_: Any) -> torch.Tensor:
        raise NotImplementedError("`apply_weights` does without")


class IpexFp8BlockLinearKernel(Fp8Kernel, Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    apply_input_quant = False

    @classmethod
    def can_implement(cls, config: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        if leaves_to_upstream():
            return False, "--upstream-kernels asks for another"
        _, inputs = config.weight_shape
        block = config.weight_quant_key.scale.group_shape
        if block.row <= 0 or group_size(inputs, block.col) is None:
            return False, f"does not take {inputs} inputs in blocks of {block.row} x {block.col}"
        return True, None

    def __init__(self, config: FP8ScaledMMLinearLayerConfig) -> None:
        super().__init__(config)
        self.start()

    def process_weights_after_loading(self, layer: Any) -> None:
        parameters = self._get_layer_params(layer)
        codes, block = parameters.weight.data, self.weight_group_shape
        scales = block_scales(parameters.block_scale.data, codes.shape, (block.row, block.col))
        self.finish(layer, codes, scales, self.config.input_dtype)
        drop(layer, (parameters.WEIGHT, parameters.block_scale_attr), self.config.input_dtype)

    def apply_block_scaled_mm(self, *_: torch.Tensor, **__: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("`apply_weights` does without")


def group_size(inputs: int, block: int) -> int | None:
    """What a block's inputs are kept as, so that groups divide a layer's inputs even where blocks do not."""
    sizes = (size for size in sorted(w8a16.GROUP_SIZES, reverse=True) if block > 0)
    return next((size for size in sizes if block % size == 0 and inputs % size == 0), None)


def block_scales(scales: torch.Tensor, shape: Sequence[int], block: Sequence[int]) -> torch.Tensor:
    """The scales of blocks of so many outputs and inputs as float32 [out, groups], for a weight of this shape."""
    (outputs, inputs), (height, width) = shape, block
    size = group_size(inputs, width)
    assert size is not None
    rows = scales.float().repeat_interleave(height, dim=0)[:outputs]
    return rows.repeat_interleave(width // size, dim=1)[:, : inputs // size].contiguous()


def register_scaled_kernels() -> None:
    """Put the kernels before those of vLLM that round activations, floats' after those for AMX; once is enough."""
    integers = kernels._POSSIBLE_INT8_KERNELS[PlatformEnum.CPU]
    dense = kernels._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
    blocks = kernels._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if IpexFp8LinearKernel not in dense:
        integers.insert(0, IpexInt8LinearKernel)
        dense.insert(dense.index(CPUFp8PerTensorScaledMMLinearKernel) + 1, IpexFp8LinearKernel)
        blocks.append(IpexFp8BlockLinearKernel)
