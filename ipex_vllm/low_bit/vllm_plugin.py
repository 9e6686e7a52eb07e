"""vLLM's view of the low-bit formats: called by vLLM in each of its processes, through `vllm.general_plugins`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from ipex_vllm.low_bit import ipex_llm_checkpoint
from ipex_vllm.low_bit.checkpoint import IPEX_LLM_LOAD_FORMAT, IPEX_LLM_MARK, MARK, from_tensors, meta_tensors
from ipex_vllm.low_bit.formats import FORMATS, Format
from ipex_vllm.low_bit.matmul import LowBitLinear, make_linear, summarize
from ipex_vllm.low_bit.memory import forget_pages, trim_heap
from ipex_vllm.low_bit.quantize import QuantizedWeight, quantize, unsuitable_reason

# vLLM configures the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")


def register() -> None:
    """Register with vLLM one quantization method per format, `ipex_sym_int4` and so on, and a loader."""
    for config_class in LowBitConfig.__subclasses__():
        register_quantization_config(config_class.get_name())(config_class)
    register_model_loader(IPEX_LLM_LOAD_FORMAT)(IpexLlmLoader)


class LowBitConfig(QuantizationConfig):  # type: ignore[misc]
    """Quantize every linear layer and the output head while the checkpoint loads; embeddings stay as they are."""

    format: ClassVar[Format]

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress(self.format)
        self.method: type[LowBitMethod] = QuantizeOnLoad

    @classmethod
    def get_name(cls) -> str:
        return f"ipex_{cls.format.name}"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        raise NotImplementedError("CUDA GPUs are not supported; vLLM asks for this on no other device")

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowBitConfig:
        self = cls()
        self.method = OpenSaved
        return self

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take the checkpoints that `checkpoint.save` wrote, unless the user prefers the other layout they follow.

        Raises ValueError if the user asks for another format than theirs.
        """
        if hf_quant_cfg.get(MARK) != cls.format.name or user_quant == hf_quant_cfg["quant_method"]:
            return None
        if user_quant is not None and user_quant != cls.get_name():
            raise ValueError(already_quantized(cls.format.name, user_quant))
        return cls.get_name()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        saved_in = getattr(hf_config, IPEX_LLM_MARK, None)
        if saved_in is not None and saved_in != self.format.name:
            raise ValueError(already_quantized(saved_in, self.get_name()))
        # The loader of ipex-llm's checkpoints hands out blocks of 4 bits as they are, and others dequantized.
        if saved_in is not None and self.format.bits == 4:
            self.method = OpenSaved

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase | ParallelLMHead):
            return self.method(self, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return EmbeddingMethod()
        if isinstance(layer, RoutedExperts):
            logger.warning("%s: mixture-of-experts weights are not quantized", prefix)
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return None


class IpexSymInt4Config(LowBitConfig):
    format = FORMATS["sym_int4"]


class IpexAsymInt4Config(LowBitConfig):
    format = FORMATS["asym_int4"]


class IpexSymInt5Config(LowBitConfig):
    format = FORMATS["sym_int5"]


class IpexAsymInt5Config(LowBitConfig):
    format = FORMATS["asym_int5"]


class IpexSymInt8Config(LowBitConfig):
    format = FORMATS["sym_int8"]


class IpexFp8E4m3Config(LowBitConfig):
    format = FORMATS["fp8_e4m3"]


class IpexFp8E5m2Config(LowBitConfig):
    format = FORMATS["fp8_e5m2"]


class IpexNf4Config(LowBitConfig):
    format = FORMATS["nf4"]


class IpexFp4Config(LowBitConfig):
    format = FORMATS["fp4"]


class IpexFp6Config(LowBitConfig):
    format = FORMATS["fp6"]


def already_quantized(format_name: str, asked_for: str) -> str:
    return (
        f"the checkpoint is already quantized ({format_name}): leave --quantization {asked_for} out to serve it as it "
        "is, or give the original checkpoint"
    )


class EmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding as it is. vLLM would pack a second copy of it for a matmul that only an output head does."""

    def process_weights_after_loading(self, layer: Any) -> None:
        pass


def forgetting(weight_loader: Callable[..., None]) -> Callable[..., None]:
    """The weight loader, after which a mapped checkpoint's tensor no longer takes memory."""

    @functools.wraps(weight_loader)
    def load(param: nn.Parameter, loaded_weight: torch.Tensor, *arguments: Any, **options: Any) -> None:
        weight_loader(param, loaded_weight, *arguments, **options)
        forget_pages(loaded_weight)

    return load


class LowBitMethod(LinearMethodBase):  # type: ignore[misc]
    """Packs its layer for its kernel as soon as the last of its weights has been read, one layer at a time."""

    # Makes vLLM finish the layers whose weights did not all come from the checkpoint: padded or tied output heads.
    uses_meta_device = True

    def __init__(self, config: LowBitConfig, prefix: str) -> None:
        self.config = config
        self.prefix = prefix
        self.embedding_layer: Any = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Any,
        **extra_weight_attrs: Any,
    ) -> None:
        format = self.config.format
        if reason := unsuitable_reason(format, self.unsplit_inputs(input_size, input_size_per_partition)):
            logger.warning("%s stays in %s: %s", self.prefix, params_dtype, reason)
            is_head = isinstance(layer, ParallelLMHead)
            layer.quant_method = UnquantizedEmbeddingMethod() if is_head else UnquantizedLinearMethod()
            layer.quant_method.create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                weight_loader=weight_loader,
                **extra_weight_attrs,
            )
            return
        layer.low_bit_dtype = params_dtype
        for name, parameter in self.parameters(
            sum(output_partition_sizes), input_size_per_partition, params_dtype, forgetting(weight_loader)
        ):
            layer.register_parameter(name, parameter)
        initialize_online_processing(layer)
        self.config.progress.expect_layer()

    def unsplit_inputs(self, input_size: int, input_size_per_partition: int) -> int:
        """How many inputs the groups have to divide."""
        raise NotImplementedError

    def parameters(
        self, out_features: int, in_features: int, dtype: torch.dtype, weight_loader: Any
    ) -> Iterator[tuple[str, BasevLLMParameter]]:
        """The parameters, on the meta device, that the checkpoint's tensors are loaded into."""
        raise NotImplementedError

    def quantized_weight(self, layer: Any) -> QuantizedWeight:
        """The layer's weight, from the parameters just loaded."""
        raise NotImplementedError

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        self.embedding_layer = embed_tokens
        self.drop_parameters(layer)
        return layer

    def drop_parameters(self, layer: Any) -> None:
        for name in list(layer._parameters):
            # vLLM adds the bias itself, and loads the shape once more for each part of a merged layer.
            if name not in ("bias", "weight_shape"):
                delattr(layer, name)

    def process_weights_after_loading(self, layer: Any) -> None:
        # vLLM calls this once when the layer is complete, and for all layers at the end.
        if hasattr(layer, "low_bit"):
            return
        if self.embedding_layer is not None:
            weight = quantize(self.embedding_layer.weight.detach(), self.config.format)
        else:
            weight = self.quantized_weight(layer)
            self.drop_parameters(layer)
        layer.low_bit = make_linear(weight, layer.low_bit_dtype)
        self.config.progress.finish_layer(layer.low_bit)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = layer.low_bit(x, bias)
        return y


