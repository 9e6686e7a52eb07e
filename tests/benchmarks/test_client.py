from __future__ import annotations

from typing import Any

import pytest

from benchmarks.load.client import Clock, Event, HttpClient, only_model, record, request_body
from benchmarks.load.metrics import Timeline
from benchmarks.options import BenchmarkError
from tests.benchmarks.fake_server import Behaviour


def request(**changes: Any) -> Timeline:
    fields: dict[str, Any] = {
        "session": 0, "turn": 0, "phase": "measured", "prompt": " a b c", "prompt_tokens": 3, "max_tokens": 5,
        "must_reach_max": True, "scheduled": 0.0,
    }  # fmt: skip
    return Timeline(**(fields | changes))


async def send(url: str, protocol: str, timeout_s: float = 10) -> Timeline:
    timeline = request()
    async with HttpClient(url, protocol, "fake", timeout_s) as client:
        await client.send(timeline, Clock())
    timeline.check_order()
    return timeline


@pytest.fixture(params=["fastchat", "openai"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_a_whole_answer(server: str, protocol: str) -> None:
    timeline = await send(server, protocol)
    assert timeline.status == "ok"
    assert timeline.text == " w0 w1 w2 w3 w4"
    assert timeline.finish_reason == "length"
    # The last message repeats the text, or has none: it is no chunk of tokens.
    assert [count for _, count in timeline.chunks] == [1, 2, 3, 4, 5]
    assert (timeline.usage_prompt_tokens, timeline.usage_output_tokens) == (3, 5)


async def test_coalesced_chunks_carry_their_counts(server: str, behaviour: Behaviour, protocol: str) -> None:
    behaviour.tokens_per_chunk = 2
    timeline = await send(server, protocol)
    assert [count for _, count in timeline.chunks] == [2, 4, 5]


async def test_without_usage_the_limit_that_ended_it_is_the_count(server: str, behaviour: Behaviour) -> None:
    behaviour.stream_usage = False
    timeline = await send(server, "openai")
    assert timeline.usage_output_tokens is None
    assert timeline.output_tokens == 5
    assert len(timeline.chunks) == 5


async def test_an_early_end_is_incomplete(server: str, behaviour: Behaviour, protocol: str) -> None:
    behaviour.end_early_after = 2
    timeline = await send(server, protocol)
    assert (timeline.status, timeline.finish_reason) == ("incomplete", "stop")


async def test_an_error_in_the_stream_is_a_failure(server: str, behaviour: Behaviour, protocol: str) -> None:
    behaviour.error = "out of memory"
    timeline = await send(server, protocol)
    assert timeline.status == "failed"
    assert "out of memory" in str(timeline.error)


async def test_a_dropped_connection_is_a_failure(server: str, behaviour: Behaviour, protocol: str) -> None:
    behaviour.drop_after = 2
    timeline = await send(server, protocol)
    assert timeline.status == "failed"
    assert len(timeline.chunks) == 2


async def test_no_server_and_wrong_path_are_failures(server: str) -> None:
    assert "ClientConnectorError" in str((await send("http://127.0.0.1:9", "openai")).error)
    assert str((await send(server + "/nowhere", "openai")).error).startswith("HTTP 404")


async def test_a_request_that_takes_too_long_is_a_failure(server: str, behaviour: Behaviour) -> None:
    behaviour.token_s = 30
    assert (await send(server, "fastchat", timeout_s=0.1)).error == "no end within 0.1 s"


def test_requests_are_greedy_and_of_full_length() -> None:
    fastchat = request_body("fastchat", "m", request())
    assert fastchat == {
        "model": "m", "prompt": " a b c", "temperature": 0, "ignore_eos": True, "max_new_tokens": 5, "echo": False,
    }  # fmt: skip
    openai = request_body("openai", "m", request())
    assert (openai["temperature"], openai["ignore_eos"], openai["max_tokens"]) == (0, True, 5)
    assert openai["stream_options"]["include_usage"] is True


def test_a_token_without_text_is_a_chunk_where_the_server_counts() -> None:
    timeline = request()
    record(timeline, Event("", True, output_tokens=1), 1.0)
    record(timeline, Event("x", True, output_tokens=2), 2.0)
    record(timeline, Event("x", False, "length", output_tokens=2), 3.0)
    assert timeline.chunks == [(1.0, 1), (2.0, 2)]


async def test_the_only_model_is_found(server: str, protocol: str) -> None:
    assert await only_model(server, protocol) == "fake"


async def test_no_answer_is_one_line() -> None:
    with pytest.raises(BenchmarkError, match=r"no fastchat server answers at http://127\.0\.0\.1:9"):
        await only_model("http://127.0.0.1:9", "fastchat")


def test_an_unknown_protocol_is_one_line() -> None:
    with pytest.raises(BenchmarkError, match="expected one of fastchat, openai"):
        HttpClient("http://x", "grpc", "m", 1)
