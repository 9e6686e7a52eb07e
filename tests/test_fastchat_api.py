"""FastChat's own API server behind our guard, as a process, with a worker on the fake engine."""

from __future__ import annotations

import asyncio
import json
import select
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from ipex_vllm.fastchat_api import Client, Guard
from ipex_vllm.serving import events, fastchat
from ipex_vllm.serving.chat_template import ChatTemplate
from ipex_vllm.serving.conversation import NOTATION, ChatFormat, as_json
from ipex_vllm.serving.core import Core
from ipex_vllm.serving.fastchat import FastChatServer
from ipex_vllm.serving.large_bodies import MAX_BODY_BYTES
from ipex_vllm.serving.slots import Slots
from tests.processes import Stack, fastchat_stack
from tests.support import FakeEngine, raw_post

ENGINE = FakeEngine(context_length=100_000)
USER = {"role": "user", "content": "Hi"}


class TakesTurns(ChatTemplate):
    """A model's chat template that refuses two users in a row."""

    def prompt(self, dialogue: Sequence[dict[str, str]]) -> str:
        roles = [message["role"] for message in dialogue if message["role"] != "system"]
        if any(role == next_role for role, next_role in pairwise(roles)):
            raise ValueError("Conversation roles must alternate")
        return "".join(f"<{message['role']}>{message['content']}" for message in dialogue)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    core = Core(ENGINE, ("fake-model",), Slots(100, 100))
    server = FastChatServer(core, ChatFormat(as_json(NOTATION), TakesTurns(None)))
    with fastchat_stack(folder, server, FASTCHAT_WORKER_API_TIMEOUT="1", IPEX_VLLM_CLIENT_TIMEOUT="2") as running:
        yield running


