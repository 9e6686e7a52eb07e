"""What drafts, with its reason, and that the memory plan counts it."""

from dataclasses import replace

import pytest

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.errors import OptionError
from ipex_vllm.machine.kv_cache import KvCache
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import cpu
from ipex_vllm.plan.plan import Demands, Plan, weight_bytes
from ipex_vllm.plan.speculation import with_speculation
from tests.machines import FakeRoot

CAPABLE = Demands(no_speculation=None)
MODEL = ModelFacts(weight_bytes=8 << 30, kv_cache=KvCache(131_072), max_position=4096)
DRAFT = ModelFacts(weight_bytes=2 << 30, kv_cache=KvCache(16_384), max_position=4096)


def plan(root: FakeRoot, model: ModelFacts, demands: Demands = CAPABLE, **chosen: object) -> Plan:
    options = WorkerOptions(**chosen)
    return with_speculation(cpu.make_plan(root.probe(), options, model, demands), options, model, demands)


def test_nothing_drafts_unless_asked(small_box: FakeRoot) -> None:
    found = plan(small_box, MODEL)
    assert found.speculative == "off"
    assert not [line for line in found.lines if line.startswith("speculation")]


def test_the_choice_has_a_line_with_its_reason(small_box: FakeRoot) -> None:
    found = plan(small_box, MODEL, speculative="auto")
    assert found.speculative == "ngram"
    assert found.lines[-1].startswith("speculation: drafts looked up in the text so far")


def test_the_models_that_draft_are_counted_in_memory(small_box: FakeRoot) -> None:
    both = MODEL.beside(DRAFT)
    found = plan(small_box, both, speculative="auto", draft_model="small")
    assert (found.speculative, found.draft_model, found.draft_cost) == ("draft", "small", 0.25)
    assert "drafts by small, 2.00 GiB" in found.lines[-1]
    assert weight_bytes(both, WorkerOptions()) == 10 << 30
    assert both.kv_cache is not None
    assert both.kv_cache.sequence_bytes(128) == 128 * (131_072 + 16_384)
    alone = plan(small_box, MODEL)
    assert found.kv_cache_bytes < alone.kv_cache_bytes - 0.3 * (2 << 30), "the draft's weights leave less for the cache"


def test_a_draft_is_quantized_like_the_model(small_box: FakeRoot) -> None:
    demo = ModelFacts.read(str(MODEL_DIR))
    options = WorkerOptions(low_bit="sym_int4")
    alone = weight_bytes(demo, options)
    assert alone is not None
    assert weight_bytes(demo.beside(demo), options) == 2 * alone
    unknown = demo.beside(ModelFacts())
    assert weight_bytes(unknown, options) is None
    assert unknown.kv_cache is None


@pytest.mark.parametrize(
    ("model", "demands", "reason"),
    [
        (replace(MODEL, kv_cache=KvCache(1024, state_bytes=4096)), CAPABLE, "the state of its recurrent layers"),
        (MODEL, Demands(), "this engine has none"),
    ],
)
def test_where_drafts_cannot_be_checked_auto_is_off_and_the_rest_refused(
    small_box: FakeRoot, model: ModelFacts, demands: Demands, reason: str
) -> None:
    found = plan(small_box, model, demands, speculative="auto")
    assert found.speculative == "off"
    assert f"speculation: off ({reason}" in found.lines[-1]
    with pytest.raises(OptionError, match=reason):
        plan(small_box, model, demands, speculative="ngram")
