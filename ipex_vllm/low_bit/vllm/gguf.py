"""What vLLM does with a model from a GGUF file: the blocks that a layer gets, its kernels, and the shared embedding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.parameter import BasevLLMParameter

from ipex_vllm.low_bit.linear import make_linear
from ipex_vllm.low_bit.parts import codes_of, joined, own_inputs, padded
from ipex_vllm.low_bit.quantize import QuantizedWeight
from ipex_vllm.low_bit.readers import ggml, gguf
from ipex_vllm.low_bit.recipe import DECODER_LAYER, ROUTER
from ipex_vllm.low_bit.rows import Rows
from ipex_vllm.low_bit.vllm.config import OwnConfig
from ipex_vllm.low_bit.vllm.gguf_experts import BlocksExpertsMethod
from ipex_vllm.low_bit.vllm.progress import Progress
from ipex_vllm.machine.gguf import read_header
from ipex_vllm.machine.memory import forget_pages


class GgufConfig(OwnConfig):
    """Each weight in the format that its blocks in the file have; a layer of several weights may have several."""

    def __init__(self, files: list[str]) -> None:
        super().__init__()
        header = read_header([Path(file) for file in files])
        self.kinds = sorted({tensor.kind for tensor in header.tensors.values()})
        layers = range(header.metadata[f"{header.metadata['general.architecture']}.block_count"])
        self.expert_kinds = {layer: gguf.expert_kinds(header, layer) for layer in layers}
        self.is_tied = "output.weight" not in header.tensors
        self.progress = Progress("GGUF")

    @classmethod
    def get_name(cls) -> str:
        return gguf.METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GgufConfig:
        return cls(config[gguf.FILES])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if ROUTER.search(prefix) else BlocksLinearMethod(self.kinds, self.progress)
        if isinstance(layer, VocabParallelEmbedding):
            return BlocksEmbeddingMethod(self.kinds, self.is_tied, self.progress)
        if isinstance(layer, RoutedExperts):
            found = DECODER_LAYER.search(prefix)
            kinds = None if found is None else self.expert_kinds[int(found[1])]
            if kinds is not None:
                return BlocksExpertsMethod(layer.moe_config, kinds, self.progress)
            self.progress.keep_layer(prefix, "experts are written out in full precision")
            return UnquantizedFusedMoEMethod(layer.moe_config)
        return None


class BlocksParameter(BasevLLMParameter):  # type: ignore[misc]
    """Keeps the blocks that are loaded, where they lie in the mapped file; it has no elements of its own.

    Attributes:
        pieces: for each weight of the layer that has blocks of this type: its first output, its rows, and which part
            of the inputs is this rank's, as (rank, ranks).
    """

    output_dim, input_dim = 0, 1

    def __init__(self, data: torch.Tensor, kind: str, num_outputs: int, weight_loader: Any) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.kind = kind
        self.num_outputs = num_outputs
        self.pieces: list[tuple[int, torch.Tensor, tuple[int, int]]] = []

    def keep(self, offset: int, rows: torch.Tensor, part: tuple[int, int] = (0, 1)) -> None:
        self.pieces.append((offset, rows, part))

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self.keep(0, loaded_weight.narrow(0, self.tp_rank * self.num_outputs, self.num_outputs))

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self.keep(0, loaded_weight, (self.tp_rank, self.tp_size))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **shard: Any) -> None:
        size = shard["shard_size"]
        self.keep(shard["shard_offset"], loaded_weight.narrow(0, self.tp_rank * size, size))

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **shard: Any) -> None:
        size = shard["shard_size"]
        rank = self.tp_rank if shard["shard_id"] == "q" else self.tp_rank // shard["num_heads"]
        self.keep(shard["shard_offset"], loaded_weight.narrow(0, rank * size, size))


def add_parameters(layer: Any, kinds: list[str], num_outputs: int, weight_loader: Any) -> None:
    for kind in kinds:
        parameter = BlocksParameter(
            data=torch.empty(0), kind=kind, num_outputs=num_outputs, weight_loader=weight_loader
        )
        layer.register_parameter(gguf.blocks_name(kind), parameter)


def take_weights(layer: Any, kinds: list[str]) -> Iterator[torch.Tensor | QuantizedWeight]:
    """The layer's weights, in the order of their outputs, each in its format; its parameters are gone then."""
    pieces = []
    for kind in kinds:
        parameter = getattr(layer, gguf.blocks_name(kind))
        pieces += [(offset, kind, rows, part) for offset, rows, part in parameter.pieces]
        delattr(layer, gguf.blocks_name(kind))
    for _, kind, rows, part in sorted(pieces, key=lambda piece: piece[0]):
        yield own_inputs(ggml.decode(kind, rows), *part)
        forget_pages(rows)


