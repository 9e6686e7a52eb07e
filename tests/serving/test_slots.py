"""Who gets the next slot."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from ipex_vllm.serving import slots as module
from ipex_vllm.serving.slots import LONGEST_WAIT_S, SMALL, WAIT_PER_TOKEN_S, Slots

LARGE = 1000


class Requests:
    """Requests that hold their slots until they are told to end; `begun` are those that got one, in order."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.begun: list[str] = []

    async def send(self, name: str, size: int) -> None:
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, size))
        await asyncio.sleep(0)

    async def _run(self, name: str, size: int) -> None:
        async with self._slots.take(size):
            self.begun.append(name)
            await self._ends[name].wait()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)

    async def leave(self, name: str) -> None:
        self.tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self.tasks[name]
        await asyncio.sleep(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


async def test_small_requests_go_before_large_ones_and_equal_ones_in_their_order(clock: list[float]) -> None:
    requests = Requests(Slots(1, 10))
    for name, size in (("running", 1000), ("large", 1000), ("medium", 500), ("first", 10), ("second", 10)):
        await requests.send(name, size)
    for name in ("running", "first", "second", "medium"):
        await requests.end(name)
    assert requests.begun == ["running", "first", "second", "medium", "large"]
    await requests.end("large")


async def test_nobody_is_overtaken_for_ever(clock: list[float]) -> None:
    requests = Requests(Slots(1, 10))
    await requests.send("running", 10)
    await requests.send("huge", 10_000_000)
    clock[0] += LONGEST_WAIT_S - 20 * WAIT_PER_TOKEN_S
    await requests.send("small in time", 10)
    clock[0] += 30 * WAIT_PER_TOKEN_S
    await requests.send("small too late", 10)
    for name in ("running", "small in time", "huge", "small too late"):
        await requests.end(name)
    assert requests.begun == ["running", "small in time", "huge", "small too late"]


async def test_large_requests_leave_one_slot_in_four_to_small_ones() -> None:
    slots = Slots(8, 20)
    requests = Requests(slots)
    for number in range(8):
        await requests.send(f"large {number}", LARGE)
    assert (slots.num_in_use, slots.num_waiting) == (6, 2)
    for number in range(3):
        await requests.send(f"small {number}", SMALL)
    assert (slots.num_in_use, slots.num_waiting) == (8, 3)
    await requests.end("large 0")  # which one of each kind may follow: the small one comes first
    assert requests.begun[-1] == "small 2"
    await requests.end("small 0")  # leaves five large ones, so a sixth
    assert requests.begun[-1] == "large 6"
    for task in requests.tasks.values():
        task.cancel()
    await asyncio.gather(*requests.tasks.values(), return_exceptions=True)
    assert (slots.num_in_use, slots.num_waiting) == (0, 0)


async def test_small_requests_may_have_all_slots_and_few_slots_are_for_all() -> None:
    for limit, size in ((8, SMALL), (3, LARGE)):
        slots = Slots(limit, 20)
        requests = Requests(slots)
        for number in range(limit):
            await requests.send(str(number), size)
        assert slots.num_in_use == limit
        for number in range(limit):
            await requests.end(str(number))


async def test_who_leaves_while_waiting_or_at_its_turn_takes_no_slot_along() -> None:
    slots = Slots(1, 10)
    requests = Requests(slots)
    for name in ("running", "leaves", "stays"):
        await requests.send(name, 10)
    await requests.leave("leaves")
    assert (slots.num_in_use, slots.num_waiting) == (1, 1)
    await requests.end("running")
    assert requests.begun == ["running", "stays"]
    await requests.send("at its turn", 10)
    requests._ends["stays"].set()
    requests.tasks["stays"].add_done_callback(lambda _: requests.tasks["at its turn"].cancel())
    await asyncio.gather(*requests.tasks.values(), return_exceptions=True)
    assert (slots.num_in_use, slots.num_waiting) == (0, 0)
    await requests.send("last", 10)
    assert requests.begun[-1] == "last"
    await requests.end("last")
