"""What vLLM does with a linear layer: making its parameters, packing them for a kernel, and calling that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.models.utils import StageMissingLayer
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, ModelWeightParameter

from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.layout import from_tensors, meta_tensors
from ipex_vllm.low_bit.linear import describe, make_linear, open_linear
from ipex_vllm.low_bit.quantize import QuantizedWeight, quantize
from ipex_vllm.low_bit.recipe import Recipe, Storage
from ipex_vllm.low_bit.vllm.packed_cache import PackedCache
from ipex_vllm.low_bit.vllm.progress import Progress
from ipex_vllm.machine.memory import forget_pages


class EmbeddingMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """An embedding as it is, and a quantized copy of it where the model has it for its output head, too.

    Gemma 2 and Cohere multiply with the embedding itself, which only the first such call tells: at the latest that of
    the request with which a worker warms up.
    """

    def __init__(self, recipe: Recipe, progress: Progress, prefix: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.progress = progress
        self.prefix = prefix or "the embedding"  # which some models do not name

    def process_weights_after_loading(self, layer: Any) -> None:
        pass  # vLLM would pack a second copy for a matmul that only an output head does

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not hasattr(layer, "low_bit"):
            layer.low_bit = self.quantized_head(layer.weight, x.dtype)
            if layer.low_bit is None:
                super().process_weights_after_loading(layer)
        y: torch.Tensor = super().apply(layer, x, bias) if layer.low_bit is None else layer.low_bit(x, bias)
        return y

    def quantized_head(self, weight: torch.Tensor, dtype: torch.dtype) -> LowBitLinear | None:
        storage = self.recipe.storage(self.prefix, weight.shape[1], is_head=True)
        if isinstance(storage, str):
            self.progress.keep_layer(self.prefix, storage)
            self.progress.report_kept_layers()
            return None
        linear = make_linear(quantize(weight.detach(), storage.format, storage.group_size or 0), dtype)
        self.progress.report_kernels([linear])
        return linear


class Kept:
    """Before one of vLLM's methods that leave a layer as it is: the line that says so."""

    def __init__(self, progress: Progress, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.progress = progress

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        self.progress.report_kept_layers()


class KeptLinearMethod(Kept, UnquantizedLinearMethod):  # type: ignore[misc]
    pass


class KeptHeadMethod(Kept, UnquantizedEmbeddingMethod):  # type: ignore[misc]
    pass


def forgetting(weight_loader: Callable[..., None]) -> Callable[..., None]:
    """The weight loader, after which a mapped checkpoint's tensor no longer takes memory."""

    @functools.wraps(weight_loader)
    def load(param: nn.Parameter, loaded_weight: torch.Tensor, *arguments: Any, **options: Any) -> None:
        weight_loader(param, loaded_weight, *arguments, **options)
        forget_pages(loaded_weight)

    return load


def skip(*_: Any, **__: Any) -> bool:
    """A weight loader for what is there already: the checkpoint's tensor is not read."""
    return True


def own_part(importance: torch.Tensor | None, input_size: int, part: int) -> torch.Tensor | None:
    """The importance of this rank's `part` of a layer's inputs; None where what was measured is another layer's."""
    if importance is None or len(importance) != input_size:
        return None
    first = 0 if part == input_size else get_tensor_model_parallel_rank() * part
    return importance[first : first + part]


class LowBitMethod(LinearMethodBase):  # type: ignore[misc]
    """Packs its layer for its kernel as soon as the last of its weights has been read, one layer at a time."""

    # Makes vLLM finish the layers whose weights did not all come from the checkpoint: padded or tied output heads.
    uses_meta_device = True
    storage: Storage

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        prefix: str,
        importance: torch.Tensor | None,
        cache: PackedCache | None = None,
    ) -> None:
        self.recipe = recipe
        self.progress = progress
        self.prefix = prefix
        self.importance = importance  # of all inputs of the layer, whatever part of them this rank has
        self.cache = cache
        self.kept: LowBitLinear | None = None  # what an earlier start has made of the layer
        self.embedding_layer: Any = None
        config = get_current_vllm_config_or_none()
        self.has_adapters = config is not None and config.lora_config is not None

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
        is_head = isinstance(layer, ParallelLMHead)
        inputs = self.unsplit_inputs(input_size, input_size_per_partition)
        storage = self.recipe.storage(self.prefix, inputs, is_head=is_head)
        if isinstance(storage, str):
            self.progress.keep_layer(self.prefix, storage)
            layer.quant_method = KeptHeadMethod(self.progress) if is_head else KeptLinearMethod(self.progress)
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
        self.storage = storage
        self.importance = own_part(self.importance, input_size, input_size_per_partition)
        layer.low_bit_dtype = params_dtype
        shape = (sum(output_partition_sizes), input_size_per_partition)
        self.kept = self.find_kept(shape, params_dtype)
        loader = forgetting(weight_loader) if self.kept is None else skip
        for name, parameter in self.parameters(*shape, params_dtype, loader):
            layer.register_parameter(name, parameter)
        if self.kept is None:
            initialize_online_processing(layer)
        self.progress.expect_layer()

    def find_kept(self, shape: tuple[int, int], dtype: torch.dtype) -> LowBitLinear | None:
        found = None if self.cache is None else self.cache.read(self.prefix)
        return found and open_linear(*found, self.storage.format, self.storage.group_size, shape, dtype)

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
        if isinstance(layer, StageMissingLayer):  # the output head of a model that is asked for vectors: never loaded
            self.progress.finish_layer()
            return
        if hasattr(layer, "low_bit"):
            return
        layer.low_bit = self.kept or self.made(layer)
        self.kept = None
        self.drop_parameters(layer)
        if self.has_adapters:
            # An adapter's layer (LoRA) asks the one that it wraps for the device and the dtype of its weight.
            device = next(layer.low_bit.buffers()).device
            layer.weight = torch.empty(0, dtype=layer.low_bit_dtype, device=device)
        self.progress.finish_layer(layer.low_bit)

    def made(self, layer: Any) -> LowBitLinear:
        """What the layer's weight becomes, which the cache keeps."""
        is_tied = self.embedding_layer is not None
        weight = self.quantize(self.embedding_layer.weight) if is_tied else self.quantized_weight(layer)
        self.drop_parameters(layer)  # before it is packed: that much less memory at once
        linear = make_linear(weight, layer.low_bit_dtype)
        if self.cache is not None and linear.is_packed:
            self.cache.write(self.prefix, describe(linear), dict(linear.named_buffers()))
        return linear

    def quantize(self, weight: torch.Tensor) -> QuantizedWeight:
        return quantize(
            weight.detach(), self.storage.format, self.storage.group_size or 0, self.importance, scales_inputs=True
        )

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
        return self.quantize(layer.weight)


