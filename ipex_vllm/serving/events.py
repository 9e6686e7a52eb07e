"""Answers in OpenAI's form: an error, and a stream of server-sent events that shows life while it waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import Message, Send

SIGN_OF_LIFE_S = 15.0  # proxies and clients give up after a minute or more
SIGN_OF_LIFE = b": waiting\n\n"  # a comment, which readers of server-sent events skip
MAX_TOLD = 500  # characters of a text in a refusal; applications repeat what they refuse, however long it is
# What some clients decide by, whether to try again, beside the status.
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Answer:
    """What has been sent of an answer, and signs of life while nothing is. A refusal's texts are cut at MAX_TOLD.

    Attributes:
        headers: what is added to the answer's own.
        is_muted: nothing more of what the application sends goes out.
    """

    def __init__(self, send: Send, headers: Mapping[str, str] | None = None) -> None:
        self._send = send
        self._sent_at = time.monotonic()
        self.headers = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.status = 0
        self.is_event_stream = self.has_ended = self.is_muted = False
        self._refusal: Message | None = None  # how one begins, until all of it is there
        self._refused = b""

    @property
    def has_begun(self) -> bool:
        return self.status != 0 and (self._refusal is None or self.has_ended)

    async def send(self, message: Message) -> None:
        if not self.is_muted:
            await self.send_always(message)

    @contextlib.asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Send a comment into a stream of events whenever it has been silent for SIGN_OF_LIFE_S."""
        task = asyncio.create_task(self._show_life())
        try:
            yield
        finally:
            task.cancel()

    async def end_with(self, event: bytes) -> None:
        """End a stream of events with this one."""
        await self.send_always({"type": "http.response.body", "body": event, "more_body": False})

    async def send_always(self, message: Message) -> None:
        """Send also what is not the application's."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = [name for name, _ in self.headers]
            kept = [(name, value) for name, value in message["headers"] if name not in names]
            message = {**message, "headers": [*kept, *self.headers]}
            kind = dict(kept).get(b"content-type", b"")
            self.is_event_stream = kind.startswith(b"text/event-stream")
            if self.status >= 400 and kind.startswith(b"application/json"):
                self._refusal, self._refused = message, b""
                return
        elif message["type"] == "http.response.body":
            self.has_ended = not message.get("more_body", False)
            if self._refusal is not None:
                self._refused += message.get("body", b"")
                if not self.has_ended:
                    return
                start, body = self._refusal, cut(self._refused)
                headers = [pair for pair in start["headers"] if pair[0] != b"content-length"]
                await self._send({**start, "headers": [*headers, (b"content-length", b"%d" % len(body))]})
                message = {**message, "body": body}
        self._sent_at = time.monotonic()
        await self._send(message)

    async def _show_life(self) -> None:
        while not self.has_ended:
            silent_s = time.monotonic() - self._sent_at
            if silent_s >= SIGN_OF_LIFE_S and self.is_event_stream:
                await self.send({"type": "http.response.body", "body": SIGN_OF_LIFE, "more_body": True})
            await asyncio.sleep(max(SIGN_OF_LIFE_S - silent_s, SIGN_OF_LIFE_S / 10))


def cut(refusal: bytes) -> bytes:
    """A JSON document whose texts have at most MAX_TOLD characters, and three dots for what is missing."""
    if len(refusal) <= MAX_TOLD:
        return refusal

    def shorter(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shorter(each) for name, each in value.items()}
        if isinstance(value, list):
            return [shorter(each) for each in value]
        return f"{value[:MAX_TOLD]}..." if isinstance(value, str) and len(value) > MAX_TOLD else value

    return json.dumps(shorter(json.loads(refusal)), ensure_ascii=False, separators=(",", ":")).encode()


class Outbox:
    """What is made of an answer and not sent yet, so that who makes it does not wait for a client that reads slowly.

    Attributes:
        has_sent_all: the answer's end is sent as well.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._made: asyncio.Queue[Message | None] = asyncio.Queue()
        self._sending = asyncio.create_task(self._send_on())
        self.has_sent_all = False

    async def send(self, message: Message) -> None:
        self._made.put_nowait(message)

    def end_with(self, event: bytes) -> None:
        """End a stream of events with this one, in the place of those that wait."""
        while not self._made.empty():
            self._made.get_nowait()
        self._made.put_nowait({"type": "http.response.body", "body": event, "more_body": False})
        self._made.put_nowait(None)

    async def emptied(self) -> None:
        """Wait until all is sent, or the client is gone. Nothing more is sent then."""
        self._made.put_nowait(None)
        await self._sending

    def close(self) -> None:
        self._sending.cancel()

    async def _send_on(self) -> None:
        while (message := await self._made.get()) is not None:
            await self._send(message)
            self.has_sent_all = message["type"] == "http.response.body" and not message.get("more_body", False)


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": None}}, status, headers)


def error_event(error: JSONResponse) -> bytes:
    """An error as the end of a stream of events."""
    return b"data: " + bytes(error.body) + b"\n\ndata: [DONE]\n\n"
