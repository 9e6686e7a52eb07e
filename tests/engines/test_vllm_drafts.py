"""vLLM's scheduler with drafts as long as they pay, around one that is told what to have."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.vllm_drafts import (
    LookupDraftingScheduler,
    ModelDraftingScheduler,
    PacedLookupDraftingScheduler,
    PacedModelDraftingScheduler,
    _LookupDrafting,
    _ModelDrafting,
    choose_scheduler,
)
from ipex_vllm.engines.vllm_scheduler import PacedScheduler
from ipex_vllm.plan.plan import Plan


class Request:
    """One that has got `prompt` and writes on; vLLM's, as far as it is asked."""

    def __init__(self, name: str, prompt: list[int] | None = None, **more: Any) -> None:
        self.request_id = name
        self.all_token_ids = list(prompt or [1, 2, 3])
        self.num_output_tokens = 0
        self.max_tokens: int = more.pop("max_tokens", 10_000)
        self.is_prefill_chunk: bool = more.pop("is_prefill_chunk", False)
        self.sampling_params = SamplingParams(**more)
        self.spec_token_ids: list[int] = []

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class FakeScheduler:
    num_spec_tokens = 8
    max_model_len = 10_000

    def __init__(self, *requests: Request) -> None:
        self.running = list(requests)
        self.requests = {request.request_id: request for request in requests}

    def schedule(self) -> Any:
        return SimpleNamespace(num_spec_tokens_to_schedule=self.num_spec_tokens)

    def update_from_output(self, scheduled: Any, output: Any) -> None:
        for name, index in output.req_id_to_index.items():
            request, sampled = self.requests[name], output.sampled_token_ids[index]
            request.all_token_ids += sampled
            request.num_output_tokens += len(sampled)

    def update_draft_token_ids(self, drafts: DraftTokenIds) -> None:
        for name, draft in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
            request = self.requests[name]
            request.spec_token_ids = [] if request.is_prefill_chunk else list(draft)


class Modelled(_ModelDrafting, FakeScheduler):
    pass


class LookedUp(_LookupDrafting, FakeScheduler):
    pass


def step(scheduler: Any, sampled: dict[str, list[int]], drafted: list[int] | None = None) -> None:
    """One step in which the streams got `sampled`, after which the worker has `drafted` for each."""
    drafts = {request.request_id: request.spec_token_ids for request in scheduler.running if request.spec_token_ids}
    output = SimpleNamespace(
        sampled_token_ids=list(sampled.values()), req_id_to_index={name: index for index, name in enumerate(sampled)}
    )
    scheduler.update_from_output(SimpleNamespace(scheduled_spec_decode_tokens=drafts), output)
    names = [request.request_id for request in scheduler.running]
    scheduler.update_draft_token_ids(DraftTokenIds(names, [list(drafted or []) for _ in names]))


def judged(request: Request, is_right: bool) -> list[int]:
    """What a step yields in which all of a request's draft is right, or none of it."""
    return [*request.spec_token_ids, 9] if is_right else [9]


def test_each_streams_drafts_follow_its_own_success() -> None:
    good, bad, prompt = Request("good"), Request("bad"), Request("prompt", is_prefill_chunk=True)
    scheduler = Modelled(good, bad, prompt, step_cost=0.02)
    for _ in range(20):
        step(scheduler, {"good": judged(good, True), "bad": judged(bad, False)}, [7] * 8)
    assert good.spec_token_ids == [7] * 8
    assert bad.spec_token_ids == []
    assert scheduler.schedule().num_spec_tokens_to_schedule == 8
    scheduler.running = [bad]
    for _ in range(12):
        step(scheduler, {"bad": judged(bad, False)}, [7] * 8)
    assert scheduler.schedule().num_spec_tokens_to_schedule == 0, "nothing is drafted that nobody wants"
    scheduler.running = [prompt]
    assert scheduler.schedule().num_spec_tokens_to_schedule == 0


def test_a_text_that_repeats_itself_is_drafted_from_its_own_beginning() -> None:
    text = list(range(100, 140))
    request = Request("copy", text, max_tokens=len(text))
    scheduler = LookedUp(request)
    written: list[int] = []
    steps = 0
    while len(written) < len(text):
        right = 0
        while right < len(request.spec_token_ids) and request.spec_token_ids[right] == text[len(written) + right]:
            right += 1
        sampled = text[len(written) : len(written) + right + 1]
        written += sampled
        step(scheduler, {"copy": sampled})
        steps += 1
    assert written == text
    assert steps < len(text) / 3


def test_a_text_in_which_nothing_comes_twice_has_no_drafts() -> None:
    request = Request("new", list(range(50)))
    scheduler = LookedUp(request)
    for token in range(50, 80):
        step(scheduler, {"new": [token]})
        assert request.spec_token_ids == []


@pytest.mark.parametrize(
    ("more", "most"),
    [({}, 8), ({"max_tokens": 4}, 2), ({"min_p": 0.5}, 0), ({"logit_bias": {5: 1.0}}, 0)],
    ids=["alone", "nearly at its end", "min_p", "logit_bias"],
)
def test_a_draft_is_no_longer_than_what_can_be_used_of_it(more: dict[str, Any], most: int) -> None:
    request = Request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9] * 3, **more)
    scheduler = LookedUp(request)
    for _ in range(4):
        scheduler._of(request).acceptance.learn(8, 8, 0, match=8)
    step(scheduler, {"a": [1]})
    assert request.spec_token_ids == [2, 3, 4, 5, 6, 7, 8, 9][:most]
    scheduler.max_model_len = request.num_tokens + 1
    step(scheduler, {"a": [2]})
    assert request.spec_token_ids == []


@pytest.mark.parametrize("scheduler", [Modelled(Request("a"), step_cost=0.0), LookedUp(Request("a"))])
def test_what_was_learned_goes_with_its_request(scheduler: Any) -> None:
    for _ in range(3):
        step(scheduler, {"a": [1, 2]}, [7])
    assert len(scheduler._kept) == 1
    scheduler.running.clear()
    scheduler.requests.clear()
    assert len(scheduler._kept) == 0


@pytest.mark.parametrize(
    ("speculative", "max_gap", "vllms", "expected"),
    [
        ("ngram", 0.5, Scheduler, PacedLookupDraftingScheduler),
        ("ngram", 0.0, Scheduler, LookupDraftingScheduler),
        ("draft", 0.5, Scheduler, PacedModelDraftingScheduler),
        ("draft", 0.0, Scheduler, ModelDraftingScheduler),
        ("off", 0.5, Scheduler, PacedScheduler),
        ("ngram", 0.5, AsyncScheduler, None),
        ("ngram", 0.5, str, None),
    ],
    ids=["paced", "alone", "a model, paced", "a model", "off", "ahead of its drafts", "the user's own"],
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
        assert chosen is None or not issubclass(chosen.func, (_ModelDrafting, _LookupDrafting))
        return
    keywords = {"max_gap": max_gap} if max_gap else {}
    drafting = {"step_cost": 0.25} if speculative == "draft" else {}
    assert (chosen.func, chosen.keywords) == (expected, keywords | drafting)
