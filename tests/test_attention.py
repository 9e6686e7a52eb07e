"""Attention in one operator a layer: the same bits as vLLM's own two, whatever a layer is made of."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata

from ipex_vllm.low_bit.vllm import attention
from ipex_vllm.low_bit.vllm.attention import attend_at_once
from ipex_vllm.low_bit.vllm.upstream import allow_amx

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK = 4, 2, 32, 32
# Of each sequence: its tokens, and how many of them an earlier step computed.
PROMPTS = [(40, 0), (70, 20), (33, 32)]
STREAMS = [(5, 4), (64, 63), (65, 64), (70, 69)]
NAME = "layer.0"
Call = tuple[torch.Tensor, torch.Tensor]  # what came out, and the cache after it


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    allow_amx()
    config = VllmConfig()
    model = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    monkeypatch.setattr(cpu_attn, "get_current_vllm_config", lambda: model)
    with set_current_vllm_config(config):
        yield config


def slots_of(blocks: torch.Tensor, length: int, computed: int) -> torch.Tensor:
    """Where the cache has what a step computes of a sequence."""
    positions = torch.arange(computed, length)
    return blocks[positions // BLOCK].long() * BLOCK + positions % BLOCK


class Step:
    """A layer of vLLM's, and random queries, keys and values of sequences that it has computed in part."""

    def __init__(
        self, config: VllmConfig, sequences: list[tuple[int, int]], dtype: torch.dtype, cache_dtype: str, **layer: Any
    ) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            self.layer = Attention(NUM_HEADS, HEAD_SIZE, HEAD_SIZE**-0.5, NUM_KV_HEADS, prefix=NAME, **layer)
        finally:
            torch.set_default_dtype(torch.float32)
        self.config = config
        isa = cpu_attn._get_attn_isa(dtype, BLOCK, HEAD_SIZE, cache_dtype)
        self.layer.isa = isa
        self.layer.impl.kv_cache_dtype = cache_dtype
        lengths = torch.tensor([length for length, _ in sequences], dtype=torch.int32)
        computed = torch.tensor([computed for _, computed in sequences], dtype=torch.int32)
        starts = torch.nn.functional.pad((lengths - computed).cumsum(0), (1, 0)).to(torch.int32)
        blocks = torch.arange(1, 1 + 3 * len(sequences), dtype=torch.int32).reshape(len(sequences), 3)
        self.slots = torch.cat([slots_of(table, *each) for table, each in zip(blocks, sequences, strict=True)])
        num_tokens = int(starts[-1])
        self.query = torch.randn(num_tokens, NUM_HEADS * HEAD_SIZE, dtype=dtype)
        self.key, self.value = torch.randn(2, num_tokens, NUM_KV_HEADS * HEAD_SIZE, dtype=dtype)
        cache = torch.randn(1 + blocks.numel(), NUM_KV_HEADS, BLOCK, 2 * HEAD_SIZE)
        self.cache = cache.to(dtype) if cache_dtype == "auto" else cache.to(torch.float8_e4m3fn).view(torch.uint8)
        self.metadata = CPUAttentionMetadata(
            num_actual_tokens=num_tokens,
            max_query_len=int((lengths - computed).max()),
            query_start_loc=starts,
            max_seq_len=int(lengths.max()),
            seq_lens=lengths,
            block_table=blocks,
            slot_mapping=self.slots,
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(sequences),
                num_heads=NUM_HEADS,
                num_kv_heads=NUM_KV_HEADS,
                head_dim=HEAD_SIZE,
                seq_lens=lengths,
                dtype=dtype,
                query_start_loc=starts,
                causal=True,
                sliding_window_size=self.layer.impl.sliding_window,
                isa=isa,
                enable_kv_split=False,
                kv_cache_dtype=cache_dtype,
            ),
        )

    def run(self, forward: Any, metadata: Any, **arguments: torch.Tensor) -> Call:
        self.layer.kv_cache = self.cache.clone()
        given = {"query": self.query, "key": self.key, "value": self.value, **arguments}
        steps = None if metadata is None else {NAME: metadata}
        slots = {} if metadata is None else {NAME: self.slots}
        with torch.no_grad(), set_forward_context(steps, self.config, slot_mapping=slots):
            return forward(self.layer, **given), self.layer.kv_cache

    def assert_same(self, forward: Any = attend_at_once) -> None:
        (expected, expected_cache), (found, cache) = (
            self.run(attention.forward, self.metadata),
            self.run(forward, self.metadata),
        )
        assert torch.equal(found, expected)
        assert torch.equal(cache, expected_cache)
        assert not torch.equal(cache, self.cache)


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"per_layer_sliding_window": 12},
    "soft cap": {"logits_soft_cap": 2.0},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625]},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sinks in float16": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float16)},
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [PROMPTS, STREAMS], ids=["prompts", "streams"])
def test_all_is_as_in_vllms_two_operators(
    vllm_config: VllmConfig, layer: dict[str, Any], dtype: torch.dtype, sequences: list[tuple[int, int]]
) -> None:
    Step(vllm_config, sequences, dtype, "auto", **layer).assert_same()


