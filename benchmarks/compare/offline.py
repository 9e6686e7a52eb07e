"""What the protocol costs: our engine called in this process, against the worker that serves the same engine over HTTP.

    python -m benchmarks.offline --model-path DIR --worker "--low-bit sym_int4" --arrivals closed:4 --requests 8

Rounds alternate between the two (A B B A ...), each stopped with SIGSTOP while the other one works.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.compare.running import RunningSystem, signal_all
from benchmarks.compare.statistics import paired_ratio
from benchmarks.compare.systems import ROOT, launch
from benchmarks.load.client import Event, record
from benchmarks.load.generate import WAKE_UP, WARM_UP_SEED, LoadOptions, make_work
from benchmarks.load.measure import Run, Target, measure, measure_client
from benchmarks.load.metrics import Timeline
from benchmarks.load.output import number, print_json_line, print_table
from benchmarks.load.workload import PromptWriter
from benchmarks.machine import describe_machine
from benchmarks.options import BenchmarkError, add_options
from ipex_vllm import worker
from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import Generation, RequestError
from ipex_vllm.errors import EngineError
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.options import Parser, from_namespace, option
from ipex_vllm.plan import cpu

METRICS = ("output_tps", "ttft_s.p50", "tpot_s.p50")


@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """Which engine, and how often it is measured."""

    model_path: str = option("the model's local directory")
    worker: str = option("flags of `python -m ipex_vllm.worker`, quoted as in a shell", "")
    rounds: int = option("times that engine and worker are each measured", 6)
    port: int = option("port for the worker", 24590)


class EngineClient:
    """Sends requests to an engine in this process; a client like any other to the load generator."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def send(self, timeline: Timeline, clock: Callable[[], float]) -> None:
        generation = Generation(
            prompt=timeline.prompt,
            temperature=0.0,
            max_new_tokens=timeline.max_tokens,
            ignore_eos=timeline.must_reach_max,
        )
        timeline.started = clock()
        text, tokens = "", 0
        try:
            stream = self._engine.stream(generation, f"offline-{timeline.session}-{timeline.turn}-{timeline.started}")
            async with contextlib.aclosing(stream) as deltas:
                async for delta in deltas:
                    text += delta.text
                    tokens += delta.num_tokens
                    event = Event(text, delta.num_tokens > 0, delta.finish_reason, delta.prompt_tokens, tokens)
                    record(timeline, event, clock())
        except RequestError as error:
            timeline.error = str(error)
        finally:
            timeline.ended = clock()


async def start_engine(arguments: list[str]) -> Engine:
    """Start the engine of a worker with these arguments, compiled at once. Raises OptionError and EngineError."""
    engine_class, _, plan = worker.prepare(MachineFacts.probe(), arguments, None)
    return await engine_class.start(replace(plan, compile_beside=False))


async def compare(
    running: RunningSystem, engine_arguments: list[str], writer: PromptWriter, load: LoadOptions, rounds: int
) -> tuple[list[Run], list[Run]]:
    """Measure the engine and the running worker in turn; return the runs of each, by round. Raises EngineError."""
    how = running.launch
    target = Target(how.url, how.protocol, how.model, running.pids)
    before = set(psutil.Process().children(recursive=True))
    engine = await start_engine(engine_arguments)
    # An engine without work still spins for a while, so it is stopped too while the worker is measured.
    engine_processes = set(psutil.Process().children(recursive=True)) - before

    async def here(seed: int, label: str) -> Run:
        work = make_work(replace(load, seed=load.seed + seed), writer)
        await measure_client(EngineClient(engine), [], make_work(WAKE_UP, writer), WAKE_UP, "waking up")
        return await measure_client(EngineClient(engine), [], work, load, f"{label} engine")

    async def served(seed: int, label: str) -> Run:
        work = make_work(replace(load, seed=load.seed + seed), writer)
        signal_all(engine_processes, signal.SIGSTOP)
        try:
            with running.resumed():
                await measure(target, make_work(WAKE_UP, writer), WAKE_UP, "waking up")
                return await measure(target, work, load, f"{label} worker")
        finally:
            signal_all(engine_processes, signal.SIGCONT)

    runs: dict[Any, list[Run]] = {here: [], served: []}
    try:
        for side in runs:
            await side(WARM_UP_SEED, "warming up")
        for round in range(rounds):
            for side in (here, served) if round % 2 == 0 else (served, here):
                run = await side(round, f"{round + 1}/{rounds}")
                if run.partial:
                    raise KeyboardInterrupt
                runs[side].append(run)
    finally:
        await engine.stop()
    return runs[here], runs[served]


def value(run: Run, metric: str) -> float:
    """Raises BenchmarkError when the run has no such figure."""
    found: Any = run.summary
    for key in metric.split("."):
        found = found and found[key]
    if found is None:
        raise BenchmarkError(f"no {metric}: {', '.join(run.summary['errors']) or 'not all requests went well'}")
    return float(found)


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, OfflineOptions)
    add_options(parser, LoadOptions)
    args = parser.parse_args()
    options: OfflineOptions = from_namespace(OfflineOptions, args)
    load: LoadOptions = from_namespace(LoadOptions, args)
    if options.rounds < 2:
        raise BenchmarkError("--rounds must be at least 2, or there is no interval")
    # As the worker does it for itself: both sides with the same libraries.
    cpu.apply(MachineFacts.probe())
    machine = describe_machine()
    model, flags = Path(options.model_path).resolve(), shlex.split(options.worker)
    writer = PromptWriter(model)
    system = launch("ipex_vllm_worker", model, options.port, flags)
    logs = ROOT / ".cache" / "bench-logs"
    logs.mkdir(parents=True, exist_ok=True)
    with RunningSystem(system, logs / "offline-worker.log", {}, os.sched_getaffinity(0)) as running:
        running.pause()
        arguments = ["--model-path", str(model), *flags]
        try:
            engine_runs, worker_runs = asyncio.run(compare(running, arguments, writer, load, options.rounds))
        except EngineError as error:
            raise BenchmarkError(f"the engine does not start: {error}") from None
    rows, metrics = [], {}
    for metric in METRICS:
        served, here = ([value(run, metric) for run in runs] for runs in (worker_runs, engine_runs))
        ratio = paired_ratio(served, here)
        metrics[metric] = {"engine": here, "worker": served, "worker_to_engine": asdict(ratio)}
        interval = f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
        rows.append([metric, number(sorted(here)[len(here) // 2]), number(sorted(served)[len(served) // 2]), interval])
    header = ["metric", "engine (median)", "worker (median)", "worker / engine (95 % interval)"]
    print_table(f"{Path(options.model_path).name}, {load.arrivals}: what HTTP and the protocol cost", header, rows)
    print_json_line({"kind": "offline", "load": asdict(load), "metrics": metrics, "machine": machine})
    return 0
