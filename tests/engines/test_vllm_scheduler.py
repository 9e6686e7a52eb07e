"""How many tokens a step of vLLM's may have while streams run beside a prompt."""

import pickle
from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ipex_vllm.engines.vllm_scheduler import (
    FIRST_PROMPT_TOKENS,
    Pace,
    PacedAsyncScheduler,
    PacedScheduler,
    _Paced,
    pace_steps,
)


def test_a_steps_tokens_follow_the_measured_speed() -> None:
    pace = Pace(max_gap=0.5)
    assert pace.budget(num_streams=3) == 3 + FIRST_PROMPT_TOKENS
    pace.measure(1000, 2.0)
    assert pace.budget(num_streams=3) == 166  # two thirds of what half a second has room for
    pace.measure(8, 0.1)  # mere streams: most of their step does not depend on their number
    assert pace.budget(num_streams=3) == 166
    for _ in range(20):  # another program takes half of the machine
        pace.measure(250, 1.0)
    assert pace.budget(num_streams=3) == pytest.approx(83, abs=1)


def test_a_prompt_gets_on_however_slow_the_machine_is() -> None:
    pace = Pace(max_gap=0.001)
    pace.measure(100, 10.0)
    assert pace.budget(num_streams=200) == 216


@pytest.mark.parametrize(
    ("max_gap", "is_cut", "chosen", "expected"),
    [
        (0.5, True, Scheduler, PacedScheduler),
        (0.5, True, AsyncScheduler, PacedAsyncScheduler),
        (0.0, True, Scheduler, None),
        (0.5, False, Scheduler, None),
        (0.5, True, str, None),
    ],
    ids=["in turn", "ahead", "off", "prompts are not cut", "the user's own"],
)
def test_vllms_own_schedulers_are_paced(max_gap: float, is_cut: bool, chosen: type, expected: type | None) -> None:
    scheduler = SimpleNamespace(enable_chunked_prefill=is_cut, scheduler_cls=None, get_scheduler_cls=lambda: chosen)
    pace_steps(SimpleNamespace(scheduler_config=scheduler), max_gap)
    if expected is None:
        assert scheduler.scheduler_cls is None
    else:
        made = pickle.loads(pickle.dumps(scheduler.scheduler_cls))  # it goes to the engine's process
        assert (made.func, made.keywords) == (expected, {"max_gap": max_gap})


class FakeScheduler:
    """Two streams, one of a prompt in parts and one that waits, each of these with a picture of 256 tokens."""

    def __init__(self, is_cut: bool) -> None:
        self.max_num_scheduled_tokens = 2048
        self.scheduler_config = SimpleNamespace(disable_chunked_mm_input=not is_cut)
        picture = SimpleNamespace(mm_position=SimpleNamespace(length=256))
        stream = SimpleNamespace(is_prefill_chunk=False, mm_features=[picture])
        self.running = [stream, stream, SimpleNamespace(is_prefill_chunk=True, mm_features=[])]
        self.waiting = [SimpleNamespace(mm_features=[picture])]

    def schedule(self) -> SimpleNamespace:
        return SimpleNamespace()


class PacedFake(_Paced, FakeScheduler):
    pass


def test_a_picture_that_is_not_cut_gets_into_a_step() -> None:
    for is_cut, budget in ((True, 18), (False, 258)):
        scheduler = PacedFake(is_cut, max_gap=0.001)
        scheduler._pace.measure(100, 10.0)
        scheduler.schedule()
        assert scheduler.max_num_scheduled_tokens == budget
