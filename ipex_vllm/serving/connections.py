"""File descriptors: as many as the slots need, and a reserve from which one client too many is told so.

A connection takes a descriptor. Where they run out nothing can be accepted, and nobody be told; so the last of them are
kept: a connection beyond the others gets an answer, and is closed with it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ipex_vllm.serving.core import Tally
from ipex_vllm.serving.refusals import refusal
from ipex_vllm.serving.slots import Overloaded

logger = logging.getLogger(__name__)

RESERVED = 64  # descriptors that no request is served on
UNTOUCHED = 32  # of these, the last, which no connection takes: for what this process opens itself
OF_THE_ENGINE = 256  # descriptors: its processes' pipes and sockets, the model's files, libraries
LOG_INTERVAL_S = 60.0
IS_BEYOND = "is_beyond_the_connections"  # in the state of a connection's requests

# What takes no time is answered beyond the limit as well: the controller and probes ask it.
ANSWERED = ("/worker_get_status", "/count_token", "/worker_get_conv_template", "/model_details")


def raise_descriptor_limit(num_requests: int) -> None:
    """Raise this process' soft limit to what so many requests at once need, and say so where that cannot be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_requests + RESERVED + OF_THE_ENGINE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logger.warning(
            "file descriptors: %d requests that run or wait need %d, and this process may have %d; clients beyond "
            "those are refused. Raise the limit (ulimit -Hn, LimitNOFILE=) or lower --limit-worker-concurrency",
            num_requests,
            needed,
            allowed,
        )


def is_beyond(descriptor: int, kept: int) -> bool:
    """Whether a descriptor is one of the last `kept`: a new one is always the lowest that is free."""
    return descriptor >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - kept


class ListeningSocket(socket.socket):
    """A socket that accepts nothing while the last descriptors are all that is left. It takes over another one."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())

    def accept(self) -> tuple[socket.socket, Any]:
        descriptor = os.dup(self.fileno())
        os.close(descriptor)
        if is_beyond(descriptor, UNTOUCHED):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # asyncio tries again in a second
        return super().accept()


class MarkingProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's HTTP protocol, which marks the requests of connections that can only be told."""

    app_state: dict[str, Any]

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if is_beyond(transport.get_extra_info("socket").fileno(), RESERVED):
            self.app_state = {**self.app_state, IS_BEYOND: True}


class ConnectionLimit:
    """Answers on a connection beyond the limit, that the worker is full or what costs little, and closes it."""

    def __init__(self, app: ASGIApp, tally: Tally) -> None:
        self._app = app
        self._tally = tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or IS_BEYOND not in scope.get("state", {}):
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        if scope["method"] == "POST" and scope["path"] not in ANSWERED:
            error = Overloaded("This worker has no file descriptor left for one more connection. Try again later.")
            self._tally.count_error(error)
            await refusal(scope["path"], error)(scope, receive, send_last)
        else:
            await self._app(scope, receive, send_last)


def quiet_when_full(loop: asyncio.AbstractEventLoop) -> None:
    """Log that descriptors ran out once a minute: asyncio would log each of thousands of attempts to accept."""
    logged_at = -LOG_INTERVAL_S

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged_at
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - logged_at >= LOG_INTERVAL_S:
            logged_at = time.monotonic()
            logger.error("no connection can be accepted: %s. Those that wait are accepted as others end", error)

    loop.set_exception_handler(handle)
