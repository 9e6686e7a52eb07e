"""An engine's own application over HTTP: the same slots, drain, token, log line and counts as FastChat's endpoints."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from ipex_vllm.serving import events, openai
from ipex_vllm.serving.fastchat import FastChatServer
from tests.fake_application import CHAT, MESSAGES, Application
from tests.serving.test_fastchat import wait_until
from tests.support import FakeEngine, generate, make_server, raw_post, serving


def make(**options: Any) -> tuple[FastChatServer, Application]:
    application = Application()
    return make_server(FakeEngine(), openai=application, **options), application


def ask(url: str, path: str = CHAT, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60, trust_env=False)


def test_requests_of_both_protocols_share_the_slots_and_beyond_them_are_told_so() -> None:
    server, application = make(limit=2, queue_limit=1)
    with serving(server) as url, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, url, tokens=50, interval_s=0.1) for _ in range(3)]  # while all below is told
        wait_until(lambda: server.core.slots.queue_length == 3, "2 running and 1 waiting")
        assert httpx.post(url + "/worker_get_status", trust_env=False).json()["queue_length"] == 3
        assert application.num_running == 2
        for stream in (False, True):
            refused = ask(url, stream=stream)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert "2 requests are running and 1 are waiting" in refused.json()["error"]["message"]
        refused = ask(url, MESSAGES)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "overloaded_error")
        assert generate(url, prompt="p")["error_code"] == 42903
        assert [answer.result().status_code for answer in running] == [200] * 3
    assert server.core.tally.errors == {42903: 4}
    assert server.core.slots.queue_length == 0


def test_what_is_wrong_is_told_without_waiting_and_counted() -> None:
    server, _ = make(limit=1)
    with serving(server) as url, ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, url, tokens=50, interval_s=0.1)
        wait_until(lambda: server.core.slots.num_in_use == 1, "running")
        assert ask(url, wrong=True).status_code == 400
        assert not running.done()
    assert server.core.tally.errors == {40302: 1}
    assert server.core.slots.queue_length == 0


def test_a_request_of_several_parts_has_one_slot() -> None:
    server, _ = make(limit=1)
    with serving(server) as url:
        assert ask(url, parts=3).json() == ["word", "word"]
        assert ask(url, parts=3, stream=True).text == "data: word\n\n" * 2
    assert server.core.slots.queue_length == 0


def test_a_disconnect_frees_the_slot_at_once_running_or_waiting() -> None:
    server, application = make(limit=2)
    with serving(server) as url:
        streams = [raw_post(url, CHAT, {"tokens": 1000, "interval_s": 0.02, "stream": True}) for _ in range(3)]
        wait_until(lambda: server.core.slots.queue_length == 3, "2 running and 1 waiting")
        for connection in reversed(streams):
            connection.close()
        wait_until(lambda: server.core.slots.queue_length == 0, "all gone")
        assert application.num_running == 0
        assert server.core.tally.disconnects == 3
        assert ask(url).status_code == 200


def test_a_client_that_reads_nothing_keeps_no_slot_and_has_all_of_it_when_it_reads() -> None:
    server, _ = make(limit=1)
    body = {"tokens": 100, "word": "w" * 200_000, "interval_s": 0.01, "stream": True}  # more than the kernel keeps
    with serving(server) as url:
        with raw_post(url, CHAT, body) as connection:
            wait_until(lambda: server.core.slots.num_in_use == 1, "running")
            wait_until(lambda: server.core.slots.queue_length == 0, "all is generated")
            assert ask(url).status_code == 200
            wait_until(lambda: server.core.tally.finished == {"stop": 1}, "the other one is not read")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            content = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert content.count(b"data: w") == 100
        assert content.endswith(b"0\r\n\r\n")
        wait_until(lambda: server.core.tally.finished == {"stop": 2}, "both are")
    assert server.core.tally.disconnects == 0


async def test_a_drain_waits_for_who_reads_and_then_tells_them() -> None:
    server, application = make()
    read = asyncio.Event()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        await read.wait()
        sent.append(message)

    parts = [{"type": "http.request", "body": b'{"stream": true}'}]

    async def receive() -> Any:
        return parts.pop() if parts else await asyncio.Future()

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"content-type", b"application/json")]}
    scope |= {"query_string": b"", "state": {}}
    answering = asyncio.create_task(server.app(scope, receive, send))
    while not application.num_answered:
        await asyncio.sleep(0.01)
    assert server.core.slots.queue_length == 0
    server.core.slots.is_closed = True
    draining = asyncio.create_task(server.core.drain(0.3))
    await asyncio.sleep(0.1)
    assert not draining.done()
    await draining
    read.set()
    await answering
    assert b"shut down before the request was finished" in sent[-1]["body"]
    assert server.core.tally.errors == {42903: 1}


@pytest.mark.parametrize(
    ("path", "end"),
    [
        (CHAT, 'data: {"error":'),
        (MESSAGES, 'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error"'),
        ("/v1/responses", 'event: error\ndata: {"type": "error", "code": "server_error"'),
    ],
)
async def test_at_the_end_of_the_drain_what_runs_gets_an_error(path: str, end: str) -> None:
    server, application = make(limit=4)
    transport = httpx.ASGITransport(server.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
        requests = [
            asyncio.create_task(client.post(path, json={"tokens": 1000, "interval_s": 0.02, "stream": stream}))
            for stream in (True, False)
        ]
        while application.num_running < 2:
            await asyncio.sleep(0.01)
        server.core.slots.is_closed = True
        assert (await client.post(path, json={})).status_code == 429
        await server.core.drain(0.1)
        streamed, whole = await asyncio.gather(*requests)
    assert streamed.text.startswith("data: word\n\n")
    assert end in streamed.text
    assert "shut down before the request was finished" in streamed.text
    assert (whole.status_code, application.num_running, server.core.slots.queue_length) == (429, 0, 0)
    assert server.core.tally.errors == {42903: 3}


def test_a_stream_shows_signs_of_life_while_it_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SIGN_OF_LIFE_S", 0.1)
    server, _ = make(limit=1)
    with serving(server) as url, ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, url, tokens=10, interval_s=0.1)
        wait_until(lambda: server.core.slots.num_in_use == 1, "running")
        waiting = pool.submit(ask, url, stream=True)
        assert waiting.result().text.startswith(": waiting\n\n")
        assert waiting.result().text.endswith("data: word\n\n" * 2)
        assert running.result().json() == ["word"] * 10


def test_a_bug_is_an_error_that_tells_no_secret_and_what_failed_in_a_stream_is_counted() -> None:
    server, _ = make()
    with serving(server) as url:
        for path in (CHAT, MESSAGES):
            failed = ask(url, path, bug=True)
            assert failed.status_code == 500
            assert "secret" not in failed.text
        assert ask(url, stream=True, fails=True).status_code == 200
    assert server.core.tally.errors == {50001: 3}


def test_the_token_guards_every_path_in_the_form_of_its_protocol() -> None:
    server, _ = make(api_token="s3cret")
    with serving(server) as url:
        for path in (CHAT, "/v1/models", "/nothing", MESSAGES):
            refused = httpx.post(url + path, json={}, headers={"Authorization": "Bearer x"}, trust_env=False)
            assert refused.status_code == 401
            assert "API token" in refused.json()["error"]["message"]
        for headers in ({"Authorization": "Bearer s3cret"}, {"x-api-key": "s3cret"}):
            assert httpx.get(url + "/v1/models", headers=headers, trust_env=False).json() == {"data": []}
    assert server.core.tally.errors == {}


def test_a_browsers_question_whether_a_page_may_ask_needs_no_token() -> None:
    """vLLM's --allowed-origins answers it."""
    server, application = make(api_token="s3cret")
    application.app.add_middleware(
        CORSMiddleware, allow_origins=["http://page"], allow_methods=["*"], allow_headers=["*"]
    )
    headers = {"Origin": "http://page", "Access-Control-Request-Headers": "authorization"}
    with serving(server) as url:
        asked = {**headers, "Access-Control-Request-Method": "POST"}
        answer = httpx.options(url + CHAT, headers=asked, trust_env=False)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://page")
        assert httpx.options(url + CHAT, headers=headers, trust_env=False).status_code == 401