def post(stack: Stack, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps({"model": "fake-model", **body}).encode()
    headers = {"Content-Type": "application/json"}
    return httpx.post(stack.openai_server + path, content=content, headers=headers, timeout=60, trust_env=False)


def chat(stack: Stack, **body: Any) -> httpx.Response:
    return post(stack, "/v1/chat/completions", {"messages": [USER], **body})


def complete(stack: Stack, **body: Any) -> httpx.Response:
    return post(stack, "/v1/completions", {"prompt": "p", **body})


def test_a_client_reads_no_certificates_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_again(*_: Any, **__: Any) -> None:
        raise AssertionError("20 ms of everybody's time")

    monkeypatch.setattr("ssl.create_default_context", read_again)
    with pytest.raises(AssertionError):
        httpx.AsyncClient()
    assert Client().is_closed is False  # as FastChat makes one for each stream
    assert Client(verify=False).is_closed is False


def test_parts_of_a_message_are_joined_whoever_speaks(stack: Stack) -> None:
    def prompt(*contents: Any) -> str:
        system, user, assistant = contents
        messages = [("system", system), ("user", user), ("assistant", assistant), ("user", "go on")]
        answer = chat(stack, messages=[{"role": role, "content": content} for role, content in messages])
        assert answer.json()["choices"][0]["message"]["content"] == "Hello world"
        return ENGINE.seen[-1].prompt

    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    assert prompt(parts("Be", "kind."), parts("one", "two"), parts("three")) == prompt("Be\nkind.", "one\ntwo", "three")


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_dialogue_that_the_chat_template_refuses_is_told(stack: Stack, is_streamed: bool) -> None:
    answer = chat(stack, messages=[USER, {"role": "assistant", "content": "Hello"}, {**USER, "content": "Go on"}])
    assert answer.status_code == 200
    assert ENGINE.seen[-1].prompt == "<user>Hi<assistant>Hello<user>Go on"
    answer = chat(stack, messages=[USER, {"role": "assistant", "content": "A"}] + [USER] * 2, stream=is_streamed)
    assert "The model's chat template refuses this dialogue: Conversation roles must alternate" in answer.text
    assert answer.status_code == (200 if is_streamed else 400)


def test_what_clients_send_along_passes(stack: Stack) -> None:
    harmless = {
        "n": None,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stream_options": {"include_usage": True},
        "metadata": {"a": "b"},
        "seed": 1,
        "temperature": None,
    }
    history = [
        {"role": "developer", "content": "Be kind."},
        {"role": "system", "content": "Be brief."},
        {**USER, "name": "ada"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": []},
        USER,
    ]
    answer = chat(stack, messages=history, max_completion_tokens=1, **harmless).json()
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert "Be kind.\n\nBe brief." in ENGINE.seen[-1].prompt
    assert complete(stack, prompt=["p", "q"], n=2, max_tokens=None, suffix=None).json()["choices"][3]["index"] == 3


NOWHERE: list[dict[str, Any]] = [{"messages": []}, {"n": 10**9}, {"modalities": ["audio"]}]
RENAMED = [{"guided_json": {"type": "object"}}, {"functions": [{"name": "f"}]}]


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "low"},
        {"logit_bias": {"1": 100}},
        {"logprobs": True},
        {"min_p": 0.1},
        *RENAMED,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "tool", "content": "4"}]},
        *NOWHERE,
    ],
)
def test_what_would_be_dropped_and_changes_the_answer_is_refused_in_words(stack: Stack, body: dict[str, Any]) -> None:
    num_seen = len(ENGINE.seen)
    answer = chat(stack, **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert next(iter(body)) in error["param"]
    assert ("worker's own address, whose /v1 knows" in error["message"]) == (body not in NOWHERE)
    assert len(ENGINE.seen) == num_seen


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1, 2, 3]},
        {"prompt": [[1, 2], [3]]},
        {"prompt": []},
        {"prompt": ["p"] * 2000},
        {"prompt": ["p", 1]},
        {"prompt": ["p"] * 100, "n": 50},
        {"prompt": ["p", "q"], "stream": True},
        {"best_of": 3},
        {"use_beam_search": True},
        {"suffix": "s"},
    ],
)
def test_a_completion_that_cannot_be_had_is_refused_in_words(stack: Stack, body: dict[str, Any]) -> None:
    answer = complete(stack, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_body_of_more_than_the_bound_is_refused(stack: Stack) -> None:
    answer = complete(stack, prompt="p" * MAX_BODY_BYTES)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "The request body is larger than 16 MiB."


def test_no_odd_body_is_a_traceback(stack: Stack) -> None:
    odd: list[Any] = [None, True, -1, 10**40, 1.5, "", "x" * 100, "\ud800", [], {}, [None], [[]], [{}], {"a": None}]
    bodies: list[bytes] = [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000]
    # Each field that FastChat knows, with each odd value.
    names = "model messages prompt input prompts n max_tokens temperature top_p top_k stop stream logprobs echo best_of"
    for name in (*names.split(), "presence_penalty", "user", "encoding_format"):
        for value in odd:
            whole = {"model": "fake-model", "messages": [USER], "prompt": "p", "input": "p", "max_tokens": 1}
            bodies.append(json.dumps({**whole, name: value}).encode())
    bodies += [
        json.dumps({"model": "fake-model", "messages": [{"role": "user", "content": value}]}).encode() for value in odd
    ]
    endpoints = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/v1/token_check")
    with httpx.Client(base_url=stack.openai_server, trust_env=False, timeout=60) as client:
        for body in bodies:
            for path in endpoints:
                answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
                assert answer.status_code < 500, (path, body[:200], answer.text)
                if answer.is_error:
                    assert answer.json(), (path, body[:200])
    assert "Traceback" not in stack.api.output


def test_a_model_that_has_no_worker_is_told(stack: Stack) -> None:
    answer = post(stack, "/api/v1/token_check", {"prompts": [{"model": "none", "prompt": "p", "max_tokens": 1}]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert "No available worker for none" in answer.json()["error"]["message"]


def test_a_stream_that_waits_longer_than_fastchat_does_comes_to_its_end(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ENGINE, "interval_s", 1.5)
    monkeypatch.setattr(fastchat, "SIGN_OF_LIFE_S", 0.2)
    events = complete(stack, stream=True).text.split("\n\n")
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]) == "Hello world"
    assert events[-2:] == ["data: [DONE]", ""]


def test_a_stream_that_breaks_ends_with_an_error(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENGINE, "interval_s", 2.0)  # and no sign of life: FastChat waits for 1 s here
    *_, error, done, rest = complete(stack, stream=True).text.split("\n\n")
    assert "does not answer" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert (done, rest) == ("data: [DONE]", "")


def test_a_client_that_reads_nothing_is_given_up(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENGINE, "texts", ["x" * (1 << 20)] * 12)  # more than the kernel keeps for it
    body = {"model": "fake-model", "prompt": "p", "stream": True, "max_tokens": 12}
    with raw_post(stack.openai_server, "/v1/completions", body) as connection:
        errors = select.poll()
        errors.register(connection, 0)
        assert errors.poll(30_000), "its connection is still there"
        with pytest.raises(ConnectionResetError):
            list(iter(lambda: connection.recv(1 << 20), b""))
    assert "Traceback" not in stack.api.output


async def test_a_client_of_a_stream_sees_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SIGN_OF_LIFE_S", 0.05)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await asyncio.sleep(0.5)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    await Guard(slow)({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)
    assert len(sent) > 4
    assert set(sent[1:-1]) == {b": waiting\n\n"}, "comments, which no reader of events shows"
    assert sent[-1] == b"data: [DONE]\n\n"
