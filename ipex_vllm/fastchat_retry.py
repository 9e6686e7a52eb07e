"""A request that a dead worker failed before its first token is tried once more, with another worker.

FastChat's API server asks the controller for a worker and gives up where that one fails, and the controller knows a
dead worker until its heartbeats are missed for 90 s. So what failed in this way is not told: the controller is asked to
look after its workers, which makes it forget the dead one, and FastChat's server gets the same request again. Once,
since a request can be what a worker died of.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import aiohttp
import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ipex_vllm.fastchat_api")

# What FastChat's server raises where a worker or the controller cannot be reached, or goes away.
LOST: tuple[type[Exception], ...] = (httpx.HTTPError, aiohttp.ClientError, OSError)
INTERNAL_ERROR = 50001  # FastChat's code for a worker that failed, and for one that could not be reached
REFRESH_TIMEOUT_S = 60.0  # the controller waits for 5 s for each worker that hangs


class WorkerFailed(Exception):
    """A worker told of an error of its own, or FastChat's server of one that is gone. The message is for the log."""


class Retry:
    """Gives a request to an application, and again where a worker failed it before its first token.

    Args:
        app: FastChat's.
        controller_url: of the controller that it asks.
    """

    def __init__(self, app: ASGIApp, controller_url: str) -> None:
        self._app = app
        self._controller_url = controller_url
        self._refreshing = asyncio.Lock()
        self._refreshed_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what failed twice: WorkerFailed, or one of LOST."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(receive)
        first = Attempt(send)
        if (failure := await first.run(self._app, scope, request.receive)) is None:
            return
        logger.warning("%s: tried again with another worker: %.200r", scope["path"], failure)
        await self._forget_the_dead(time.monotonic())
        request.rewind()
        second = Attempt(send, first)
        if await second.run(self._app, scope, request.receive) is not None:
            raise failure

    async def _forget_the_dead(self, failed_at: float) -> None:
        """Make the controller ask its workers, once for all that failed before."""
        async with self._refreshing:
            if self._refreshed_at >= failed_at:
                return
            started_at = time.monotonic()
            try:
                async with httpx.AsyncClient(timeout=REFRESH_TIMEOUT_S, trust_env=False) as client:
                    await client.post(f"{self._controller_url}/refresh_all_workers")
            except httpx.HTTPError as error:
                logger.warning("the controller could not be asked to look after its workers: %r", error)
            self._refreshed_at = started_at


class Request:
    """A request's messages, which can be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: list[Message] = []
        self._position = 0

    async def receive(self) -> Message:
        if self._position < len(self._read):
            message = self._read[self._position]
        else:
            message = await self._receive()
            if message["type"] == "http.request":
                self._read.append(message)
        self._position += 1
        return message

    def rewind(self) -> None:
        self._position = 0


class Attempt:
    """One of the answers to a request, which is passed on unless a worker failed before its first token.

    Attributes:
        has_begun: a stream of events has begun, in this attempt or in the one before, and cannot begin again.
    """

    def __init__(self, send: Send, before: Attempt | None = None) -> None:
        self._send = send
        self._is_second = before is not None
        self._start: Message = {}
        self._is_stream = self._has_token = False
        self._failure: Exception | None = None
        self.has_begun: bool = before is not None and before.has_begun

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive) -> Exception | None:
        """Return what failed, where the client has seen nothing of it."""
        try:
            await app(scope, receive, self._send_on)
        except Exception as error:
            lost = innermost(error)
            if self._has_token or not isinstance(lost, LOST):
                raise
            return lost
        return self._failure

    async def _send_on(self, message: Message) -> None:
        if self._failure is not None:  # what follows an error in a stream
            return
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._has_token or await self._is_to_be_sent(message.get("body", b"")):
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        self._start = message
        self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        if self._is_stream and not self.has_begun:
            self.has_begun = True
            await self._send(message)

    async def _is_to_be_sent(self, body: bytes) -> bool:
        """Whether the first part of an answer, or what comes before a stream's first token, is for the client."""
        content = content_of(body)
        if self._is_stream:
            if content.get("error_code") == INTERNAL_ERROR:
                self._failure = WorkerFailed(content.get("text"))
                return False
            if is_opening(content):
                return not self._is_second
        else:
            # The second time it can be that no worker is left, of which FastChat says that there is no such model.
            if content.get("code") == INTERNAL_ERROR or (self._is_second and self._start["status"] >= 400):
                self._failure = WorkerFailed(content.get("message"))
                return False
            await self._send(self._start)
        self._has_token = True
        return True


def content_of(body: bytes) -> dict[str, Any]:
    """The object of an answer or an event; an empty one where there is none."""
    try:
        content = json.loads(body.removeprefix(b"data: "))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def is_opening(event: dict[str, Any]) -> bool:
    """Whether an event tells the role alone, which FastChat sends before it asks a worker."""
    return [choice.get("delta") for choice in event.get("choices", ())] == [{"role": "assistant"}]


def innermost(error: BaseException) -> BaseException:
    """The one error of a group of one: what runs in a task group fails with a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
