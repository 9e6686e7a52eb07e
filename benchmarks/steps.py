"""Where the time of a decode step goes, in milliseconds a step, of the engine that a worker starts.

    python -m benchmarks.steps --model-path DIR --worker "--low-bit sym_int4 --no-compile" --streams 1 4 16

The engine's process is a fork of this one, in which functions of vLLM's are wrapped before it starts: each adds up its
time in steps that decode one token of every stream, and no other. Kernels are timed by PyTorch's profiler, in steps of
their own. All is counted; only remainders are derived:

    gap        between two tokens of a stream, as a client of the engine sees it: the sum of all that follows
    front end  what of it is not in a step: hops between the processes, and the worker's own work
    scheduler  choosing what is computed, and taking up what came of it
    inputs     making the tensors that the model is given
    matmuls    kernels of linear layers, experts and the head
    attention  its kernel, and the cache's
    other      the rest of the model: norms, activations, rotation, and Python between operators
    sampler    choosing the tokens
    core       the rest of the engine's process
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare.offline import EngineClient, start_engine
from benchmarks.load.generate import WAKE_UP, LoadOptions, make_work
from benchmarks.load.measure import measure_client
from benchmarks.load.output import number, print_json_line, print_table
from benchmarks.load.workload import PromptWriter
from benchmarks.machine import describe_machine
from benchmarks.options import BenchmarkError, add_options, run_main
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.options import Parser, from_namespace, option
from ipex_vllm.plan import cpu

STEP, SCHEDULER, RUNNER, FORWARD, HEAD, SAMPLER, UPDATE = parts = (
    "step",
    "schedule",
    "run",
    "forward",
    "head",
    "sample",
    "update",
)
MATMULS, ATTENTION = "matmuls", "attention"
# Of the operators that are not called from others: whose time is whose.
KERNELS = {
    MATMULS: (
        *(f"ipex_vllm::{name}" for name in ("w4a8", "w8a8", "w8a16", "w16a16", "dequantize", "experts")),
        *("_C::onednn", "_C::cpu_gemm", "aten::linear", "aten::mm", "aten::addmm"),
    ),
    ATTENTION: ("_C::cpu_attention", "_C::cpu_attn", "ipex_vllm::attention", "vllm::unified", "aten::scaled_dot"),
}
NAMES = (*parts, *KERNELS)
# Slots of the memory that both processes see, behind the sums: steps that were timed, those under the profiler, and
# how many streams a step must decode to count; above zero in the last, it is profiled.
COUNT, PROFILED, STREAMS, PROFILE = range(len(NAMES), len(NAMES) + 4)


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Which engine."""

    model_path: str = option("the model's local directory")
    worker: str = option("flags of `python -m ipex_vllm.worker`, quoted as in a shell", "")
    output: int = option("tokens that each stream generates", 96)


class Clockwork:
    """The wrappers in vLLM's process, and the sums that this one reads."""

    def __init__(self) -> None:
        self.shared = np.frombuffer(mmap.mmap(-1, 8 * (PROFILE + 1)), dtype=np.float64)
        self._now: dict[str, float] = {}
        self._num_decoding = 0

    def install(self) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        for owner, name, part in (
            (Scheduler, "schedule", SCHEDULER),
            (Scheduler, "update_from_output", UPDATE),
            (GPUModelRunner, "execute_model", RUNNER),
            (GPUModelRunner, "_model_forward", FORWARD),
            (LogitsProcessor, "forward", HEAD),
            (GPUModelRunner, "sample_tokens", SAMPLER),
        ):
            setattr(owner, name, self.timed(getattr(owner, name), part))
        for name in ("step", "step_with_batch_queue"):
            setattr(EngineCore, name, self.whole(getattr(EngineCore, name)))

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - started
            if part == SCHEDULER:
                counts = result.num_scheduled_tokens.values()
                self._num_decoding = len(counts) if set(counts) == {1} else 0
            return result

        return wrapped

    def whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(core: Any) -> Any:
            self._now = {}
            profiled = self.shared[PROFILE] > 0
            started = time.perf_counter()
            with profiler() if profiled else nothing() as kernels:
                result = function(core)
            self._now[STEP] = time.perf_counter() - started
            # None decode in a step of prompts alone, nor are any asked for while the engine wakes up: it is no match.
            is_counted = 0 < self._num_decoding == self.shared[STREAMS]
            if not is_counted or FORWARD not in self._now:
                return result
            found = kernels if profiled else self._now
            for name, seconds in found.items():
                self.shared[NAMES.index(name)] += seconds
            self.shared[PROFILED if profiled else COUNT] += 1
            return result

        return step

    def take(self) -> dict[str, float]:
        """Milliseconds a step of each part, and begin anew."""
        sums, steps, profiled = self.shared[: len(NAMES)].copy(), self.shared[COUNT], self.shared[PROFILED]
        if not steps or not profiled:
            raise BenchmarkError("no step decoded all streams at once; give longer outputs")
        self.shared[:STREAMS] = 0
        return {
            name: 1000 * value / (profiled if name in KERNELS else steps)
            for name, value in zip(NAMES, sums, strict=True)
        }


