"""How many requests run at once, and how many wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ipex_vllm.engines.generation import RequestError

SHUT_DOWN = "This worker shut down before the request was finished. Send it again; another worker will take it."


class Overloaded(RequestError):
    pass


class Slots:
    """At most `limit` requests at once; `queue_limit` more may wait; any beyond are refused."""

    def __init__(self, limit: int, queue_limit: int) -> None:
        self.semaphore = asyncio.Semaphore(limit)
        self.limit = limit
        self._queue_limit = queue_limit
        self.num_in_use = 0
        self.num_waiting = 0
        self.is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()  # those that hold a slot or wait for one

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Hold a slot. Raises Overloaded, at the end of the drain's time in what runs as well."""
        with self.place() as place:
            await place.acquire()
            yield

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Hold a place: in the queue and, once acquired, a slot. Raises Overloaded as `take` does."""
        if self.is_closed:
            raise Overloaded("This worker is shutting down. Send the request again; another worker will take it.")
        if self.queue_length >= self.limit + self._queue_limit:
            raise Overloaded(
                f"{self.num_in_use} requests are running and {self.num_waiting} are waiting, the most that this worker "
                "takes. Try again later."
            )
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        place = Place(self)
        try:
            yield place
        except asyncio.CancelledError:
            if task in self._tasks:  # the client is gone
                raise
            task.uncancel()
            raise Overloaded(SHUT_DOWN) from None
        finally:
            self._tasks.discard(task)
            place.leave()

    def cut_off(self) -> None:
        """End every request, those that wait too, with an error for its client."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()

    @property
    def queue_length(self) -> int:
        """What FastChat's controller balances by."""
        return self.num_in_use + self.num_waiting


class Place:
    """A request's place among the others: it waits until it has acquired a slot, and leaves once."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._lock = asyncio.Lock()
        self._has_slot = self._has_left = False
        slots.num_waiting += 1

    async def acquire(self) -> None:
        """Wait for a slot, one for all parts of the request: who asks again has it already."""
        async with self._lock:
            if self._has_slot:
                return
            await self._slots.semaphore.acquire()
            if self._has_left:  # what asked has outlived the request
                self._slots.semaphore.release()
                raise asyncio.CancelledError
            self._has_slot = True
            self._slots.num_waiting -= 1
            self._slots.num_in_use += 1

    def leave(self) -> None:
        self._has_left = True
        if self._has_slot:
            self._slots.num_in_use -= 1
            self._slots.semaphore.release()
        else:
            self._slots.num_waiting -= 1
