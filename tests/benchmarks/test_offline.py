from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from benchmarks.compare.offline import EngineClient
from benchmarks.load.client import Clock
from benchmarks.load.metrics import Timeline
from ipex_vllm.engines.generation import Delta, Generation, InternalError


class FakeEngine:
    """Yields two tokens that have text only together, then one more; fails first if told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.requests: list[Generation] = []

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        self.requests.append(generation)
        if self.error:
            raise self.error
        yield Delta("", 1, 7)
        yield Delta("ü", 1, 7)
        yield Delta(" x", 1, 7, "length")


async def send(engine: Any) -> Timeline:
    timeline = Timeline(0, 0, "measured", " a", 7, 3, True, 0.0)
    await EngineClient(engine).send(timeline, Clock())
    timeline.check_order()
    return timeline


async def test_the_engine_s_deltas_become_a_timeline() -> None:
    engine = FakeEngine()
    timeline = await send(engine)
    assert timeline.status == "ok"
    assert (timeline.text, timeline.usage_prompt_tokens, timeline.usage_output_tokens) == ("ü x", 7, 3)
    assert [count for _, count in timeline.chunks] == [1, 2, 3]
    (request,) = engine.requests
    assert (request.temperature, request.max_new_tokens, request.ignore_eos) == (0.0, 3, True)
    assert not request.prompt_logprobs


async def test_an_engine_s_error_is_a_failure() -> None:
    timeline = await send(FakeEngine(InternalError("no memory")))
    assert timeline.status == "failed"
    assert "no memory" in str(timeline.error)


async def test_anything_else_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        await send(FakeEngine(ZeroDivisionError()))
