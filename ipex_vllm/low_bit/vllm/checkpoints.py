"""vLLM's configurations for AWQ, GPTQ, AutoRound, compressed-tensors, fp8 and gpt-oss on CPUs, where our kernels go.

Registered under vLLM's names, in the place of its classes. What they add: experts, activations in float32, and GPTQ
with zero points or with inputs in the order of their importance (`desc_act`), which vLLM 0.32 refuses.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.inc.inc import INCConfig
from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override, get_linear_quant_method
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from ipex_vllm.low_bit.kernels import w4a8
from ipex_vllm.low_bit.vllm import fp8_experts, mxfp4
from ipex_vllm.low_bit.vllm.int4_kernel import IpexInt4LinearKernel, leaves_to_upstream, register_kernel
from ipex_vllm.low_bit.vllm.words_experts import (
    AwqExpertsMethod,
    CompressedExpertsMethod,
    GptqExpertsMethod,
    reason_for_upstream,
)

ACTIVATIONS = [torch.bfloat16, torch.float16, torch.float32]


class AwqConfig(AutoAWQConfig):  # type: ignore[misc]
    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return ACTIVATIONS

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if (
            isinstance(layer, RoutedExperts)
            and not is_layer_skipped(prefix, self.modules_to_not_convert, match_mode="substring")
            and reason_for_upstream(layer, self.weight_bits, self.group_size) is None
        ):
            return AwqExpertsMethod(self, layer.moe_config)
        return super().get_quant_method(layer, prefix)


class GptqConfig(AutoGPTQConfig):  # type: ignore[misc]
    """Both versions of the format, symmetric or not, in any order of the inputs."""

    TYPE_MAP: ClassVar = {**AutoGPTQConfig.TYPE_MAP, (4, False): scalar_types.uint4}

    def __init__(
        self, weight_bits: int, group_size: int, desc_act: bool, is_sym: bool, *others: Any, **named: Any
    ) -> None:
        self.is_reordered = desc_act and group_size != -1
        super().__init__(weight_bits, group_size, False, is_sym, *others, **named)

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return ACTIVATIONS

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        return WeightsMapper() if self.is_reordered else super().get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, RoutedExperts):
            return get_linear_quant_method(self, layer, prefix, GptqLinearMethod)
        if self.is_reordered:
            raise ValueError("GPTQ with inputs in another order (desc_act) has no kernel for experts")
        has_rule = bool(self.dynamic) and get_dynamic_override(self, prefix) is not None
        if not has_rule and reason_for_upstream(layer, self.weight_bits, self.group_size) is None:
            return GptqExpertsMethod(self, layer.moe_config)
        return super().get_quant_method(layer, prefix)


class InputGroups(BasevLLMParameter):  # type: ignore[misc]
    """Each input's group, int32 [inputs], -1 until it is loaded: the same for all that vLLM merges into one layer."""

    def _assert_and_load(self, loaded_weight: torch.Tensor) -> None:
        if self.data[0] >= 0 and not torch.equal(self.data, loaded_weight):
            raise ValueError("GPTQ: the parts of a merged layer have their inputs in different orders")
        super()._assert_and_load(loaded_weight)


@register_weight_loader_v2_supported_method
class GptqLinearMethod(AutoGPTQLinearMethod):  # type: ignore[misc]
    def __init__(self, quant_config: GptqConfig) -> None:
        # Upstream's goes on to ask whether its own kernels compute such a layer.
        self.quant_config = quant_config
        self.quant_type = quant_config.quant_type
        self.input_dtype = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        arguments = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        super().create_weights(layer, *arguments, **extra_weight_attrs)
        config = self.quant_config
        if not isinstance(self.kernel, IpexInt4LinearKernel):
            if config.is_reordered or not config.is_sym:
                what = "inputs in another order (desc_act)" if config.is_reordered else "zero points"
                _, reason = IpexInt4LinearKernel.can_implement(self.kernel.config)
                raise ValueError(f"GPTQ with {what} is computed by ipex_vllm's kernel alone, and {reason}")
            return
        if config.full_config.get("checkpoint_format") != "gptq_v2":
            self.kernel.zero_offset = 1
        if config.is_reordered:
            if input_size != input_size_per_partition:
                raise ValueError("GPTQ with inputs in another order (desc_act) is not split over ranks")
            unknown = torch.full((input_size,), -1, dtype=torch.int32)
            groups = InputGroups(data=unknown, weight_loader=extra_weight_attrs["weight_loader"])
            layer.register_parameter("g_idx", groups)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "g_idx"):
            order = layer.g_idx.data.long().argsort(stable=True)
            del layer.g_idx
            if not torch.equal(order, torch.arange(len(order))):
                layer.register_buffer("input_order", order, persistent=False)
        super().process_weights_after_loading(layer)


