"""vLLM's scheduler with drafts as long as they pay, around one that is told what to have."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.vllm_drafts import DraftingScheduler, PacedDraftingScheduler, _Drafting, choose_scheduler
from ipex_vllm.engines.vllm_scheduler import PacedScheduler
from ipex_vllm.plan.plan import Plan


class Request:
    def __init__(self, name: str, is_prefill_chunk: bool = False) -> None:
        self.name, self.is_prefill_chunk = name, is_prefill_chunk
        self.num_output_tokens = 0
        self.spec_token_ids: list[int] = []


class FakeScheduler:
    num_spec_tokens = 8

    def __init__(self, *requests: Request) -> None:
        self.running = list(requests)
        self.requests = {request.name: request for request in requests}

    def schedule(self) -> Any:
        return SimpleNamespace(num_spec_tokens_to_schedule=self.num_spec_tokens)

    def update_from_output(self, scheduled: Any, output: Any) -> None:
        for name, index in output.req_id_to_index.items():
            self.requests[name].num_output_tokens += len(output.sampled_token_ids[index])

    def update_draft_token_ids(self, drafts: Any) -> None:
        for request in self.running:
            request.spec_token_ids = [] if request.is_prefill_chunk else [7] * drafts


class Drafting(_Drafting, FakeScheduler):
    pass


def step(scheduler: Any, right: dict[str, bool]) -> None:
    """One step in which all of a request's draft is right, or none of it."""
    drafts = {request.name: request.spec_token_ids for request in scheduler.running if request.spec_token_ids}
    sampled = [[1] * (1 + len(drafts.get(name, ())) * is_right) for name, is_right in right.items()]
    output = SimpleNamespace(
        sampled_token_ids=sampled, req_id_to_index={name: index for index, name in enumerate(right)}
    )
    scheduler.update_from_output(SimpleNamespace(scheduled_spec_decode_tokens=drafts), output)
    scheduler.update_draft_token_ids(8)


def test_each_streams_drafts_follow_its_own_success() -> None:
    good, bad, prompt = Request("good"), Request("bad"), Request("prompt", is_prefill_chunk=True)
    scheduler = Drafting(good, bad, prompt, step_cost=0.0)
    for _ in range(12):
        step(scheduler, {"good": True, "bad": False})
    assert len(good.spec_token_ids) == 8
    assert bad.spec_token_ids == []
    assert scheduler.schedule().num_spec_tokens_to_schedule == 8
    scheduler.running = [bad]
    for _ in range(12):
        step(scheduler, {"bad": False})
    assert scheduler.schedule().num_spec_tokens_to_schedule == 0, "nothing is looked up that nobody wants"
    scheduler.running = [prompt]
    assert scheduler.schedule().num_spec_tokens_to_schedule == 0


def test_what_was_learned_goes_with_its_request() -> None:
    scheduler = Drafting(Request("a"), step_cost=0.0)
    for _ in range(3):
        step(scheduler, {"a": True})
    assert len(scheduler._acceptances) == 1
    scheduler.running.clear()
    scheduler.requests.clear()
    assert len(scheduler._acceptances) == 0


@pytest.mark.parametrize(
    ("speculative", "max_gap", "vllms", "expected"),
    [
        ("ngram", 0.5, Scheduler, PacedDraftingScheduler),
        ("ngram", 0.0, Scheduler, DraftingScheduler),
        ("off", 0.5, Scheduler, PacedScheduler),
        ("ngram", 0.5, AsyncScheduler, None),
        ("ngram", 0.5, str, None),
    ],
    ids=["paced", "alone", "off", "ahead of its drafts", "the user's own"],
)
def test_vllms_own_scheduler_drafts_as_much_as_pays(
    speculative: Any, max_gap: float, vllms: type, expected: type | None
) -> None:
    config = SimpleNamespace(enable_chunked_prefill=True, scheduler_cls=None)
    config.get_scheduler_cls = lambda: config.scheduler_cls or vllms
    plan = Plan(
        model_path=str(MODEL_DIR),
        names=("demo",),
        device="cpu",
        low_bit=None,
        rank_cores=((0,),),
        kv_cache_bytes=1,
        use_compile=False,
        max_stream_gap=max_gap,
        speculative=speculative,
        draft_cost=0.25,
    )
    choose_scheduler(SimpleNamespace(scheduler_config=config), plan)
    chosen = None if config.scheduler_cls is None else pickle.loads(pickle.dumps(config.scheduler_cls))
    if expected is None:
        assert chosen is None or not issubclass(chosen.func, _Drafting)
        return
    keywords = {"max_gap": max_gap} if max_gap else {}
    drafting = {"step_cost": 0.25} if speculative != "off" else {}
    assert (chosen.func, chosen.keywords) == (expected, keywords | drafting)
