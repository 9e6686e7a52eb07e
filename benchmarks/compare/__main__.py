"""Compare systems on the same work at the same time.

    python -m benchmarks.compare benchmarks/configs/smoke.yaml --out DIR

Rounds visit the systems in turn, every second round in reverse order (A B B A ...). First the baseline is compared
with a second copy of itself: that is the noise floor, inside which no winner is called.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.compare.findings import (
    HEADER,
    TWIN,
    Findings,
    Measurement,
    Stage,
    front_line,
    start_line,
    table_rows,
    workload_title,
    write_files,
    write_measured,
)
from benchmarks.compare.running import RunningSystem, split_cores
from benchmarks.compare.spec import Spec, SystemSpec
from benchmarks.compare.systems import ROOT, Absent, Launch, launch
from benchmarks.load.generate import WAKE_UP, WARM_UP_SEED, LoadOptions, Work, make_work
from benchmarks.load.measure import Run, Target, bound_of, measure
from benchmarks.load.output import print_json_line, print_table
from benchmarks.load.workload import PromptWriter
from benchmarks.machine import describe_machine
from benchmarks.micro.bound import ModelShape, Peaks, peaks_in_subprocess
from benchmarks.options import BenchmarkError, run_main
from ipex_vllm.options import Parser

PORTS_PER_SYSTEM = 4
ROUNDS_APART = 1000  # in the numbers of the rounds of two groups
WARM_UP_OUTPUT = "4"
log = Console(stderr=True, highlight=False)


class Comparison:
    """Runs a spec; what was measured so far is in `measurements`, also after an interrupt."""

    def __init__(self, spec: Spec, logs: Path, server_cores: set[int]) -> None:
        self.spec = spec
        self.measurements: list[Measurement] = []
        self.absent: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.start_s: dict[str, list[float]] = {}
        self.model = (ROOT / spec.model).resolve()
        self._logs = logs
        self._residents: dict[str, RunningSystem] = {}
        self._server_cores = server_cores
        self._writer = PromptWriter(self.model)
        self._wake_up_call = make_work(WAKE_UP, self._writer)

    def run(self) -> None:
        """Measure the noise floor, then all systems.

        A system that is absent or fails is noted and left out; for the baseline that is a BenchmarkError.
        """
        present = dict(self.spec.systems)
        for name, system in self.spec.systems.items():
            try:
                self._launch(system, 0)
            except Absent as absent:
                self.absent[name] = str(absent)
                del present[name]
        baseline = self.spec.baseline
        if baseline in self.absent:
            raise BenchmarkError(f"baseline {baseline!r}: {self.absent[baseline]}")
        groups = self.spec.groups(list(present))
        started, seconds_each = time.monotonic(), 60 * self.spec.minutes / len(groups)
        try:
            self._stage("noise", [baseline, TWIN], 0, started)
            for number, names in enumerate(groups, start=1):
                self._stage("main", names, number * ROUNDS_APART, started + number * seconds_each)
        finally:
            self._keep_resident([])

    def _is_over(self, stage: Stage, names: Sequence[str], num_rounds: int, deadline: float) -> bool:
        if stage == "noise":
            return num_rounds >= self.spec.noise_rounds
        if num_rounds < self.spec.rounds:
            return False
        if self.spec.precision is None or time.monotonic() > deadline:
            return True
        return Findings(self.spec, self.measurements).widest(names) <= self.spec.precision

    def _stage(self, stage: Stage, names: Sequence[str], first_round: int, deadline: float) -> None:
        if self.spec.resident:
            self._keep_resident(names)
        for round in itertools.count(first_round):
            if self._is_over(stage, names, round - first_round, deadline):
                break
            for name in names if round % 2 == 0 else reversed(names):
                if name in self.failed:
                    continue
                with self._noting_failure(name):
                    if self.spec.resident:
                        running = self._residents[name]
                        with running.resumed():
                            self._run(running, self._wake_up_call, WAKE_UP, "waking up")
                            self._visit(stage, round, name, running)
                    else:
                        with self._system(name) as running:
                            self._warm_up(name, running)
                            self._visit(stage, round, name, running)

    def _keep_resident(self, names: Sequence[str]) -> None:
        """Stop the systems that are not among `names`, start those that are missing, and leave all of them paused."""
        for name in self._residents.keys() - set(names):
            self._residents.pop(name).stop()
        for name in names:
            if name in self._residents or name in self.failed:
                continue
            with self._noting_failure(name):
                running = self._system(name)
                running.start()
                self._residents[name] = running
                self._warm_up(name, running)
                running.pause()

    @contextlib.contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        try:
            yield
        except BenchmarkError as error:
            if name in (self.spec.baseline, TWIN):
                raise
            log.print(f"{name} is left out: {error}", style="red")
            self.failed[name] = str(error)

    def _launch(self, system: SystemSpec, position: int) -> Launch:
        port = self.spec.port + PORTS_PER_SYSTEM * position
        return launch(system.system, self.model, port, shlex.split(system.flags), system.format)

    def _system(self, name: str) -> RunningSystem:
        """The system, not yet started. TWIN is the baseline under another name and port."""
        log.print(f"starting {name}")
        names = [*self.spec.systems, TWIN]
        system = self.spec.systems[self.spec.baseline if name == TWIN else name]
        env = {key: str(value) for key, value in system.env.items()}
        how = self._launch(system, names.index(name))
        return RunningSystem(how, self._logs / f"{name.replace(' ', '-')}.log", env, self._server_cores)

    def work(self, workload: str, seed_offset: int) -> Work:
        options = self.spec.workloads[workload]
        return make_work(replace(options, seed=options.seed + seed_offset), self._writer)

    def _warm_up(self, name: str, running: RunningSystem) -> None:
        """After a start: note how long it took, then run each workload's prompts once and forget it.

        That is for compilation, caches and the first touch of memory.
        """
        self.start_s.setdefault(name, []).append(running.start_s)
        for workload, options in self.spec.workloads.items():
            short = replace(options, output=WARM_UP_OUTPUT, seed=WARM_UP_SEED)
            self._run(running, make_work(short, self._writer), short, f"warming up: {workload}")

    def _visit(self, stage: Stage, round: int, name: str, running: RunningSystem) -> None:
        for workload, options in self.spec.workloads.items():
            # New prompts in every round, or a prefix cache would answer; the same ones for every system.
            work = self.work(workload, round)
            run = self._run(running, work, options, f"{stage} round {round + 1}, {name}: {workload}")
            self.measurements.append(Measurement(stage, round, name, workload, run))

    def _run(self, running: RunningSystem, work: Work, options: LoadOptions, label: str) -> Run:
        how = running.launch
        target = Target(how.url, how.protocol, how.model, running.pids)
        run = asyncio.run(measure(target, work, options, label))
        if run.partial:
            raise KeyboardInterrupt
        return run

    def report(self, peaks: Peaks | None) -> dict[str, Any]:
        """The result of what was measured, as JSON has it."""
        findings = Findings(self.spec, self.measurements)
        bounds: dict[str, dict[str, float | None]] = {name: {} for name in self.spec.workloads}
        if peaks:
            shape = ModelShape.read(self.model)
            for workload, options in self.spec.workloads.items():
                works = [self.work(workload, round) for round in findings.rounds(workload)]
                for name, system in self.spec.systems.items():
                    found = [bound_of(options, work, peaks, shape, system.format) for work in works]
                    known = [bound for bound in found if bound is not None]
                    # Lengths that are drawn differ from round to round; throughput is a median as well.
                    bounds[workload][name] = statistics.median(known) if known else None
        return {
            "workloads": {name: findings.workload(name, bounds[name]) for name in self.spec.workloads},
            "start_s": self.start_s,
            "absent": self.absent,
            "failed": self.failed,
            "peaks": asdict(peaks) if peaks else None,
        }


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="YAML file; see benchmarks/configs/")
    parser.add_argument("--out", type=Path, help="write JSON, CSV, Markdown, plots and logs into this directory")
    args = parser.parse_args()
    spec = Spec.read(args.spec)
    logs = args.out or ROOT / ".cache" / "bench-logs"
    logs.mkdir(parents=True, exist_ok=True)
    server_cores, client_cores = split_cores()
    comparison = Comparison(spec, logs, server_cores)
    machine = describe_machine()
    peaks = peaks_in_subprocess() if spec.roofline else None
    os.sched_setaffinity(0, client_cores)
    partial = False
    try:
        comparison.run()
    except KeyboardInterrupt:
        partial = True
    if args.out:  # first: what took half an hour is kept whatever becomes of the report
        write_measured(args.out, comparison.measurements)
    result = {
        "kind": "compare",
        "title": spec.title + (" (partial: interrupted)" if partial else ""),
        "partial": partial,
        "spec": asdict(spec),
        "cores_pinned_apart": server_cores != client_cores,
        **comparison.report(peaks),
        "machine": machine,
    }
    if args.out:
        write_files(args.out, result)
    for name, workload in result["workloads"].items():
        print_table(workload_title(name, workload), HEADER, table_rows(workload))
        print(front_line(workload))
    if comparison.start_s:
        print(start_line(comparison.start_s))
    for name, why in {**comparison.absent, **comparison.failed}.items():
        print(f"{name}: {why}")
    print_json_line(result)
    return 130 if partial else 0


if __name__ == "__main__":
    run_main(main)