class AutoRoundConfig(INCConfig):  # type: ignore[misc]
    """AutoRound stores its weights as AWQ or as GPTQ does."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return ACTIVATIONS

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        own = self.config_parser.resolve(layer, prefix)
        if not own.is_wna16_int or own.bits != 4 or leaves_to_upstream():
            return super().get_quant_method(layer, prefix)
        is_head = isinstance(layer, ParallelLMHead)
        stored: GptqConfig | AwqConfig
        if own.is_gptq:
            stored = GptqConfig(own.bits, own.group_size, False, own.sym, is_head, {}, {})
        else:
            stored = AwqConfig(own.bits, own.group_size, not own.sym, is_head)
        stored.packed_modules_mapping = self.packed_modules_mapping
        return stored.get_quant_method(layer, prefix)


class CompressedConfig(CompressedTensorsConfig):  # type: ignore[misc]
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        own = self.own_experts_method(layer, prefix) if isinstance(layer, RoutedExperts) else None
        return own or super().get_quant_method(layer, prefix)

    def own_experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        self._add_fused_moe_to_target_scheme_map()
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        scheme, *others = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names]
        if not scheme or others != [scheme, scheme]:
            return None
        weights, inputs = scheme.get("weights"), scheme.get("input_activations")
        if scheme.get("format") == "pack-quantized" and self._is_wNa16_group_channel(weights, inputs):
            if reason_for_upstream(layer, weights.num_bits, weights.group_size or -1) is None:
                return CompressedExpertsMethod(weights, layer.moe_config)
        elif self._is_fp8_w8a8(weights, inputs) and weights.num_bits == 8:
            if fp8_experts.reason_for_upstream(layer, weights.block_structure) is None:
                return fp8_experts.CompressedFp8ExpertsMethod(weights, inputs, layer.moe_config)
        elif self._is_mxfp4(weights) and mxfp4.reason_for_upstream(layer) is None:
            return mxfp4.CompressedMxfp4ExpertsMethod(layer.moe_config)
        return None


class Fp8CheckpointConfig(Fp8Config):  # type: ignore[misc]
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if (
            isinstance(layer, RoutedExperts)
            and self.store_dtype is None
            and not is_layer_skipped(
                prefix,
                self.ignored_layers,
                self.packed_modules_mapping,
                match_mode=self.ignored_layers_match_mode,
            )
            and fp8_experts.reason_for_upstream(layer, self.weight_block_size) is None
        ):
            return fp8_experts.Fp8ExpertsMethod(self, layer)
        return super().get_quant_method(layer, prefix)


# By the names that vLLM has for them.
CONFIGS: dict[type[QuantizationConfig], tuple[str, ...]] = {
    AwqConfig: ("awq", "awq_marlin", "auto_awq"),
    GptqConfig: ("gptq", "gptq_marlin", "auto_gptq"),
    AutoRoundConfig: ("inc",),
    CompressedConfig: ("compressed-tensors",),
    mxfp4.OssConfig: ("gpt_oss_mxfp4",),
    Fp8CheckpointConfig: ("fp8",),
}


def register_checkpoints() -> None:
    """Let our kernels compute such checkpoints, where they run; without them all stays vLLM's."""
    if not current_platform.is_cpu() or w4a8.unavailable_reason() is not None:
        return
    register_kernel()
    mxfp4.register_kernel()
    for config_class, names in CONFIGS.items():
        for name in names:
            register_quantization_config(name)(config_class)
