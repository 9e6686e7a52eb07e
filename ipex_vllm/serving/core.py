"""From a request to its deltas, whatever the protocol: slots, counts, the log line, the errors, the drain.

A protocol parses, asks the core, and renders. It reaches the engine in no other way:

    with core.recorded(request_id) as record:  # logged and counted, however it ends
        generation = ...                       # parsed; a RequestError is recorded as well
        async with aclosing(core.stream(generation, record)) as deltas:
            ...                                # rendered

An engine's own application renders by itself, and asks the engine in the turn that `core.turn(record)` gives it.

Errors, beside those of engines/generation.py, with the number that logs and metrics know them by:

    RequestError
    ├── InvalidModel   40301  another model than this worker's
    ├── Unauthorized   40101  no or wrong API token
    └── Overloaded     42903  all slots and the queue are full, or the worker is draining
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field

from ipex_vllm.engines.bounds import shown
from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import (
    ContextOverflow,
    Delta,
    Generation,
    InternalError,
    InvalidParameter,
    RequestError,
)
from ipex_vllm.engines.stop_tokens import stop_at_special_tokens
from ipex_vllm.serving.slots import SHUT_DOWN, Overloaded, Place, Slots

logger = logging.getLogger(__name__)

DISCONNECT = "disconnect"  # the outcome of a request whose client is gone
CUT_OFF_TIMEOUT_S = 2.0  # for the engine to let a request go


class InvalidModel(RequestError):
    pass


class Unauthorized(RequestError):
    pass


# FastChat's numbers, under which logs and metrics count errors whatever the protocol.
ERROR_CODES: dict[type[RequestError], int] = {
    Unauthorized: 40101,
    InvalidModel: 40301,
    InvalidParameter: 40302,
    ContextOverflow: 40303,
    Overloaded: 42903,
    InternalError: 50001,
}


def error_code(error: RequestError) -> int:
    return ERROR_CODES[type(error)]


@dataclass
class Tally:
    """What this worker did since it started, for `metrics.py`."""

    finished: Counter[str] = field(default_factory=Counter)  # by finish reason
    errors: Counter[int] = field(default_factory=Counter)  # by error code
    disconnects: int = 0
    stalled_clients: int = 0
    frames: int = 0
    frame_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count_error(self, error: RequestError) -> None:
        self.errors[error_code(error)] += 1


@dataclass
class Record:
    """One request's log line."""

    id: str
    outcome: str = "unfinished"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    drafted: int = 0  # tokens of speculative decoding
    accepted: int = 0
    started_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None

    def add(self, delta: Delta) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.prompt_tokens = delta.prompt_tokens
        self.completion_tokens += delta.num_tokens
        self.drafted += delta.drafted
        self.accepted += delta.accepted
        if delta.index == 0 and delta.finish_reason is not None:
            self.outcome = delta.finish_reason

    def __str__(self) -> str:
        ttft = "-" if self.first_token_at is None else f"{self.first_token_at - self.started_at:.3f}s"
        return (
            f"request {self.id} {self.outcome} prompt_tokens={self.prompt_tokens} "
            f"completion_tokens={self.completion_tokens} ttft={ttft} duration={time.monotonic() - self.started_at:.3f}s"
            + (f" drafts_accepted={self.accepted}/{self.drafted}" if self.drafted else "")
        )


@dataclass
class CoreTurn:
    """The turn of a request to an engine's own application, see engines/turns.py."""

    record: Record
    place: Place
    log_prompts: bool
    failure: RequestError | None = None

    async def begin(self, prompt: Callable[[], str], size: int) -> None:
        if self.log_prompts:
            logger.info("request %s prompt %r", self.record.id, prompt())
        await self.place.acquire(size)

    def count(
        self, prompt_tokens: int, completion_tokens: int, finish_reason: str | None, first_token_at: float | None
    ) -> None:
        record = self.record
        if record.first_token_at is None:
            record.first_token_at = first_token_at
        record.prompt_tokens += prompt_tokens
        record.completion_tokens += completion_tokens
        record.outcome = finish_reason or record.outcome

    def count_drafts(self, drafted: int, accepted: int) -> None:
        self.record.drafted += drafted
        self.record.accepted += accepted

    def fail(self, error: RequestError) -> None:
        self.failure = error


