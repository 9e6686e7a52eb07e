"""Large bodies are taken at a rate that leaves time for small ones."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from ipex_vllm.serving import large_bodies as module
from ipex_vllm.serving.core import Tally
from ipex_vllm.serving.http_server import HttpServer
from ipex_vllm.serving.large_bodies import LARGE, LargeBodies
from tests.support import free_port

RATE = 1 << 20
CLIENT_TIMEOUT_S = 0.4


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each part of a body was held back, on a clock that does not move."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(module.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    return waits


async def read(app: LargeBodies, *sizes: int) -> list[int]:
    """What the application gets of a body in such parts."""
    parts = [{"type": "http.request", "body": bytes(size), "more_body": True} for size in sizes]
    messages: list[Message] = [*parts, {"type": "http.request", "body": b"", "more_body": False}]
    got: list[int] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_: Message) -> None: ...

    await app({"type": "http", "got": got}, receive, send)
    return got


async def reader(scope: Scope, receive: Receive, send: Send) -> None:
    while (message := await receive())["more_body"]:
        scope["got"].append(len(message["body"]))


async def test_bodies_of_the_usual_size_are_not_held_back(slept: list[float]) -> None:
    app = LargeBodies(reader, RATE)
    for _ in range(3):
        assert await read(app, LARGE // 2, LARGE // 2) == [LARGE // 2] * 2
    assert slept == []


async def test_what_is_large_shares_one_rate(slept: list[float]) -> None:
    app = LargeBodies(reader, RATE)
    for _ in range(2):
        assert await read(app, LARGE, RATE, 2 * RATE) == [LARGE, RATE, 2 * RATE]
    assert slept == [1, 3, 4, 6]  # each behind all that came before it


async def test_a_client_that_is_held_back_is_not_taken_for_one_that_stalls() -> None:
    tally = Tally()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        while (message := await receive())["more_body"]:
            size += len(message["body"])
        size += len(message["body"])
        start: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": b"%d" % size})

    server = HttpServer(LargeBodies(answer, RATE), tally, CLIENT_TIMEOUT_S)
    server.config.host, server.config.port = "127.0.0.1", free_port()
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{server.config.port}"
        headers = {"Connection": "close"}  # one that is kept is idle, and given up as well
        async with httpx.AsyncClient(trust_env=False, timeout=60, headers=headers) as client:
            answered = await asyncio.gather(*(client.post(url, content=bytes(size)) for size in (RATE, RATE, 1)))
        assert [int(each.text) for each in answered] == [RATE, RATE, 1]
        assert tally.stalled_clients == 0
    finally:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await serving