@register_weight_loader_v2_supported_method
class OpenSaved(LowBitMethod):
    """For a checkpoint whose layers are stored as `layout.to_tensors` lays them out."""

    def unsplit_inputs(self, input_size: int, input_size_per_partition: int) -> int:
        # What was left unquantized when it was saved, whatever the ranks there are now.
        return input_size

    def parameters(
        self, out_features: int, in_features: int, dtype: torch.dtype, weight_loader: Any
    ) -> Iterator[tuple[str, BasevLLMParameter]]:
        group_size = self.storage.group_size
        if group_size is not None and in_features % group_size:
            reason = f"{in_features} inputs are no multiple of the group size {group_size}"
            raise ValueError(f"{self.prefix} cannot be split over so many ranks: {reason}")
        for name, like in meta_tensors(self.storage, out_features, in_features).items():
            if name == "weight_shape":
                yield name, BasevLLMParameter(data=like, weight_loader=weight_loader)
            elif name == "weight_scale" and group_size is None:
                yield name, ChannelQuantScaleParameter(data=like, output_dim=0, weight_loader=weight_loader)
            else:
                yield name, ModelWeightParameter(data=like, input_dim=1, output_dim=0, weight_loader=weight_loader)

    def quantized_weight(self, layer: Any) -> QuantizedWeight:
        return from_tensors(self.storage.format, {name: tensor.detach() for name, tensor in layer.named_parameters()})
