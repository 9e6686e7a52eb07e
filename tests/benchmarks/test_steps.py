"""Which of an engine's steps `benchmarks.steps` adds up; what it prints of a real one is in test_commands.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.steps import COUNT, FORWARD, SCHEDULER, STREAMS, Clockwork


@pytest.mark.parametrize(
    ("streams", "scheduled", "counted"),
    [
        pytest.param(0, {"a": 32}, 0, id="the prompt by which the engine wakes up"),
        pytest.param(0, {"a": 1}, 0, id="its answer"),
        pytest.param(2, {"a": 32, "b": 1}, 0, id="a prompt beside a stream"),
        pytest.param(2, {"a": 1}, 0, id="one stream has ended"),
        pytest.param(2, {"a": 1, "b": 1}, 1, id="all streams decode"),
    ],
)
def test_only_steps_in_which_all_streams_decode_count(streams: int, scheduled: dict[str, int], counted: int) -> None:
    clockwork = Clockwork()
    clockwork.shared[STREAMS] = streams
    schedule = clockwork.timed(lambda: SimpleNamespace(num_scheduled_tokens=scheduled), SCHEDULER)
    forward = clockwork.timed(lambda: None, FORWARD)

    def step(core: Any) -> None:
        schedule()
        forward()

    clockwork.whole(step)(None)
    assert clockwork.shared[COUNT] == counted