class Core:
    """One loaded model and the requests to it.

    Args:
        engine: the loaded model.
        names: model names that clients may use.
        slots: how many requests run and wait.
        log_prompts: write prompts into the log.
    """

    def __init__(self, engine: Engine, names: tuple[str, ...], slots: Slots, log_prompts: bool = False) -> None:
        self.engine = engine
        self._names = names
        self.slots = slots
        self.tally = Tally()
        self.is_registered: Callable[[], bool] = lambda: True  # the worker knows, where there is a controller
        self._log_prompts = log_prompts
        self._unread: set[Callable[[RequestError], None]] = set()  # what ends those that are not read to the end

    @property
    def names(self) -> tuple[str, ...]:
        """The model's, and its adapters'."""
        return (*self._names, *self.engine.adapters)

    def is_ready(self) -> bool:
        """Registered and taking requests; the model is loaded before there is a core."""
        return self.is_registered() and not self.slots.is_closed

    def check_model(self, model: str | None) -> None:
        """Raise InvalidModel for a name that is not this worker's; no name is fine."""
        if model is not None and model not in self.names:
            raise InvalidModel(f"This worker serves {', '.join(self.names)}, not {shown(model)}.")

    @contextmanager
    def recorded(self, request_id: str) -> Iterator[Record]:
        """Log and count a request, however it ends. Of errors, only a RequestError leaves: a bug becomes one."""
        record = Record(request_id)
        try:
            yield record
            if record.outcome == DISCONNECT:
                self.tally.disconnects += 1
            else:
                self.tally.finished[record.outcome] += 1
        except RequestError as error:
            self._fail(record, error)
            raise
        except Exception as bug:
            logger.exception("request %s failed on a bug of this worker", request_id)
            told = bug_error()
            self._fail(record, told)
            raise told from bug
        except BaseException:  # cancelled or closed: the client is gone
            record.outcome = DISCONNECT
            self.tally.disconnects += 1
            raise
        finally:
            self.tally.prompt_tokens += record.prompt_tokens
            self.tally.completion_tokens += record.completion_tokens
            logger.info("%s", record)

    async def stream(self, generation: Generation, record: Record) -> AsyncGenerator[Delta, None]:
        """The engine's deltas; closing the generator aborts the request. Raises RequestError.

        A slot is held while the engine computes: what it has made waits here for a client that reads slowly.
        """
        if self._log_prompts:
            logger.info("request %s prompt %r", record.id, generation.prompt)
        if generation.images and not self.engine.reads_images:
            raise InvalidParameter("This worker's model reads text only. Leave images out.")
        num_unfinished = generation.n
        generation = stop_at_special_tokens(generation, self.engine.tokenizer)
        made: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        with self.unread(made.put_nowait):
            generating = asyncio.create_task(self._generate(generation, record, made))
            try:
                while (item := await made.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    num_unfinished -= item.finish_reason is not None
                    yield item
            finally:
                generating.cancel()
                await asyncio.wait((generating,), timeout=CUT_OFF_TIMEOUT_S)
        if num_unfinished:
            raise InternalError("The engine ended in the middle of the text. Send the request again later.")

    async def _generate(
        self, generation: Generation, record: Record, made: asyncio.Queue[Delta | Exception | None]
    ) -> None:
        """Put the engine's deltas into `made`, in a slot; at the end what went wrong, or None."""
        try:
            async with self.slots.take(generation.size), aclosing(self.engine.stream(generation, record.id)) as deltas:
                async for delta in deltas:
                    record.add(delta)
                    made.put_nowait(delta)
        except Exception as error:
            made.put_nowait(error)
        else:
            made.put_nowait(None)

    @contextmanager
    def turn(self, record: Record) -> Iterator[CoreTurn]:
        """A turn for an engine's own application. Raises Overloaded as `Slots.take` does."""
        with self.slots.place() as place:
            yield CoreTurn(record, place, self._log_prompts)

    @contextmanager
    def unread(self, end: Callable[[RequestError], None]) -> Iterator[None]:
        """While a client is not done reading: the drain waits for it, and calls `end` when its time is over."""
        self._unread.add(end)
        try:
            yield
        finally:
            self._unread.discard(end)

    async def drain(self, timeout_s: float, hurry: asyncio.Event | None = None) -> None:
        """Wait until no request runs, waits or is unread, at most `timeout_s` seconds or until `hurry`; then end them.

        The slots must be closed: what comes now is refused.
        """
        unread = set(self._unread)

        def num_left() -> int:
            return max(self.slots.queue_length, len(unread & self._unread))

        async def until_idle(timeout_s: float, hurry: asyncio.Event) -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    while num_left() and not hurry.is_set():
                        await asyncio.sleep(0.05)

        logger.info("draining: %d requests", num_left())
        started_at = time.monotonic()
        await until_idle(timeout_s, hurry or asyncio.Event())
        if num_left():
            logger.warning("%d requests were cut off after %.3g s", num_left(), time.monotonic() - started_at)
            for end in unread & self._unread:  # told at once: an engine that hangs does not let go of them
                end(Overloaded(SHUT_DOWN))
            self.slots.cut_off()
            await until_idle(CUT_OFF_TIMEOUT_S, asyncio.Event())

    def _fail(self, record: Record, error: RequestError) -> None:
        record.outcome = f"error {error_code(error)}"
        self.tally.count_error(error)


def bug_error() -> InternalError:
    return InternalError("The worker failed on this request; its log says how.")