def test_a_cache_in_8_bits_is_written_and_read_alike(vllm_config: VllmConfig) -> None:
    if not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM keeps a cache in 8 bits with AVX-512 only")
    Step(vllm_config, PROMPTS, torch.bfloat16, "fp8_e4m3").assert_same()


def test_tokens_beyond_the_steps_are_left_alone(vllm_config: VllmConfig) -> None:
    step = Step(vllm_config, STREAMS, torch.float32, "auto")
    padded = {name: torch.cat([getattr(step, name)] * 2) for name in ("query", "key", "value")}
    step.slots = torch.cat([step.slots, torch.full_like(step.slots, -1)])
    expected, found = (step.run(forward, step.metadata, **padded) for forward in (attention.forward, attend_at_once))
    num_tokens = len(step.query)
    assert torch.equal(found[0][:num_tokens], expected[0][:num_tokens])
    assert torch.equal(found[1], expected[1])


def test_a_compiler_sees_one_operator(vllm_config: VllmConfig) -> None:
    step = Step(vllm_config, STREAMS, torch.float32, "auto")
    called = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "vllm" in str(node.target))
        return graph

    step.assert_same(torch.compile(attend_at_once, backend=backend, fullgraph=True))
    assert called == ["ipex_vllm.attention.default"]
    step.assert_same(torch.compile(attend_at_once, backend="aot_eager", fullgraph=True))


def test_a_cache_that_is_bound_anew_is_the_one_that_is_written(vllm_config: VllmConfig) -> None:
    step = Step(vllm_config, STREAMS, torch.float32, "auto")
    step.run(attend_at_once, step.metadata)
    step.cache = step.cache[:, :, :16].repeat(2, 1, 2, 1)
    step.assert_same()


class Handed(Exception):
    """What is left to vLLM."""


@pytest.mark.parametrize(
    "case", ["warm-up", "pictures", "a shared cache", "cross attention", "an encoder", "a transfer"]
)
def test_what_is_not_plain_is_left_to_vllm(vllm_config: VllmConfig, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hand(*_: Any) -> None:
        raise Handed

    step = Step(vllm_config, STREAMS, torch.float32, "auto")
    monkeypatch.setattr(attention, "forward", hand)
    monkeypatch.setattr(attention, "unified_kv_cache_update", hand)
    metadata: Any = step.metadata
    step.run(attend_at_once, metadata)
    given: dict[str, Any] = {}
    if case == "warm-up":
        metadata = None
    elif case == "pictures":
        metadata.mm_prefix_range = object()
    elif case == "a shared cache":
        step.layer.kv_sharing_target_layer_name = "layer.1"
    elif case == "cross attention":
        given = {"key": None, "value": None}
    elif case == "an encoder":
        step.layer.attn_type = "encoder_only"
    else:
        monkeypatch.setattr(attention, "has_kv_transfer_group", lambda: True)
    with pytest.raises(Handed):
        step.run(attend_at_once, metadata, **given)


def test_vllm_still_takes_two_operators_of_a_layer(vllm_config: VllmConfig) -> None:
    """Where this fails, `attention` may no longer be needed."""
    step = Step(vllm_config, STREAMS, torch.float32, "auto")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step.run(attention.forward, step.metadata)
    names = [event.name for event in profile.events()]
    assert [name for name in names if name.startswith("vllm::unified")] == [
        "vllm::unified_kv_cache_update",
        "vllm::unified_attention_with_output",
    ]
    assert not CPUAttentionBackend.forward_includes_kv_cache_update
