"""What a protocol gets from the core, and what it leaves behind, whatever the protocol."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

import pytest

from ipex_vllm.engines.generation import Delta, Generation, InternalError, InvalidParameter, RequestError
from ipex_vllm.serving.core import ERROR_CODES, Core, InvalidModel, Unauthorized, error_code
from ipex_vllm.serving.slots import Overloaded, Slots
from tests.support import FakeEngine


async def collect(core: Core, generation: Generation, request_id: str = "id") -> str:
    """A protocol of the simplest kind: the text."""
    with core.recorded(request_id) as record:
        async with aclosing(core.stream(generation, record)) as deltas:
            return "".join([delta.text async for delta in deltas])


async def test_slots_are_given_back_whatever_ends_the_work() -> None:
    slots = Slots(1, 1)
    for error in (ValueError, asyncio.CancelledError, GeneratorExit):
        with pytest.raises(error):
            async with slots.take(1):
                raise error
    assert slots.queue_length == 0
    async with slots.take(1):
        assert slots.queue_length == 1


async def test_a_request_is_text_a_count_and_a_line(caplog: pytest.LogCaptureFixture) -> None:
    core = Core(FakeEngine(), ("m",), Slots(1, 1))
    with caplog.at_level(logging.INFO):
        assert await collect(core, Generation("four")) == "Hello world"
    assert (core.tally.finished, core.tally.prompt_tokens, core.tally.completion_tokens) == ({"stop": 1}, 4, 2)
    assert "request id stop prompt_tokens=4 completion_tokens=2 ttft=" in caplog.text
    assert "four" not in caplog.text


async def test_the_line_tells_how_many_drafts_were_accepted(caplog: pytest.LogCaptureFixture) -> None:
    core = Core(FakeEngine(), ("m",), Slots(1, 1))
    with caplog.at_level(logging.INFO), core.recorded("id") as record:
        record.add(Delta("a", 3, 4, drafted=5, accepted=2))
        record.add(Delta("b", 1, 4, "stop", index=1, drafted=3))
    assert record.completion_tokens == 4
    assert caplog.text.rstrip().endswith("drafts_accepted=2/8")


async def test_prompts_are_logged_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await collect(Core(FakeEngine(), ("m",), Slots(1, 1), log_prompts=True), Generation("four"))
    assert "request id prompt 'four'" in caplog.text


async def test_of_errors_only_those_for_clients_leave_and_each_is_counted() -> None:
    for raised, seen in ((InvalidParameter("top_x"), InvalidParameter), (ZeroDivisionError("secret"), InternalError)):
        core = Core(FakeEngine(["begun", raised]), ("m",), Slots(1, 1))
        with pytest.raises(seen) as caught:
            await collect(core, Generation("p"))
        assert "secret" not in str(caught.value)
        assert core.tally.errors == {error_code(caught.value): 1}
        assert core.slots.queue_length == 0


async def test_a_model_that_reads_no_pictures_says_so() -> None:
    core = Core(FakeEngine(), ("m",), Slots(1, 1))
    with pytest.raises(InvalidParameter, match="reads text only"):
        await collect(core, Generation("p", images=(b"picture",)))


async def test_a_client_that_goes_away_is_a_disconnect_and_no_error() -> None:
    core = Core(FakeEngine(["x"] * 1000, interval_s=0.01), ("m",), Slots(1, 1))
    task = asyncio.create_task(collect(core, Generation("p", max_new_tokens=1000)))
    while not core.slots.num_in_use:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (core.tally.disconnects, core.tally.errors, core.slots.queue_length) == (1, {}, 0)


async def test_a_drain_waits_for_what_runs_and_takes_nothing_new() -> None:
    core = Core(FakeEngine(["a", "b"], interval_s=0.05), ("m",), Slots(1, 1))
    running = asyncio.create_task(collect(core, Generation("p")))
    while not core.slots.num_in_use:
        await asyncio.sleep(0.01)
    core.slots.is_closed = True
    with pytest.raises(Overloaded, match="shutting down"):
        await collect(core, Generation("p"))
    await core.drain(60)
    assert await running == "ab"


def test_every_error_has_a_number() -> None:
    def kinds(cls: type[RequestError]) -> set[type[RequestError]]:
        return {cls} | {kind for child in cls.__subclasses__() for kind in kinds(child)}

    assert kinds(RequestError) - {RequestError} == ERROR_CODES.keys()
    assert {InvalidModel, Unauthorized, Overloaded} <= ERROR_CODES.keys()
