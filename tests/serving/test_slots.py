"""Who gets the next slot."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from ipex_vllm.serving import slots as module
from ipex_vllm.serving.slots import LONGEST_WAIT_S, RECENT_S, SMALL, WAIT_PER_TOKEN_S, Slots

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

    async def leave_all(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert (self._slots.num_in_use, self._slots.num_waiting) == (0, 0)


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
    requests = Requests(Slots(8, 20))
    for number in range(8):
        await requests.send(f"large {number}", LARGE)
    assert requests.begun == [f"large {number}" for number in range(6)]
    await requests.leave_all()


async def test_slots_are_kept_for_twice_as_many_small_requests_as_there_were_at_once(clock: list[float]) -> None:
    slots = Slots(8, 20)
    requests = Requests(slots)
    for number in range(8):
        await requests.send(f"large {number}", LARGE)
    for number in range(3):
        await requests.send(f"small {number}", SMALL)
    assert (slots.num_in_use, slots.num_waiting) == (8, 3)
    await requests.end("large 0")
    assert requests.begun[-1] == "small 2"
    for number in range(3):
        await requests.end(f"small {number}")
    assert (slots.num_in_use, slots.num_waiting) == (5, 2)
    clock[0] += RECENT_S - 1
    for number in range(1, 4):
        await requests.end(f"large {number}")
    assert (slots.num_in_use, slots.num_waiting) == (2, 2)  # six are kept
    await requests.end("large 4")
    assert requests.begun[-1] == "large 6"
    clock[0] += 1
    await requests.end("large 5")  # nobody small came: all but two are the large ones'
    assert requests.begun[-1] == "large 7"
    await requests.leave_all()


async def test_a_slot_that_was_kept_is_handed_out_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECENT_S", 0.01)
    requests = Requests(Slots(2, 20))
    await requests.send("small", SMALL)
    await requests.send("large 0", LARGE)
    await requests.send("large 1", LARGE)
    await requests.end("small")
    assert requests.begun == ["small", "large 0"]
    async with asyncio.timeout(10):
        while "large 1" not in requests.begun:
            await asyncio.sleep(0.01)
    await requests.leave_all()


@pytest.mark.parametrize(("limit", "num_large"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 2)])
async def test_small_requests_leave_one_slot_in_four_to_large_ones(limit: int, num_large: int) -> None:
    requests = Requests(Slots(limit, 100))
    for number in range(limit):
        await requests.send(f"first {number}", SMALL)
    for number in range(limit):
        await requests.send(f"small {number}", SMALL)
        await requests.send(f"large {number}", LARGE)
    for number in range(limit):
        await requests.end(f"first {number}")
    assert requests.begun[limit:] == [f"small {number}" for number in range(limit)]
    for number in range(limit):
        await requests.end(f"small {number}")
    assert requests.begun[2 * limit :] == [f"large {number}" for number in range(num_large)]
    await requests.leave_all()


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
