"""The load generator: makes the work, sends it by its arrival plan and keeps a timeline of every request.

Open-loop arrivals are kept whatever the server does: a session starts when it is due even if none before it has been
answered, and its latency counts from when it was due. A generator that waits for a slow server instead would send less
exactly when it hurts, and report the better figure ("coordinated omission").
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.load.arrivals import USAGE, Arrivals, ClosedLoop, OpenLoop, plan_arrivals
from benchmarks.load.client import Client, Clock
from benchmarks.load.metrics import Phase, Slo, Timeline
from benchmarks.load.workload import Lengths, PromptWriter, Session, read_sessions, synthetic_sessions
from benchmarks.options import BenchmarkError
from ipex_vllm.options import option

Progress = Callable[[Timeline], None]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What is sent and when."""

    prompt: str = option("prompt tokens: N, uniform:LOW:HIGH, normal:MEAN:STD or lognormal:MEDIAN:SIGMA", "128")
    output: str = option("tokens to generate, in the same notation", "64")
    prefix: int = option("tokens at the start of every prompt that all sessions share", 0)
    turns: int = option("turns of a session, each sent on top of the text so far", 1)
    dataset: str | None = option("take prompts from this JSONL or ShareGPT file instead", None)
    arrivals: str = option(USAGE, "closed:1")
    requests: int = option("sessions to measure", 16)
    warmup: int = option("sessions before those, under the same load, left out of the figures", 0)
    cooldown: int = option("sessions after those, under the same load, left out of the figures", 0)
    seed: int = option("the same seed is the same work", 0)
    ignore_eos: bool = option("ask the server for the full output length", True)
    slo: str = option("objectives that goodput counts, e.g. ttft:1,tpot:0.1 (seconds)", "")
    timeout: float = option("seconds after which a request has failed", 600.0)


# Far from the rounds' seeds, which count up from the workload's.
WARM_UP_SEED = 1_000_000
# After a pause caches are cold and connections closed: one request that is not kept.
WAKE_UP = LoadOptions(prompt="16", output="4", requests=1, seed=WARM_UP_SEED)


@dataclass(frozen=True)
class Work:
    """Sessions in the order in which they start, the first `warmup` and the last `cooldown` of them not measured."""

    sessions: Sequence[Session]
    arrivals: Arrivals
    warmup: int
    cooldown: int
    must_reach_max: bool

    def phase(self, index: int) -> Phase:
        if index < self.warmup:
            return "warmup"
        return "cooldown" if index >= len(self.sessions) - self.cooldown else "measured"


def make_work(options: LoadOptions, writer: PromptWriter) -> Work:
    """Make the work that the options describe, the same for the same seed. Raises BenchmarkError."""
    count = options.requests + options.warmup + options.cooldown
    if options.requests < 1 or options.turns < 1 or min(options.warmup, options.cooldown, options.prefix) < 0:
        raise BenchmarkError("requests and turns must be at least 1; warmup, cooldown and prefix at least 0")
    Slo.parse(options.slo)
    text_rng, arrival_rng = np.random.default_rng(options.seed).spawn(2)
    prompt, output = Lengths.parse(options.prompt), Lengths.parse(options.output)
    if options.dataset:
        sessions = read_sessions(Path(options.dataset), writer, output, text_rng)
        if len(sessions) < count:
            raise BenchmarkError(f"{options.dataset} holds {len(sessions)} sessions, {count} are asked for")
        sessions = sessions[:count]
    else:
        sessions = synthetic_sessions(writer, count, prompt, output, text_rng, options.prefix, options.turns)
    arrivals = plan_arrivals(options.arrivals, count, arrival_rng, [session.timestamp for session in sessions])
    return Work(sessions, arrivals, options.warmup, options.cooldown, options.ignore_eos)


async def run_load(work: Work, client: Client, clock: Clock, progress: Progress | None = None) -> list[Timeline]:
    """Send the work and return a timeline per request sent.

    Raises Interrupted, which holds the timelines so far, when the task is cancelled (Ctrl-C).
    """
    timelines: list[Timeline] = []

    async def converse(index: int, due: float) -> None:
        prompt = ""
        for number, turn in enumerate(work.sessions[index].turns):
            prompt += turn.text
            timeline = Timeline(
                session=index,
                turn=number,
                phase=work.phase(index),
                prompt=prompt,
                prompt_tokens=turn.num_tokens,
                max_tokens=turn.output_tokens,
                must_reach_max=work.must_reach_max,
                scheduled=due if number == 0 else clock(),
            )
            timelines.append(timeline)
            await client.send(timeline, clock)
            if progress:
                progress(timeline)
            if timeline.error:
                return
            prompt += timeline.text

    async def user(queue: Iterator[int]) -> None:
        for index in queue:
            await converse(index, clock())

    async def at(index: int, offset: float) -> None:
        await clock.sleep_until(offset)
        await converse(index, offset)

    match work.arrivals:
        case ClosedLoop(concurrency):
            queue = iter(range(len(work.sessions)))
            tasks = [asyncio.create_task(user(queue)) for _ in range(concurrency)]
        case OpenLoop(offsets):
            begun = clock()
            tasks = [asyncio.create_task(at(index, begun + offset)) for index, offset in enumerate(offsets.tolist())]
    try:
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        await asyncio.gather(*tasks, return_exceptions=True)
        raise Interrupted(timelines) from None
    return timelines


class Interrupted(Exception):
    """The run was stopped by the user; `timelines` are those of the requests sent until then."""

    def __init__(self, timelines: list[Timeline]) -> None:
        super().__init__("interrupted")
        self.timelines = timelines
