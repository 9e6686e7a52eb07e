from __future__ import annotations

import asyncio

import numpy as np
import pytest

from benchmarks.load.arrivals import ClosedLoop, OpenLoop
from benchmarks.load.client import Clock, HttpClient
from benchmarks.load.generate import Interrupted, LoadOptions, Work, make_work, run_load
from benchmarks.load.metrics import Timeline, ttft
from benchmarks.load.workload import PromptWriter, Session, Turn
from benchmarks.options import BenchmarkError
from tests.benchmarks.fake_server import Behaviour


def sessions(count: int, turns: int = 1) -> list[Session]:
    return [Session((Turn(f" s{i}", 1, 2),) * turns) for i in range(count)]


async def run(work: Work, url: str) -> list[Timeline]:
    async with HttpClient(url, "fastchat", "fake", 30) as client:
        return await run_load(work, client, Clock())


async def test_closed_loop_keeps_its_concurrency(server: str, behaviour: Behaviour) -> None:
    behaviour.token_s = 0.001
    timelines = await run(Work(sessions(12), ClosedLoop(3), 0, 0, True), server)
    assert behaviour.most_running == 3
    assert [timeline.status for timeline in timelines] == ["ok"] * 12


async def test_open_loop_keeps_its_schedule_while_the_server_stalls(server: str, behaviour: Behaviour) -> None:
    """No coordinated omission: a stalled server gets every request on time, and the stall is in every latency."""
    behaviour.gate = asyncio.Event()
    offsets = np.array([0.0, 0.05, 0.1, 0.15])
    running = asyncio.create_task(run(Work(sessions(4), OpenLoop(offsets), 0, 0, True), server))
    while len(behaviour.bodies) < 4:  # all are sent though none is answered: a waiting generator would hang here
        await asyncio.sleep(0.01)
    behaviour.gate.set()
    timelines = sorted(await running, key=lambda timeline: timeline.session)
    begun = timelines[0].scheduled
    assert [timeline.scheduled - begun for timeline in timelines] == pytest.approx(offsets.tolist())
    answered = min(timeline.chunks[0][0] for timeline in timelines)
    for timeline in timelines:
        latency = ttft(timeline)
        assert latency is not None
        assert latency >= answered - timeline.scheduled


async def test_turns_follow_each_other_on_top_of_the_text_so_far(server: str, behaviour: Behaviour) -> None:
    timelines = await run(Work(sessions(1, turns=2), ClosedLoop(1), 0, 0, True), server)
    assert [timeline.prompt for timeline in timelines] == [" s0", " s0 w0 w1 s0"]
    assert timelines[1].scheduled >= timelines[0].ended


async def test_a_failed_turn_ends_its_session_but_not_the_run(server: str, behaviour: Behaviour) -> None:
    behaviour.error = "no"
    timelines = await run(Work(sessions(3, turns=2), ClosedLoop(1), 0, 0, True), server)
    assert [(timeline.session, timeline.status) for timeline in timelines] == [(i, "failed") for i in range(3)]


async def test_phases(server: str) -> None:
    timelines = await run(Work(sessions(5), ClosedLoop(1), 1, 2, True), server)
    assert [timeline.phase for timeline in timelines] == ["warmup", "measured", "measured", "cooldown", "cooldown"]


async def test_an_interrupt_hands_over_what_there_is(server: str, behaviour: Behaviour) -> None:
    def stall_after_the_first(_: Timeline) -> None:
        behaviour.gate = asyncio.Event()

    async def interrupted() -> list[Timeline]:
        async with HttpClient(server, "fastchat", "fake", 30) as client:
            return await run_load(Work(sessions(6), ClosedLoop(1), 0, 0, True), client, Clock(), stall_after_the_first)

    task = asyncio.create_task(interrupted())
    while len(behaviour.bodies) < 2:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(Interrupted) as raised:
        await task
    assert [timeline.status for timeline in raised.value.timelines] == ["ok", "incomplete"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (LoadOptions(requests=0), "at least 1"),
        (LoadOptions(prefix=-1), "at least 0"),
        (LoadOptions(slo="speed:1"), "METRIC:SECONDS"),
        (LoadOptions(arrivals="often"), "arrivals 'often'"),
        (LoadOptions(dataset="/no/such/file"), "cannot read the workload file"),
    ],
)
def test_bad_loads_are_one_line(writer: PromptWriter, options: LoadOptions, complaint: str) -> None:
    with pytest.raises(BenchmarkError, match=complaint):
        make_work(options, writer)