@contextmanager
def nothing() -> Iterator[dict[str, float]]:
    yield {}


@contextmanager
def profiler() -> Iterator[dict[str, float]]:
    """Fills in the seconds of each kind of kernel when it ends."""
    import torch

    seconds = dict.fromkeys(KERNELS, 0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield seconds
    for event in profile.events():
        for kind, prefixes in KERNELS.items():
            parent = event.cpu_parent
            if event.name.startswith(prefixes) and (parent is None or not parent.name.startswith(prefixes)):
                seconds[kind] += event.cpu_time_total / 1e6


def row(parts: dict[str, float], gap: float) -> dict[str, float]:
    """What a table shows of one number of streams, in ms; it adds up to the gap between tokens that clients see."""
    kernels = parts[MATMULS] + parts[ATTENTION]
    inner = parts[FORWARD] + parts[HEAD]
    return {
        "gap": gap,
        "front end": gap - parts[STEP],
        "scheduler": parts[SCHEDULER] + parts[UPDATE],
        "inputs": parts[RUNNER] - inner,
        "matmuls": parts[MATMULS],
        "attention": parts[ATTENTION],
        "other": inner - kernels,
        "sampler": parts[SAMPLER],
        "core": parts[STEP] - parts[SCHEDULER] - parts[UPDATE] - parts[RUNNER] - parts[SAMPLER],
    }


async def measure(options: StepOptions, streams: Sequence[int]) -> list[dict[str, float]]:
    clockwork = Clockwork()
    clockwork.install()
    writer = PromptWriter(Path(options.model_path))
    engine = await start_engine(["--model-path", options.model_path, *shlex.split(options.worker)])
    client = EngineClient(engine)
    rows = []
    try:
        await measure_client(client, [], make_work(WAKE_UP, writer), WAKE_UP, "waking up")
        for number_of_streams in streams:
            load = LoadOptions(
                arrivals=f"closed:{number_of_streams}",
                requests=number_of_streams,
                prompt="32",
                output=str(options.output),
                ignore_eos=True,
            )
            clockwork.shared[STREAMS], clockwork.shared[PROFILE] = number_of_streams, 0
            run = await measure_client(client, [], make_work(load, writer), load, f"{number_of_streams} streams")
            clockwork.shared[PROFILE] = 1
            profiled = replace(load, output="32", seed=1)
            await measure_client(client, [], make_work(profiled, writer), profiled, "profiling")
            if run.summary["tpot_s"] is None:
                raise BenchmarkError(f"no gaps between tokens: {', '.join(run.summary['errors'])}")
            rows.append(row(clockwork.take(), 1000 * run.summary["tpot_s"]["p50"]))
    finally:
        await engine.stop()
        del client, engine
    return rows


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, StepOptions)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16], help="streams at once")
    args = parser.parse_args()
    options: StepOptions = from_namespace(StepOptions, args)
    os.environ["KINETO_LOG_LEVEL"] = "9"  # PyTorch's profiler is chatty
    cpu.apply(MachineFacts.probe())  # as the worker does it for itself, and an engine that can be forked
    machine = describe_machine()
    rows = asyncio.run(measure(options, args.streams))
    names = list(rows[0])
    print_table(
        f"{Path(options.model_path).name} {options.worker}: ms a step",
        ["streams", *names],
        [
            [str(count), *(number(values[name]) for name in names)]
            for count, values in zip(args.streams, rows, strict=True)
        ],
    )
    print_json_line({"kind": "steps", "rows": dict(zip(args.streams, rows, strict=True)), "machine": machine})
    return 0


if __name__ == "__main__":
    run_main(main)
