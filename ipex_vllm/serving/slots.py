"""How many requests run at once, how many wait, and who is next.

Small requests go before large ones: each waits as if it had come later than it did, by `WAIT_PER_TOKEN_S` a token of
its size, but by no more than `LONGEST_WAIT_S`, so that none waits for ever. Slots are kept for small ones, or a few
long texts would hold up all short ones for as long as they take: for `HEADROOM` times as many as there were at once in
the last `RECENT_S` seconds, at least one in `SHARE`; the same share is left to large ones, whatever comes.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ipex_vllm.engines.generation import RequestError

SMALL = 128  # tokens
SHARE = 4
RECENT_S = 10.0
HEADROOM = 2  # small ones come in bursts, and each large one in their place is there for long
WAIT_PER_TOKEN_S = 0.01
LONGEST_WAIT_S = 30.0

SHUT_DOWN = "This worker shut down before the request was finished. Send it again; another worker will take it."


class Overloaded(RequestError):
    pass


class Slots:
    """At most `limit` requests at once; `queue_limit` more may wait; any beyond are refused."""

    def __init__(self, limit: int, queue_limit: int) -> None:
        self.limit = limit
        self._queue_limit = queue_limit
        self.num_in_use = 0
        self.num_waiting = 0
        self.is_closed = False
        self._least_share = limit // SHARE
        self._num_large = self._num_small = 0  # of those that have a slot; of those that have one or wait
        self._most_small, self._most_small_at = 0, 0.0  # at once, recently
        # Heaps of those that wait, the small and the large: when it is whose turn, a number for each, its place.
        self._waiting: dict[bool, list[tuple[float, int, Place]]] = {True: [], False: []}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()  # those that hold a slot or wait for one

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Hold a slot for a request of about `size` tokens, its prompt's and those that it may get.

        Raises Overloaded, at the end of the drain's time in what runs as well.
        """
        with self.place() as place:
            await place.acquire(size)
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

    def queue(self, place: Place, size: int) -> None:
        """Let a place have a slot when it is its turn."""
        self._num_small += place.is_small
        turn = time.monotonic() + min(size * WAIT_PER_TOKEN_S, LONGEST_WAIT_S)
        heapq.heappush(self._waiting[place.is_small], (turn, next(self._numbers), place))
        self._hand_out()

    def leave(self, place: Place) -> None:
        if place.is_small and place.is_queued:
            self._num_small -= 1
            # What was kept for it is the large ones' then, and nothing else might tell them.
            asyncio.get_running_loop().call_later(RECENT_S, self._hand_out)
        if place.has_slot:
            self.num_in_use -= 1
            self._num_large -= not place.is_small
            self._hand_out()
        else:
            self.num_waiting -= 1

    def _hand_out(self) -> None:
        while self.num_in_use < self.limit:
            for heap in self._waiting.values():
                while heap and heap[0][2].has_left:
                    heapq.heappop(heap)
            has_room = {True: True, False: self._num_large < self._large_limit()}
            candidates = [heap for is_small, heap in self._waiting.items() if heap and has_room[is_small]]
            if not candidates:
                return
            _, _, place = heapq.heappop(min(candidates, key=lambda heap: heap[0][:2]))
            self.num_waiting -= 1
            self.num_in_use += 1
            self._num_large += not place.is_small
            place.has_slot = True
            place.turn.set()

    def _large_limit(self) -> int:
        now = time.monotonic()
        if self._num_small >= self._most_small or now - self._most_small_at >= RECENT_S:
            self._most_small, self._most_small_at = self._num_small, now
        kept = max(HEADROOM * self._most_small, self._least_share)
        return max(self.limit - kept, self._least_share, 1)

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
        self.is_queued = False
        self.is_small = True
        self.has_slot = self.has_left = False
        self.turn = asyncio.Event()
        slots.num_waiting += 1

    async def acquire(self, size: int) -> None:
        """Wait for a slot, one for all parts of the request, of which the first tells its size (see `Slots.take`)."""
        if not self.is_queued:
            self.is_queued, self.is_small = True, size <= SMALL
            self._slots.queue(self, size)
        await self.turn.wait()
        if self.has_left:  # what asked has outlived the request
            raise asyncio.CancelledError

    def leave(self) -> None:
        self.has_left = True
        self._slots.leave(self)
        self.turn.set()
