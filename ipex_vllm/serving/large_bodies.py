"""Large request bodies are bounded, and read no faster than leaves time for everybody else's requests.

JSON is read in one go, in which the process does nothing else, and each MiB takes milliseconds to receive. What lies
beyond the first `LARGE` bytes of a body is therefore taken from all clients together at no more than a given rate, and
the rest stays with them.
"""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 << 20
LARGE = 256 << 10  # bytes; some 60 000 tokens of English


class TooLarge(Exception):
    """The message is for the client."""


async def whole_body(request: Request) -> bytes:
    """A request's body. Raises TooLarge, and ClientDisconnect where the client goes away."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise TooLarge(f"The request body is larger than {MAX_BODY_BYTES >> 20} MiB.")
    return b"".join(parts)


class LargeBodies:
    """Slows down bodies beyond `LARGE` bytes.

    Args:
        app: the application that reads them.
        bytes_per_s: what it can take of them and still answer others at once.
    """

    def __init__(self, app: ASGIApp, bytes_per_s: float) -> None:
        self._app = app
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0  # when the bytes that were taken are paid for

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes = 0

        async def receive_slowly() -> Message:
            nonlocal num_bytes
            message = await receive()
            size = len(message.get("body", b""))
            num_bytes += size
            if num_bytes > LARGE and size:
                await self._wait_for(size)
            return message

        await self._app(scope, receive_slowly, send)

    async def _wait_for(self, size: int) -> None:
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + size / self._bytes_per_s
        await asyncio.sleep(self._free_at - now)
