"""OpenAI's API, and Anthropic's: the engine's own application renders it, in turns that the core gives.

The way of a request: `OpenAIServer` holds a place for it, the application checks it and asks the engine, which takes
the slot (engines/turns.py). So an overload is told before a stream begins, what is wrong is told without waiting, and
a stream that queues has begun and shows signs of life. What the application makes goes into an outbox, and the place
is given back when all of it is made: a client that reads slowly, or never, holds none.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ipex_vllm.engines.generation import InternalError, InvalidParameter, RequestError
from ipex_vllm.engines.turns import current_turn
from ipex_vllm.serving.core import CUT_OFF_TIMEOUT_S, DISCONNECT, Core, InvalidModel, Record, bug_error
from ipex_vllm.serving.events import Answer, Outbox
from ipex_vllm.serving.refusals import last_event, refusal
from ipex_vllm.serving.slots import Overloaded

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20  # images come as text
TOO_LARGE = InvalidParameter(f"The request body is larger than {MAX_BODY_BYTES >> 20} MiB.")
# They ask nothing of the engine, or change which adapters it has.
WITHOUT_TURN = (
    *("/tokenize", "/detokenize", "/v1/messages/count_tokens"),
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
)


class OpenAIServer:
    """Gives each request to the engine's application a turn, and tells its errors as they are told there.

    Args:
        core: the loaded model, and the requests to it.
        app: the engine's application.
    """

    def __init__(self, core: Core, app: ASGIApp) -> None:
        self._core = core
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = request_id(Headers(scope=scope))
        scope = with_header(scope, b"x-request-id", id.encode())
        outbox = Outbox(send)
        try:
            await self._answer(id, Exchange(self._app, scope, receive, outbox, {"x-request-id": id}))
            await outbox.emptied()
        finally:
            outbox.close()

    async def _answer(self, id: str, exchange: Exchange) -> None:
        scope, answer = exchange.scope, exchange.answer
        try:
            check_length(scope)
            if scope["method"] == "POST" and scope["path"] not in WITHOUT_TURN:
                await self._in_turn(id, exchange)
            else:
                await exchange.run()
        except RequestError as error:
            if not answer.has_begun:
                await refusal(scope["path"], error)(scope, exchange.receive, answer.send_always)
            elif answer.is_event_stream and not answer.has_ended:
                await answer.end_with(last_event(scope["path"], error))
        except Exception:
            logger.exception("%s failed on a bug", scope["path"])
            if not answer.has_begun:
                await refusal(scope["path"], bug_error())(scope, exchange.receive, answer.send_always)

    async def _in_turn(self, id: str, exchange: Exchange) -> None:
        """Raises RequestError for what failed, told or not."""
        with self._core.recorded(id) as record, self._core.unread(exchange.cut_off):
            with self._core.turn(record) as turn:
                token = current_turn.set(turn)
                try:
                    await exchange.run()
                finally:
                    current_turn.reset(token)
            await exchange.be_read()
            settle(record, exchange, exchange.failure or turn.failure)


def settle(record: Record, exchange: Exchange, failure: RequestError | None) -> None:
    """Write down how a request ended; raise what failed."""
    if exchange.is_client_gone:
        record.outcome = DISCONNECT
    elif failure is not None:
        raise failure
    elif exchange.answer.status >= 400:
        raise ERRORS.get(exchange.answer.status, InternalError if exchange.answer.status >= 500 else InvalidParameter)(
            f"answered with status {exchange.answer.status}"
        )


ERRORS: dict[int, type[RequestError]] = {404: InvalidModel, 429: Overloaded}


class Exchange:
    """One request to an application, and what has come of it."""

    def __init__(
        self, app: ASGIApp, scope: Scope, receive: Receive, outbox: Outbox, headers: Mapping[str, str]
    ) -> None:
        self._app = app
        self._outbox = outbox
        self._has_left = asyncio.Event()
        self.scope = scope
        self.receive = receive
        self.answer = Answer(outbox.send, headers)
        self.is_client_gone = False
        self.failure: RequestError | None = None
        self._num_bytes = 0

    async def run(self) -> None:
        """Let the application answer. Cancelled, it tells the application that the client is gone, for it to let go."""
        task: asyncio.Task[Any] = asyncio.ensure_future(self._app(self.scope, self._receive_or_leave, self.answer.send))
        try:
            async with self.answer.alive():
                await asyncio.shield(task)
        except asyncio.CancelledError:
            self.answer.is_muted = True
            self._has_left.set()
            await asyncio.wait((task,), timeout=CUT_OFF_TIMEOUT_S)
            task.cancel()
            if task.done() and not task.cancelled():
                task.exception()  # of which nobody is to be told any more
            raise

    async def be_read(self) -> None:
        """Wait until the client has taken the whole answer, or is gone."""
        watching = asyncio.create_task(self._watch())
        try:
            await self._outbox.emptied()
        finally:
            watching.cancel()

    def cut_off(self, error: RequestError) -> None:
        """End what is not read yet."""
        self.failure = error
        if self.answer.is_event_stream:
            self._outbox.end_with(last_event(self.scope["path"], error))

    async def _watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        # Noticed before, it stays so: what the application then says to nobody counts as sent.
        self.is_client_gone = self.is_client_gone or not self._outbox.has_sent_all

    async def _receive_or_leave(self) -> Message:
        leaving = asyncio.ensure_future(self._has_left.wait())
        receiving = asyncio.ensure_future(self.receive())
        try:
            await asyncio.wait((leaving, receiving), return_when=asyncio.FIRST_COMPLETED)
            message = receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            leaving.cancel()
            receiving.cancel()
        if message["type"] == "http.disconnect" and not self._outbox.has_sent_all:
            self.is_client_gone = True
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > MAX_BODY_BYTES:
            raise TOO_LARGE
        return message


def check_length(scope: Scope) -> None:
    """Raise InvalidParameter for a body that is too large."""
    if int(Headers(scope=scope).get("content-length", 0)) > MAX_BODY_BYTES:
        raise TOO_LARGE


def request_id(headers: Headers) -> str:
    """The client's own id of a request, or a new one."""
    return headers.get("x-request-id", "")[:128] or uuid.uuid4().hex


def with_header(scope: Scope, name: bytes, value: bytes) -> Scope:
    return {**scope, "headers": [*(pair for pair in scope["headers"] if pair[0] != name), (name, value)]}
