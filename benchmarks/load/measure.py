"""One measured run: work, client, load generator, resource sampler and figures put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.load.arrivals import ClosedLoop, OpenLoop
from benchmarks.load.client import Client, Clock, HttpClient
from benchmarks.load.generate import Interrupted, LoadOptions, Work, run_load
from benchmarks.load.metrics import Slo, Timeline, summarize
from benchmarks.load.resources import ResourceSampler
from benchmarks.load.workload import Lengths
from benchmarks.micro.bound import WEIGHTS, ModelShape, Peaks, bound_tps, work_bound_tps


@dataclass(frozen=True)
class Target:
    """A running server; `pids` are its processes' where they are known (their resources are then sampled)."""

    url: str
    protocol: str
    model: str
    pids: Sequence[int] = field(default_factory=tuple)


@dataclass(frozen=True)
class Run:
    """What was measured. `partial` says that the user stopped it early."""

    timelines: list[Timeline]
    summary: dict[str, Any]
    resources: dict[str, Any]
    partial: bool


async def measure(target: Target, work: Work, options: LoadOptions, label: str) -> Run:
    """Put the work on a server; Ctrl-C ends the run early and returns what there is."""
    async with HttpClient(target.url, target.protocol, target.model, options.timeout) as client:
        return await measure_client(client, target.pids, work, options, label)


async def measure_client(client: Client, pids: Sequence[int], work: Work, options: LoadOptions, label: str) -> Run:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[last]}")
    console = Console(stderr=True)
    # Drawn four times a second: often enough to watch, too seldom to weigh on a shared core.
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=4,
        transient=True,
        disable=not console.is_terminal,
    )
    total = sum(len(session.turns) for session in work.sessions)
    task = bar.add_task(label, total=total, last="")

    def progress(timeline: Timeline) -> None:
        bar.update(task, advance=1, last="" if timeline.error is None else f"[red]{timeline.error[:60]}")

    partial = False
    with bar:
        async with ResourceSampler(pids) as sampler:
            try:
                timelines = await run_load(work, client, Clock(), progress)
            except Interrupted as interrupted:
                timelines, partial = interrupted.timelines, True
    return Run(timelines, summarize(timelines, Slo.parse(options.slo)), sampler.report(), partial)


def bound_of(options: LoadOptions, work: Work, peaks: Peaks, shape: ModelShape, format: str) -> float | None:
    """The roofline of this load in output tokens/s; None where a part of it is not measured.

    Requests of fixed lengths from a closed loop are in step, which has a closer bound than others have.
    """
    if work.warmup or work.cooldown:
        return None
    prompt, output = Lengths.parse(options.prompt), Lengths.parse(options.output)
    is_plain = options.dataset is None and options.turns == 1 and options.prefix == 0
    concurrency, last_s = None, 0.0
    match work.arrivals:
        case ClosedLoop(users) if is_plain and {prompt.kind, output.kind} == {"fixed"}:
            lengths = int(prompt.parameters[0]), int(output.parameters[0])
            return bound_tps(peaks, shape, WEIGHTS[format], users, *lengths)
        case ClosedLoop(users):
            concurrency = users
        case OpenLoop(offsets):
            last_s = float(offsets[-1] - offsets[0])
    turns = [[(turn.num_tokens, turn.output_tokens) for turn in session.turns] for session in work.sessions]
    return work_bound_tps(peaks, shape, WEIGHTS[format], turns, concurrency, options.prefix, last_s)