@register_weight_loader_v2_supported_method
class QuantizeOnLoad(LowBitMethod):
    """For a checkpoint in full precision. Each rank quantizes its own part of a layer."""

    def unsplit_inputs(self, input_size: int, input_size_per_partition: int) -> int:
        return input_size_per_partition

    def parameters(
        self, out_features: int, in_features: int, dtype: torch.dtype, weight_loader: Any
    ) -> Iterator[tuple[str, BasevLLMParameter]]:
        data = torch.empty((out_features, in_features), dtype=dtype, device="meta")
        yield "weight", ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)

    def quantized_weight(self, layer: Any) -> QuantizedWeight:
        return quantize(layer.weight.detach(), self.config.format)


@register_weight_loader_v2_supported_method
class OpenSaved(LowBitMethod):
    """For a checkpoint whose layers are stored as `checkpoint.to_tensors` lays them out."""

    def unsplit_inputs(self, input_size: int, input_size_per_partition: int) -> int:
        # What was left unquantized when it was saved, whatever the ranks there are now.
        return input_size

    def parameters(
        self, out_features: int, in_features: int, dtype: torch.dtype, weight_loader: Any
    ) -> Iterator[tuple[str, BasevLLMParameter]]:
        if reason := unsuitable_reason(self.config.format, in_features):
            raise ValueError(f"{self.prefix} cannot be split over so many ranks: {reason}")
        for name, like in meta_tensors(self.config.format, out_features, in_features).items():
            if name == "weight_shape":
                yield name, BasevLLMParameter(data=like, weight_loader=weight_loader)
            elif name == "weight_scale" and self.config.format.group_size is None:
                yield name, ChannelQuantScaleParameter(data=like, output_dim=0, weight_loader=weight_loader)
            else:
                yield name, ModelWeightParameter(data=like, input_dim=1, output_dim=0, weight_loader=weight_loader)

    def quantized_weight(self, layer: Any) -> QuantizedWeight:
        return from_tensors(self.config.format, {name: tensor.detach() for name, tensor in layer.named_parameters()})


class IpexLlmLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads a local checkpoint that ipex-llm's `save_low_bit` wrote."""

    def download_model(self, model_config: Any) -> None:
        pass

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        return ipex_llm_checkpoint.read(Path(source.model_or_path))


class Progress:
    """A bar over the layers being quantized, on the first rank, and at its end one line per kernel in use."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.expected = 0
        self.bar: tqdm[Any] | None = None
        self.finished: list[LowBitLinear] = []

    def expect_layer(self) -> None:
        self.expected += 1

    def finish_layer(self, linear: LowBitLinear) -> None:
        if self.bar is None:
            is_first_rank = get_tensor_model_parallel_rank() == 0
            self.bar = tqdm(
                total=self.expected, desc=f"Loading {self.format.name}", unit="layer", disable=not is_first_rank
            )
        self.bar.update()
        self.finished.append(linear)
        if len(self.finished) == self.expected:
            self.bar.close()
            for line in summarize(self.finished):
                logger.info("%s", line)
            self.finished.clear()
            trim_heap()
