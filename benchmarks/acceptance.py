"""What drafts gain against how many of them are right, for drafts of one length: the ceiling of speculative decoding.

    python -m benchmarks.make_model --shape llama-1.1b --live-layers 2 --out TARGET
    python -m benchmarks.make_model --first-layers-of TARGET --live-layers 2 --out DRAFT
    python -m benchmarks.acceptance --model-path TARGET --draft-model DRAFT --worker "--low-bit sym_int4" --plot gain

The target's later layers cost what they cost and add nothing, so its first layers are a draft that is always right with
greedy decoding. The draft's tokens are its likeliest ones: the hotter the target samples, the fewer of them it takes.
A length of 0 stands for the lookup, with drafts as long as they pay. One stream; engine with and without drafts take
turns, as in `benchmarks.speculation`.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.compare.offline import start_engine
from benchmarks.load.output import print_json_line
from benchmarks.machine import describe_machine
from benchmarks.options import run_main
from benchmarks.speculation import Gain, Work, take_turns, two_or_more
from ipex_vllm.engines import vllm_speculation
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.plan.devices import PLANNERS

LOOKUP = 0  # in place of a length
CONSTANT_DRAFTS = "benchmarks.acceptance.ConstantDrafts"


class ConstantDrafts(Scheduler):  # type: ignore[misc]
    """vLLM's own scheduler, with drafts of one length; by another name, so that the worker leaves it alone."""


@dataclass(frozen=True, kw_only=True)
class Point(Gain):
    """Drafts of one length at one temperature."""

    length: int
    temperature: float


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="the target, as for the worker")
    parser.add_argument("--draft-model", required=True, help="as for the worker")
    parser.add_argument("--worker", default="", help="more of the worker's flags, quoted")
    parser.add_argument(
        "--lengths", default="0,1,2,3,4,5,6,7,8", help="draft lengths; 0: lookup (default: %(default)s)"
    )
    parser.add_argument("--temperatures", default="0,0.2,0.3,0.4,0.6", help="of sampling (default: %(default)s)")
    parser.add_argument("--pairs", type=two_or_more, default=4, help="of runs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="output tokens of a request (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="write NAME.png and NAME.svg")
    options = parser.parse_args()
    PLANNERS["cpu"].apply(MachineFacts.probe())
    described = describe_machine()
    points = asyncio.run(measure(options))
    print("\n| draft length | temperature | accepted | without, tok/s | with | gain | 95 % interval |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for point in points:
        print(
            f"| {point.length or 'lookup'} | {point.temperature} | {point.accepted:.0%} | {point.without:.1f} | "
            f"{point.with_drafts:.1f} | {point.ratio:.2f} | {point.low:.2f} to {point.high:.2f} |"
        )
    if options.plot is not None:
        from benchmarks.load.plots import gain_by_acceptance

        curves: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            curves.setdefault(str(point.length or "lookup"), []).append((point.accepted, point.ratio))
        gain_by_acceptance(curves, options.plot)
    print_json_line({"kind": "acceptance", "points": [asdict(point) for point in points], "machine": described})
    return 0


async def measure(options: argparse.Namespace) -> list[Point]:
    common = ["--model-path", options.model_path, "--kv-cache-gib", "1", "--no-openai", *shlex.split(options.worker)]
    plain = await start_engine([*common, "--speculative", "off"])
    points = []
    try:
        for length in map(int, options.lengths.split(",")):
            drafting = await start_engine([*common, *drafting_flags(length, options.draft_model)])
            try:
                for temperature in map(float, options.temperatures.split(",")):
                    work = Work(lambda number: f"{number} and the rest", temperature, is_chat=False)
                    gain = await take_turns((plain, drafting), work, 1, options.pairs, options.tokens)
                    points.append(Point(length=length, temperature=temperature, **asdict(gain)))
                    print(points[-1], file=sys.stderr, flush=True)
            finally:
                await drafting.stop()
    finally:
        await plain.stop()
    return points


def drafting_flags(length: int, draft_model: str) -> list[str]:
    if length == LOOKUP:
        return ["--speculative", "ngram"]
    vllm_speculation.DRAFTED_TOKENS = length
    return ["--speculative", "draft", "--draft-model", draft_model, "--scheduler-cls", CONSTANT_DRAFTS]


if __name__ == "__main__":
    run_main(main)
