"""Attention on a CPU in which the tokens of a picture see each other: against masks written out."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadata

from ipex_vllm.low_bit.vllm import picture_attention
from ipex_vllm.low_bit.vllm.picture_attention import attend, attend_with_pictures, find_pictures

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 32, 32
# Of each sequence: its tokens, how many of them an earlier step computed, and where its pictures are, ends included.
SEQUENCES: list[tuple[int, int, list[tuple[int, int]]]] = [
    (40, 0, [(10, 17), (18, 21)]),
    (45, 0, []),
    (70, 20, [(2, 9), (15, 25), (64, 69)]),  # computed; computed in part, as a prefix cache may have it; at the end
    (33, 32, [(4, 11)]),  # a stream
]


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: config)


class Step:
    """Random queries, keys and values of SEQUENCES, in vLLM's layout, and what vLLM's builder makes of them."""

    def __init__(self, window: int) -> None:
        torch.manual_seed(0)
        self.layer = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
        scale = HEAD_DIM**-0.5
        self.attention = CPUAttentionBackendImpl(NUM_HEADS, HEAD_DIM, scale, NUM_KV_HEADS, None, window, "auto")
        self.builder = SimpleNamespace(
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            dtype=torch.float32,
            window_size=-1 if window is None else window,
            isa="vec",
            kv_cache_dtype="auto",
        )
        lengths = torch.tensor([length for length, _, _ in SEQUENCES], dtype=torch.int32)
        computed = torch.tensor([computed for _, computed, _ in SEQUENCES], dtype=torch.int32)
        starts = torch.nn.functional.pad((lengths - computed).cumsum(0), (1, 0)).to(torch.int32)
        self.keys, self.values = (
            [torch.randn(length, NUM_KV_HEADS, HEAD_DIM) for length in lengths.tolist()] for _ in range(2)
        )
        self.query = torch.randn(int(starts[-1]), NUM_HEADS, HEAD_DIM)
        blocks = torch.arange(1, 1 + 3 * len(SEQUENCES), dtype=torch.int32).reshape(len(SEQUENCES), 3)
        self.cache = torch.zeros(1 + blocks.numel(), NUM_KV_HEADS, BLOCK, 2 * HEAD_DIM)
        for table, key, value in zip(blocks, self.keys, self.values, strict=True):
            positions = torch.arange(len(key))
            slots = table[positions // BLOCK].long() * BLOCK + positions % BLOCK
            self.attention.do_kv_cache_update(self.layer, key, value, self.cache, slots)
        schedule: Any = {name: value for name, value in vars(self.builder).items() if name != "window_size"}
        self.metadata = CPUAttentionMetadata(
            num_actual_tokens=len(self.query),
            max_query_len=int((lengths - computed).max()),
            query_start_loc=starts,
            max_seq_len=int(lengths.max()),
            seq_lens=lengths,
            block_table=blocks,
            slot_mapping=torch.empty(0, dtype=torch.int64),
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(SEQUENCES),
                seq_lens=lengths,
                query_start_loc=starts,
                causal=True,
                sliding_window_size=self.builder.window_size,
                enable_kv_split=False,
                **schedule,
            ),
        )
        ranges = {index: pictures for index, (_, _, pictures) in enumerate(SEQUENCES)}
        self.common = SimpleNamespace(query_start_loc=starts, seq_lens=lengths, mm_req_doc_ranges=ranges)

    def run(self, attend: Any, metadata: Any) -> torch.Tensor:
        output = torch.empty_like(self.query)
        nothing = torch.empty(0)
        attend(self.attention, self.layer, self.query, nothing, nothing, self.cache, metadata, output)
        return output


def expected(step: Step, window: int | None, sees_pictures: bool) -> torch.Tensor:
    rows, start = [], 0
    for (length, computed, pictures), key, value in zip(SEQUENCES, step.keys, step.values, strict=True):
        query = step.query[start : start + length - computed]
        start += length - computed
        at, to = torch.arange(computed, length)[:, None], torch.arange(length)[None]
        mask = to <= at
        if window is not None:
            mask &= to > at - window
        for first, last in pictures if sees_pictures else ():
            mask |= (at >= first) & (at <= last) & (to >= first) & (to <= last)
        group = NUM_HEADS // NUM_KV_HEADS
        key, value = (each.repeat_interleave(group, 1).transpose(0, 1) for each in (key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1), key, value, mask)
        rows.append(attended.transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("window", [None, 12])
def test_the_tokens_of_a_picture_see_each_other_and_the_others_what_is_before(window: int | None) -> None:
    step = Step(window)
    step.metadata.mm_prefix_range = find_pictures(step.builder, step.common, step.metadata)
    torch.testing.assert_close(step.run(attend_with_pictures, step.metadata), expected(step, window, True))


def test_a_step_without_pictures_is_vllms() -> None:
    step = Step(None)
    for ranges in (None, {}, {0: []}, {2: [(2, 9)]}, {3: [(4, 11)]}, {0: [(10, 10)]}):
        step.common.mm_req_doc_ranges = ranges
        assert find_pictures(step.builder, step.common, step.metadata) is None
    step.metadata.mm_prefix_range = None
    assert torch.equal(step.run(attend_with_pictures, step.metadata), step.run(attend, step.metadata))


@pytest.mark.parametrize("window", [None, 12])
def test_vllm_still_leaves_them_causal(window: int | None) -> None:
    """Where this fails, `picture_attention` may no longer be needed."""
    step = Step(window)
    torch.testing.assert_close(step.run(attend, step.metadata), expected(step, window, False))
    assert not CPUAttentionBackend.supports_mm_prefix()
    assert "mm_prefix_range" not in {field.name for field in dataclasses.fields(CPUAttentionMetadata)}


def test_pictures_are_not_cut_which_vllm_still_sees_to_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(is_mm_prefix_lm=True)
    scheduler = SimpleNamespace(is_multimodal_model=True, disable_chunked_mm_input=False)
    config = SimpleNamespace(model_config=model, scheduler_config=scheduler)
    monkeypatch.setattr(picture_attention, "update_config", classmethod(lambda cls, config: None))
    picture_attention.update_config_with_pictures(CpuPlatform, config)
    assert scheduler.disable_chunked_mm_input
    scheduler.disable_chunked_mm_input = model.is_mm_prefix_lm = False
    picture_attention.update_config_with_pictures(CpuPlatform, config)
    assert not scheduler.disable_chunked_mm_input
