"""Answers on their way to a client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import Message

from ipex_vllm.serving.events import MAX_TOLD, Answer


async def sent(status: int, content: Any, parts: int = 1) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body that a client gets of an application's answer, which sends its body in so many parts."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    answer = Answer(send, {"x-request-id": "7"})
    response = JSONResponse(content, status)
    await answer.send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
    size = -(-len(response.body) // parts)
    for part in range(parts):
        assert not answer.has_ended
        body = bytes(response.body[part * size : (part + 1) * size])
        await answer.send({"type": "http.response.body", "body": body, "more_body": part < parts - 1})
    assert (answer.status, answer.has_begun, answer.has_ended) == (status, True, True)
    return dict(messages[0]["headers"]), b"".join(message["body"] for message in messages[1:])


@pytest.mark.parametrize("parts", [1, 3])
async def test_a_refusal_repeats_no_more_than_can_be_read(parts: int) -> None:
    told = {
        "error": {"message": "The model `" + "\u00e4" * 5000 + "` does not exist.", "code": 404, "errors": ["x" * 900]}
    }
    headers, body = await sent(404, told, parts)
    assert int(headers[b"content-length"]) == len(body)
    assert headers[b"x-request-id"] == b"7"
    error = json.loads(body)["error"]
    assert error["message"] == ("The model `" + "\u00e4" * 5000)[:MAX_TOLD] + "..."
    assert (error["code"], len(error["errors"][0])) == (404, MAX_TOLD + 3)


@pytest.mark.parametrize(("status", "length"), [(400, 300), (200, 5000)], ids=["a short refusal", "no refusal"])
async def test_what_else_is_answered_stays_as_it_is(status: int, length: int) -> None:
    content = {"text": "x" * length}
    headers, body = await sent(status, content)
    assert (json.loads(body), int(headers[b"content-length"])) == (content, len(body))
