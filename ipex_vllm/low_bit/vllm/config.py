"""The quantization methods as vLLM knows them: a class for each format, which says how each layer is quantized."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from ipex_vllm.low_bit import importance
from ipex_vllm.low_bit.formats import FORMATS, Format
from ipex_vllm.low_bit.readers import ipex_llm, ours
from ipex_vllm.low_bit.recipe import Recipe, on_load
from ipex_vllm.low_bit.vllm.experts import experts_method
from ipex_vllm.low_bit.vllm.linear import EmbeddingMethod, LowBitMethod, OpenSaved, QuantizeOnLoad
from ipex_vllm.low_bit.vllm.packed_cache import PackedCache
from ipex_vllm.low_bit.vllm.progress import Progress
from ipex_vllm.low_bit.vllm.saved_experts import saved_experts_method


class OwnConfig(QuantizationConfig):  # type: ignore[misc]
    """What all of this package's methods answer alike."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        raise NotImplementedError("CUDA GPUs are not supported; vLLM asks for this on no other device")

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


class LowBitConfig(OwnConfig):
    """Quantize the linear layers and the output head while the checkpoint loads; embeddings stay as they are.

    vLLM's `additional_config` may choose the head's format and the group size, by the names that `save` writes into a
    checkpoint: `--additional-config '{"ipex_vllm_head": "none", "ipex_vllm_group_size": 32}'`.
    """

    format: ClassVar[Format]

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress(self.format.name)
        self.method: type[LowBitMethod] = QuantizeOnLoad
        self.recipe: Recipe | None = None
        self.importance_file: Path | None = None
        self.mapper: WeightsMapper | None = None
        self.has_saved_experts = False

    @classmethod
    def get_name(cls) -> str:
        return f"ipex_{cls.format.name}"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowBitConfig:
        self = cls()
        self.method, self.recipe = OpenSaved, ours.recipe_of(config)
        self.has_saved_experts = config.get(ours.EXPERTS, False)
        return self

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take the checkpoints that `save.save` wrote, unless the user prefers the other layout they follow.

        Raises ValueError if the user asks for another format than theirs.
        """
        if hf_quant_cfg.get(ours.MARK) != cls.format.name or user_quant == hf_quant_cfg["quant_method"]:
            return None
        if user_quant is not None and user_quant != cls.get_name():
            raise ValueError(already_quantized(cls.format.name, user_quant))
        return cls.get_name()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        saved_in = getattr(hf_config, ipex_llm.MARK, None)
        if saved_in is not None and saved_in != self.format.name:
            raise ValueError(already_quantized(saved_in, self.get_name()))
        if saved_in is not None:
            self.method, self.recipe = OpenSaved, ipex_llm.recipe_of(self.format)
        if self.method is QuantizeOnLoad:
            self.importance_file = importance.of_checkpoint(model_name)

    @functools.cached_property
    def importances(self) -> dict[str, torch.Tensor]:
        """By vLLM's names, which for some models (gpt-oss) are not those of the checkpoint."""
        found = importance.read(self.importance_file)
        if self.mapper is None:
            return found
        return {self.mapper.map_name(name) or name: each for name, each in found.items()}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.mapper = hf_to_vllm_mapper

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if self.recipe is None:  # a vLLM config is at hand only while the model is built
            self.recipe = recipe_on_load(self.format)
            self.progress.cache = PackedCache.of_the_model(self.recipe, self.importance_file)
        if isinstance(layer, LinearBase | ParallelLMHead):
            found = importance.find(self.importances, prefix, self.packed_modules_mapping)
            return self.method(self.recipe, self.progress, prefix, found, self.progress.cache)
        if isinstance(layer, VocabParallelEmbedding):
            return EmbeddingMethod(self.recipe, self.progress, prefix)
        if isinstance(layer, RoutedExperts):
            # Stacked experts are as they were in a saved checkpoint, too.
            choose = saved_experts_method if self.has_saved_experts else experts_method
            return choose(layer, self.recipe, self.progress, prefix)
        return None


def recipe_on_load(format: Format) -> Recipe:
    """The recipe for the model being built, with the wishes in vLLM's `additional_config`."""
    config = get_current_vllm_config()
    wishes = config.additional_config if isinstance(config.additional_config, dict) else {}
    head, group_size, outer = (wishes.get(name) for name in (ours.HEAD, ours.GROUP_SIZE, ours.OUTER))
    num_layers = 0 if outer is None else config.model_config.hf_text_config.num_hidden_layers
    return on_load(format, head, current_platform.device_type, group_size, outer, num_layers)


def _config_class(format: Format) -> type[LowBitConfig]:
    """The class of a format, under a name of this module: vLLM pickles its objects for the processes it starts."""
    name = f"Ipex{format.name.title().replace('_', '')}Config"
    config_class = type(name, (LowBitConfig,), {"format": format, "__module__": __name__, "__qualname__": name})
    globals()[name] = config_class
    return config_class


CONFIGS = tuple(_config_class(format) for format in FORMATS.values() if format.kind != "dtype")


def already_quantized(format_name: str, asked_for: str) -> str:
    return (
        f"the checkpoint is already quantized ({format_name}): leave --quantization {asked_for} out to serve it as it "
        "is, or give the original checkpoint"
    )