async def test_the_token_guards_websockets() -> None:
    server, _ = make(api_token="s3cret")
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await server.app({"type": "websocket", "path": "/v1/realtime", "headers": [], "state": {}}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_one_log_line_with_the_clients_id_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(make()[0]) as url:
        response = httpx.post(url + CHAT, json={}, headers={"X-Request-Id": "abc"}, trust_env=False)
        assert response.headers["x-request-id"] == "abc"
        assert httpx.get(url + "/v1/models", trust_env=False).headers["x-request-id"]
    lines = [record.getMessage() for record in caplog.records if record.name == "ipex_vllm.serving.core"]
    assert len(lines) == 1
    assert lines[0].startswith("request abc stop prompt_tokens=7 completion_tokens=2")
    assert "private" not in caplog.text


def test_a_body_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "MAX_BODY_BYTES", 1000)
    with serving(make()[0]) as url:
        refused = ask(url, tokens="x" * 2000)
        assert refused.status_code == 400
        assert "larger" in refused.json()["error"]["message"]
        parts = iter([b"x" * 600] * 3)
        assert httpx.post(url + CHAT, content=parts, trust_env=False).status_code == 400


def test_without_an_application_the_paths_are_not_there() -> None:
    with serving(make_server(FakeEngine())) as url:
        assert json.loads(ask(url).text) == {"detail": "Not Found"}
