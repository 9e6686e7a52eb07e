"""vLLM's attention on CPUs as one operator a layer, which calls its kernels and little else.

In vLLM 0.32 a layer writes its keys and values by one operator in Python and attends by another. Each looks up its
layer, cuts the cache into keys and values anew and finds its kernel by name: of a small model's decode step that takes
longer than the kernels do. Here the same kernels are called with the same arguments, so results are the same to the
last bit. Whatever is more than a decoder's plain attention is left to vLLM's own operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import Library
from vllm.distributed.kv_transfer import has_kv_transfer_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output, unified_kv_cache_update
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

forward = Attention.forward
library = Library("ipex_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]
SINK_DTYPES = (torch.float32, torch.bfloat16)  # of sinks, those that the kernel takes


def mend() -> None:
    """Give vLLM's layers the one operator; a second call changes nothing."""
    Attention.forward = attend_at_once


def attend_at_once(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    output_shape: torch.Size | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """vLLM's `Attention.forward`: query [tokens, heads * head size], key and value likewise; the result is as query."""
    is_plain = (
        type(self.impl) is CPUAttentionBackendImpl
        and self.attn_type == AttentionType.DECODER
        and self.kv_sharing_target_layer_name is None
        and output_shape is None
        and output_dtype is None
    )
    if not is_plain or key is None or value is None:
        return forward(self, query, key, value, output_shape, output_dtype)  # type: ignore[no-any-return]
    output = query.new_empty((query.shape[0], self.num_heads * self.head_size_v))
    operator, layer_name = attend, self.layer_name
    if torch.compiler.is_compiling():
        operator, layer_name = torch.ops.ipex_vllm.attention.default, _encode_layer_name(layer_name)
    operator(
        query.view(-1, self.num_heads, self.head_size),
        key.view(-1, self.num_kv_heads, self.head_size),
        value.view(-1, self.num_kv_heads, self.head_size_v),
        output.view(-1, self.num_heads, self.head_size_v),
        layer_name,
    )
    return output


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer_name: LayerNameType
) -> None:
    """Write a step's keys and values into the layer's cache, and attend to all that is there.

    Args:
        query: [tokens, heads, head size].
        key: [tokens, KV heads, head size]; value: the same.
        output: like query; it is written.
        layer_name: by which the step's context knows the layer.
    """
    context = get_forward_context()
    layer_name = _resolve_layer_name(layer_name)
    layer = context.no_compile_layers[layer_name]
    steps, impl = context.attn_metadata, layer.impl
    step: Any = steps.get(layer_name) if isinstance(steps, dict) else None
    slots = None if step is None else context.slot_mapping.get(layer_name)
    sinks = impl.sinks
    if (
        slots is None  # a warm-up
        or getattr(step, "mm_prefix_range", None) is not None  # see picture_attention.py
        or (sinks is not None and sinks.dtype not in SINK_DTYPES)  # which vLLM converts at the first step
        or has_kv_transfer_group()
    ):
        unified_kv_cache_update(key, value, layer_name)
        unified_attention_with_output(query, key, value, output, layer_name)
        return
    keys, values = halves(layer)
    kernels, dtype = torch.ops._C, impl.kv_cache_dtype
    key_scale, value_scale = layer._k_scale_float, layer._v_scale_float
    kernels.cpu_attn_reshape_and_cache.default(
        key, value, keys, values, slots, layer.isa, key_scale, value_scale, dtype
    )
    num_tokens = step.num_actual_tokens
    if query.shape[0] != num_tokens:
        query, output = query[:num_tokens], output[:num_tokens]
    kernels.cpu_attention_with_kv_cache.default(
        query,
        keys,
        values,
        output,
        step.query_start_loc,
        step.seq_lens,
        impl.scale,
        step.causal,
        impl.alibi_slopes,
        impl.sliding_window,
        step.block_table,
        impl.logits_soft_cap,
        step.scheduler_metadata,
        sinks,
        step.dynamic_causal,
        key_scale,
        value_scale,
        dtype,
    )


def halves(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's cache [blocks, KV heads, block size, 2 * head size] as its kernels take it: of keys, of values.

    Each is [blocks, KV heads, block size, head size], of which a block's keys come before its values.
    """
    cache = layer.kv_cache
    kept = layer.__dict__.get("kv_halves")
    if kept is None or kept[0] is not cache:
        num_blocks, num_kv_heads, block_size, _ = cache.shape
        keys, values = cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
        kept = layer.__dict__["kv_halves"] = (cache, keys, values)
    return kept[1], kept[2]


direct_register_custom_op(
    "attention",
    attend,
    mutates_args=["output"],
    fake_impl=lambda query, key, value, output, layer_name: None,
    target_lib=library,
    dispatch_key="CPU",
)
