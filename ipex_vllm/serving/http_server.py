"""The HTTP server beneath the application: what clients do to a connection hurts nobody else, and none is left waiting.

A client may vanish, stop reading, stop sending, or send what is no HTTP. That is its own doing: a line at debug level.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from ipex_vllm.serving.connections import MarkingProtocol
from ipex_vllm.serving.core import Tally

logger = logging.getLogger(__name__)

LAST_FRAMES_TIMEOUT_S = 2  # for a slow client to take what is already written
LAST_REQUESTS_TIMEOUT_S = 1.0  # for a client that is connected to send what it connected for
LOOKS_PER_TIMEOUT = 4
MAX_LOOK_INTERVAL_S = 15.0
RESET = struct.pack("ii", 1, 0)  # a struct linger, see socket(7): on, for no time
UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:", re.IGNORECASE)


class HttpServer(uvicorn.Server):
    """A uvicorn server that leaves signals to the worker, and answers every client whose connection it accepted.

    Args:
        app: the application.
        tally: where clients that are given up are counted.
        client_timeout_s: how long a client may take or send nothing; 0 for ever.
    """

    def __init__(self, app: ASGIApp, tally: Tally, client_timeout_s: float) -> None:
        config = uvicorn.Config(
            app,
            http=functools.partial(ClientProtocol, tally=tally, timeout_s=client_timeout_s),  # type: ignore[arg-type]
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=LAST_FRAMES_TIMEOUT_S,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(is_ours)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def keep_no_connection(self) -> None:
        """From now on an answer is the last one on its connection."""
        self.server_state.default_headers.append((b"connection", b"close"))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept who knocks, close the door, and leave those who came in a moment to ask and be answered."""
        doors = [socket.socket(fileno=os.dup(sock.fileno())) for sock in sockets or ()]
        for server in self.servers:
            server.close()
        last = [connection for door in doors for connection in accept_all(door)]
        protocol_class: Any = self.config.http_protocol_class
        make_protocol = functools.partial(
            protocol_class, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        for connection in last:
            await asyncio.get_running_loop().connect_accepted_socket(make_protocol, connection)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_REQUESTS_TIMEOUT_S):
                while self.server_state.connections:
                    await asyncio.sleep(0.02)
        await super().shutdown(sockets)


class ClientProtocol(MarkingProtocol):
    """uvicorn's HTTP protocol, which gives up a client that stalls, and asks for no upgrade of the connection."""

    def __init__(self, *arguments: Any, tally: Tally, timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tally = tally
        self._timeout_s = timeout_s
        self._look_timer: asyncio.TimerHandle | None = None
        self._moved_at = 0.0
        self._num_unwritten = 0
        self._is_in_head = hasattr(AutoProtocol, "on_message_begin")  # of httptools' parser, which stops at an upgrade

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._moved_at = self.loop.time()
        if self._timeout_s:
            self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look_timer is not None:
            self._look_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._moved_at = self.loop.time()
        if self._is_in_head:  # no answer depends on it, and its client goes on without
            head, end, body = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(b"\r\nx-upgrade:", head) + end + body
        super().data_received(data)

    def _unsupported_upgrade_warning(self) -> None:
        """One that came in pieces: httptools' parser has stopped, and the rest of the request would be waited for."""
        if hasattr(AutoProtocol, "on_message_begin"):
            self.send_400_response("This server does not upgrade connections.")

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head = True
        super().on_message_complete()

    def _look_later(self) -> None:
        interval_s = min(self._timeout_s / LOOKS_PER_TIMEOUT, MAX_LOOK_INTERVAL_S)
        self._look_timer = self.loop.call_later(interval_s, self._look)

    def _look(self) -> None:
        """Give the client up where it has neither taken nor sent anything for too long, and it is its turn."""
        num_unwritten = self.transport.get_write_buffer_size()
        has_taken = num_unwritten < self._num_unwritten
        self._num_unwritten = num_unwritten
        if has_taken or not self._is_clients_turn(num_unwritten):
            self._moved_at = self.loop.time()
        if self.loop.time() - self._moved_at < self._timeout_s:
            self._look_later()
            return
        self._tally.stalled_clients += 1
        logger.debug("a client was given up: it took or sent nothing for %g s", self._timeout_s)
        # Reset: else the kernel would keep for it what it does not take.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def _is_clients_turn(self, num_unwritten: int) -> bool:
        if num_unwritten:  # while it takes something more is written, unless there is too much already
            return bool(self.flow.write_paused or self.cycle.response_complete)
        is_asked = self.cycle is not None and not self.cycle.response_complete
        return not is_asked or (self.cycle.more_body and not self.flow.read_paused)


AutoProtocol = MarkingProtocol.__base__


def accept_all(door: socket.socket) -> Iterator[socket.socket]:
    """Everybody who waits to be accepted; then it is closed, in the same moment."""
    with door, contextlib.suppress(OSError):  # there is nobody more, or no descriptor
        door.setblocking(False)
        while True:
            connection, _ = door.accept()
            connection.setblocking(False)
            yield connection


def is_ours(record: logging.LogRecord) -> bool:
    """Whether uvicorn reports more than a client's doing; that becomes a line at debug level."""
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    is_clients = record.levelno == logging.WARNING or isinstance(error, (asyncio.CancelledError, ClientDisconnect))
    if is_clients:
        logger.debug("%s", record.getMessage().strip())
    return not is_clients
