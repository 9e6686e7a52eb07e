"""Attention of models in which the tokens of a picture see each other, on CPUs, where vLLM 0.32 leaves them causal.

Gemma 3 and PaliGemma are such. vLLM tells its attention where a step's pictures are, and the one for CPUs does not
look: the answers are wrong, in silence. Here what it computed for a picture's tokens is computed once more, as that of
a sequence that ends with the picture and is not causal. With a sliding window that is right for pictures that are not
longer than it; vLLM does not tell of others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

build = CPUAttentionMetadataBuilder.build
attend = CPUAttentionBackendImpl.forward
update_config = CpuPlatform.check_and_update_config


def mend() -> None:
    """Mend vLLM's attention for CPUs; a second call changes nothing."""
    CPUAttentionMetadataBuilder.build = build_with_pictures
    CPUAttentionBackendImpl.forward = attend_with_pictures
    CpuPlatform.check_and_update_config = classmethod(update_config_with_pictures)


@dataclass(frozen=True)
class Pictures:
    """The parts of pictures among a step's queries, each as a sequence of its own that ends with it.

    Attributes:
        rows: int64 [queries of pictures], which of the step's they are.
        metadata: what vLLM's attention has to know of these sequences.
    """

    rows: torch.Tensor
    metadata: CPUAttentionMetadata


def build_with_pictures(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
    metadata: Any = build(self, common_prefix_len, common_attn_metadata, fast_build)
    # By this name vLLM's Gemma 4 takes it from the layers in which pictures are causal.
    metadata.mm_prefix_range = find_pictures(self, common_attn_metadata, metadata)
    return metadata


def find_pictures(builder: Any, common: Any, metadata: CPUAttentionMetadata) -> Pictures | None:
    """None where no picture has two tokens among the step's queries."""
    if not any((common.mm_req_doc_ranges or {}).values()):
        return None
    starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
    rows: list[int] = []
    requests, ends, bounds = [], [], [0]
    for request, ranges in common.mm_req_doc_ranges.items():
        computed = lengths[request] - (starts[request + 1] - starts[request])
        for first, last in ranges:
            first, last = max(first, computed), min(last, lengths[request] - 1)
            if first < last:
                offset = starts[request] - computed
                rows += range(offset + first, offset + last + 1)
                requests.append(request)
                ends.append(last + 1)
                bounds.append(len(rows))
    if not rows:
        return None
    query_start_loc = torch.tensor(bounds, dtype=common.query_start_loc.dtype)
    seq_lens = torch.tensor(ends, dtype=common.seq_lens.dtype)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(requests),
        num_heads=builder.num_heads,
        num_kv_heads=builder.num_kv_heads,
        head_dim=builder.head_dim,
        seq_lens=seq_lens,
        dtype=builder.dtype,
        query_start_loc=query_start_loc,
        causal=False,
        sliding_window_size=builder.window_size,
        isa=builder.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=builder.kv_cache_dtype,
    )
    sequences = replace(
        metadata,
        num_actual_tokens=len(rows),
        max_query_len=max(end - start for start, end in pairwise(bounds)),
        query_start_loc=query_start_loc,
        max_seq_len=max(ends),
        seq_lens=seq_lens,
        block_table=metadata.block_table[requests].contiguous(),
        scheduler_metadata=schedule,
        causal=False,
    )
    return Pictures(torch.tensor(rows), sequences)


def attend_with_pictures(
    self: Any,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: CPUAttentionMetadata | None,
    output: torch.Tensor,
    *scales: Any,
    **named: Any,
) -> torch.Tensor:
    attend(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named)
    pictures: Pictures | None = getattr(attn_metadata, "mm_prefix_range", None)
    if pictures is not None:
        again = torch.empty_like(output[pictures.rows])
        attend(self, layer, query[pictures.rows], key, value, kv_cache, pictures.metadata, again, *scales, **named)
        output[pictures.rows] = again
    return output


def update_config_with_pictures(cls: Any, config: Any) -> None:
    """A picture's tokens have to be in one step, as vLLM sees to on GPUs."""
    update_config.__func__(cls, config)
    model, scheduler = config.model_config, config.scheduler_config
    if model is not None and model.is_mm_prefix_lm and scheduler.is_multimodal_model:
        scheduler.disable_chunked_mm_input = True