class DenseLinear(nn.Module):
    """A weight that the file has in a float type, as a part of a layer whose other parts are quantized."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.register_buffer("weight", weight.to(dtype, copy=True), persistent=False)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, bias)


@register_weight_loader_v2_supported_method
class BlocksLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Packs each part of its layer for the kernel of its format."""

    def __init__(self, kinds: list[str], progress: Progress) -> None:
        self.kinds = kinds
        self.progress = progress

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
        layer.low_bit_dtype = params_dtype
        add_parameters(layer, self.kinds, sum(output_partition_sizes), weight_loader)
        self.progress.expect_layer()

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "low_bit"):
            return
        weights = list(take_weights(layer, self.kinds))
        dtype = layer.low_bit_dtype
        if all(isinstance(weight, torch.Tensor) for weight in weights):
            dense = torch.cat([weight.to(dtype) for weight in weights])  # type: ignore[union-attr]
            layer.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
            layer.quant_method = UnquantizedLinearMethod()
            layer.quant_method.process_weights_after_loading(layer)
            self.progress.finish_layer()
            return
        parts: list[Any] = []
        for _, same in groupby(weights, lambda weight: getattr(weight, "format", None)):
            group = list(same)
            if isinstance(group[0], torch.Tensor):
                parts += [DenseLinear(weight, dtype) for weight in group]  # type: ignore[arg-type]
            else:
                parts.append(make_linear(joined(group), dtype))  # type: ignore[arg-type]
        layer.low_bit = nn.ModuleList(parts)
        self.progress.finish_layer(*(part for part in parts if not isinstance(part, DenseLinear)))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        parts = layer.low_bit
        if len(parts) == 1:
            y: torch.Tensor = parts[0](x, bias)
            return y
        biases = [None] * len(parts) if bias is None else torch.split(bias, [part.out_features for part in parts])
        return torch.cat([part(x, own) for part, own in zip(parts, biases, strict=True)], dim=-1)


class BlocksEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """An embedding or an output head. A head that is tied to the embedding is the embedding's own layer."""

    def __init__(self, kinds: list[str], is_tied: bool, progress: Progress) -> None:
        self.kinds = kinds
        self.is_tied = is_tied
        self.progress = progress

    def create_weights(self, layer: Any, *_: Any, params_dtype: torch.dtype, **__: Any) -> None:
        def keep_own_rows(parameter: BlocksParameter, rows: torch.Tensor) -> None:
            start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
            parameter.keep(0, rows[start:end])

        layer.low_bit_dtype = params_dtype
        add_parameters(layer, self.kinds, layer.num_embeddings_per_partition, keep_own_rows)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        return embed_tokens

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "low_bit") or hasattr(layer, "rows"):
            return
        weights = list(take_weights(layer, self.kinds))
        if not weights:  # a layer that another stage of a pipeline has
            return
        padding = layer.num_embeddings_per_partition - len(codes_of(weights[0]))
        weight = padded(weights[0], padding)
        computes = self.is_tied or isinstance(layer, ParallelLMHead)
        if isinstance(weight, torch.Tensor):
            dense = weight.to(layer.low_bit_dtype, copy=True)
            layer.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
            layer.quant_method = UnquantizedEmbeddingMethod()
            if computes:
                layer.quant_method.process_weights_after_loading(layer)
            return
        if computes:
            layer.low_bit = make_linear(weight, layer.low_bit_dtype)
            self.progress.finish_head(layer.low_bit)
        if not isinstance(layer, ParallelLMHead):
            shares = computes and layer.low_bit.has_rows
            layer.rows = layer.low_bit if shares else Rows(weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = layer.low_bit(x, bias)
        return y

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = layer.rows.rows(input_).to(layer.low_bit_dtype)
        return rows
