"""Raise the load on a running server until it gives no more, and mark the knee.

python -m benchmarks.sweep --url http://127.0.0.1:21002 --protocol fastchat --model-path DIR --over concurrency
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.load import plots
from benchmarks.load.generate import LoadOptions, make_work
from benchmarks.load.measure import Run, measure
from benchmarks.load.output import markdown_table, number, print_json_line, print_table, write_json, write_requests
from benchmarks.load.server import ServerOptions, parse
from benchmarks.load.workload import PromptWriter
from benchmarks.machine import describe_machine
from benchmarks.options import BenchmarkError, add_options
from ipex_vllm.options import Parser, from_namespace, option

# Levels in a row without gain that mean saturation: one alone may be noise.
FLAT_LEVELS = 2


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How the load is raised. The load's own `--arrivals` is not used; warm-up and cool-down fit each level."""

    over: Literal["concurrency", "rate"] = option("what is doubled from level to level", "concurrency")
    start: float = option("the first level: users, or requests per second", 1.0)
    max_levels: int = option("stop after this many levels, saturated or not", 10)
    gain: float = option("a level that gives less than this share more output tokens/s than the best is flat", 0.05)


def is_saturated(throughput: Sequence[float], gain: float) -> bool:
    """Whether each of the last FLAT_LEVELS levels stayed within `gain` of the best level before them."""
    if len(throughput) <= FLAT_LEVELS:
        return False
    best = max(throughput[:-FLAT_LEVELS])
    return all(value < best * (1 + gain) for value in throughput[-FLAT_LEVELS:])


def knee(throughput: Sequence[float], latency: Sequence[float]) -> int:
    """Index of the level with the most *power*, throughput over latency.

    Kleinrock, "Power and deterministic rules of thumb for probabilistic problems in computer communications" (1979):
    beyond it a request waits for more than the system gains.
    """
    powers = [tokens / seconds for tokens, seconds in zip(throughput, latency, strict=True)]
    return powers.index(max(powers))


def load_at(level: float, sweep: SweepOptions, options: LoadOptions) -> LoadOptions:
    """The load of one level: at least three waves of users, and one more before and after the measured span."""
    if sweep.over == "rate":
        edge = max(1, options.requests // 8)
        return replace(options, arrivals=f"poisson:{level:g}", warmup=edge, cooldown=edge)
    users = int(level)
    return replace(
        options, arrivals=f"closed:{users}", requests=max(options.requests, 3 * users), warmup=users, cooldown=users
    )


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, SweepOptions)
    args = parse(None, parser)
    server: ServerOptions = from_namespace(ServerOptions, args)
    sweep: SweepOptions = from_namespace(SweepOptions, args)
    options: LoadOptions = from_namespace(LoadOptions, args)
    if sweep.start <= 0 or (sweep.over == "concurrency" and sweep.start != int(sweep.start)):
        raise BenchmarkError("--start must be above 0, and a whole number of users for a sweep over concurrency")
    writer = PromptWriter(Path(server.model_path))
    target, machine = server.target(), describe_machine()

    runs: list[tuple[float, Run]] = []
    throughput: list[float] = []
    while len(runs) < sweep.max_levels and not is_saturated(throughput, sweep.gain):
        level = sweep.start * 2 ** len(runs)
        load = replace(load_at(level, sweep, options), seed=options.seed + len(runs))
        run = asyncio.run(measure(target, make_work(load, writer), load, f"{sweep.over} {level:g}"))
        runs.append((level, run))
        if run.partial:
            break
        if run.summary["output_tps"] is None or not run.summary["e2e_s"]:
            raise BenchmarkError(
                f"no figures at {sweep.over} {level:g}: {', '.join(run.summary['errors']) or 'no usage'}"
            )
        throughput.append(run.summary["output_tps"])

    partial = bool(runs) and runs[-1][1].partial
    complete = [(level, run.summary) for level, run in runs if not run.partial]
    latency = [summary["e2e_s"]["mean"] for _, summary in complete]
    at = knee(throughput, latency) if complete else None
    result: dict[str, Any] = {
        "kind": "sweep",
        "partial": partial,
        "over": sweep.over,
        "target": {"url": target.url, "protocol": target.protocol, "model": target.model},
        "load": asdict(options),
        "levels": [{"level": level, "summary": run.summary, "resources": run.resources} for level, run in runs],
        "saturated": is_saturated(throughput, sweep.gain),
        "knee": None if at is None else complete[at][0],
        "machine": machine,
    }
    header = [sweep.over, "output tok/s", "requests/s", "TTFT p50 ms", "TPOT p50 ms", "E2E mean ms", "not ok", ""]
    rows = [row(level, summary, index == at) for index, (level, summary) in enumerate(complete)]
    state = "interrupted" if partial else "saturated" if result["saturated"] else "not saturated at the last level"
    title = f"{target.model} at {target.url}: {state}"
    if server.out:
        out = Path(server.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "result.json", result)
        (out / "summary.md").write_text(f"# {title}\n\n" + markdown_table(header, rows))
        for level, run in runs:
            write_requests(out / f"requests-{level:g}.csv", run.timelines)
        if at is not None:
            levels = [level for level, _ in complete]
            plots.throughput_against_load(levels, throughput, latency, at, sweep.over, out / "sweep")
    print_table(title, header, rows)
    print_json_line(result)
    return 130 if partial else 0


def row(level: float, summary: dict[str, Any], is_knee: bool) -> list[str]:
    times = [(summary[name] or {}).get(key) for name, key in (("ttft_s", "p50"), ("tpot_s", "p50"), ("e2e_s", "mean"))]
    not_ok = summary["requests"]["sent"] - summary["requests"]["ok"]
    return [
        f"{level:g}",
        number(summary["output_tps"]),
        number(summary["requests_per_s"]),
        *(number(None if time is None else time * 1000) for time in times),
        str(not_ok),
        "knee" if is_knee else "",
    ]
