"""What drafts gain and cost: one model, with and without them, on four kinds of work.

    python -m benchmarks.speculation --model-path smollm2 --worker "--speculative ngram --low-bit sym_int8"

Two engines of one process take turns (A B B A ...), so that what slows the machine down slows both. Each cell is the
ratio of their output tokens per second over the pairs, with its 95 % interval. The output ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import inspect
import pydoc
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.compare.offline import start_engine
from benchmarks.compare.statistics import paired_ratio
from benchmarks.load.output import print_json_line
from benchmarks.machine import describe_machine
from benchmarks.options import run_main
from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import Generation
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.plan.devices import PLANNERS

# Modules of the standard library, whose documentation and source are the texts: every machine has them.
MODULES = (
    *("textwrap", "bisect", "heapq", "fractions", "statistics", "shelve", "sched", "calendar", "colorsys", "graphlib"),
    *("getopt", "glob", "fnmatch", "linecache", "queue", "quopri", "secrets", "stat", "tabnanny", "timeit"),
)
SUBJECTS = (
    *("a lighthouse", "two brothers", "a lost letter", "the first snow", "an old clock", "a broken bridge", "a fox"),
    *("a market at night", "the last train", "a garden", "a violin", "an island", "a storm", "a painter", "the desert"),
    "a teacher",
)
PASSAGE_CHARACTERS, CODE_CHARACTERS = 1200, 1500
SEED = 7


@dataclass(frozen=True)
class Work:
    """A kind of work: prompt number n, and how it is sampled."""

    prompt: Callable[[int], str]
    temperature: float = 0.0
    is_chat: bool = True


def documentation(number: int) -> str:
    return pydoc.plain(pydoc.render_doc(MODULES[number % len(MODULES)]))[300 : 300 + PASSAGE_CHARACTERS]


def source(number: int) -> str:
    module = __import__(MODULES[number % len(MODULES)])
    return inspect.getsource(module)[1000 : 1000 + CODE_CHARACTERS]


WORK = {
    "copy": Work(lambda n: f"Repeat this text, with `self` spelled `this`:\n\n{documentation(n)}"),
    "passage": Work(
        lambda n: f"{documentation(n)}\n\nAnswer from the text above, in its words: what is described there?"
    ),
    "code": Work(source, is_chat=False),
    "story": Work(lambda n: f"Write a story about {SUBJECTS[n % len(SUBJECTS)]}.", temperature=0.8),
}


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What drafts brought: rates in output tokens per second, `ratio` with drafts to without, and its interval.

    Attributes:
        accepted: share of the draft tokens that were right.
        drafted: draft tokens for each token of output.
    """

    without: float
    with_drafts: float
    ratio: float
    low: float
    high: float
    accepted: float
    drafted: float


@dataclass(frozen=True, kw_only=True)
class Cell(Gain):
    """One kind of work at one load."""

    work: str
    streams: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default="smollm2", help="as for the worker (default: %(default)s)")
    parser.add_argument(
        "--worker", default="--speculative auto", help="the worker's flags, quoted (default: %(default)s)"
    )
    parser.add_argument("--work", default=",".join(WORK), help="kinds of work (default: %(default)s)")
    parser.add_argument("--streams", default="1,4,16", help="loads (default: %(default)s)")
    parser.add_argument("--pairs", type=two_or_more, default=10, help="of runs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of a request (default: %(default)s)")
    options = parser.parse_args()
    flags = ["--model-path", options.model_path, *shlex.split(options.worker)]
    machine = MachineFacts.probe()
    PLANNERS["cpu"].apply(machine)
    described = describe_machine()
    cells = asyncio.run(measure(options, flags))
    print(f"\n{machine.name}, {len(machine.cpus)} CPUs; {options.pairs} pairs of {options.tokens} tokens a request\n")
    print("| work | streams | without, tok/s | with | ratio | 95 % interval | drafts accepted | drafted a token |")
    print("|---|---:|---:|---:|---:|---|---:|---:|")
    for cell in cells:
        print(
            f"| {cell.work} | {cell.streams} | {cell.without:.1f} | {cell.with_drafts:.1f} | {cell.ratio:.2f} | "
            f"{cell.low:.2f} to {cell.high:.2f} | {cell.accepted:.0%} | {cell.drafted:.2f} |"
        )
    print_json_line({"kind": "speculation", "cells": [asdict(cell) for cell in cells], "machine": described})
    return 0


async def measure(options: argparse.Namespace, flags: Sequence[str]) -> list[Cell]:
    wanted = [] if "--speculative" in flags else ["--speculative", "auto"]
    engines: list[Engine] = []
    try:
        for speculative in (["--speculative", "off"], wanted):
            arguments = ["--kv-cache-gib", "1", "--no-openai", *flags, *speculative]
            if speculative != wanted:  # the last word wins, but a model that drafts needs one
                arguments = without_draft_model(arguments)
            engines.append(await start_engine(arguments))
        cells = []
        for work in options.work.split(","):
            for streams in map(int, options.streams.split(",")):
                gain = await take_turns(engines, WORK[work], streams, options.pairs, options.tokens)
                cells.append(Cell(work=work, streams=streams, **asdict(gain)))
                print(cells[-1], file=sys.stderr, flush=True)
        return cells
    finally:
        for engine in engines:
            await engine.stop()


def without_draft_model(flags: Sequence[str]) -> list[str]:
    kept = list(flags)
    if "--draft-model" in kept:
        del kept[kept.index("--draft-model") : kept.index("--draft-model") + 2]
    return kept


async def take_turns(engines: Sequence[Engine], work: Work, streams: int, pairs: int, tokens: int) -> Gain:
    """Let the engine without drafts, and the one with them, work in turns, A B B A, after a pair that warms them up."""
    rates: tuple[list[float], list[float]] = ([], [])
    drafted = accepted = 0
    for pair in range(-1, pairs):
        for index in (0, 1) if pair % 2 == 0 else (1, 0):
            begin = time.monotonic()
            numbers = range(max(pair, 0) * streams, (max(pair, 0) + 1) * streams)
            results = await asyncio.gather(*(generate(engines[index], work, number, tokens) for number in numbers))
            if pair >= 0:
                rates[index].append(streams * tokens / (time.monotonic() - begin))
                drafted += sum(result[0] for result in results)
                accepted += sum(result[1] for result in results)
    ratio = paired_ratio(rates[1], rates[0])
    return Gain(
        without=statistics.median(rates[0]),
        with_drafts=statistics.median(rates[1]),
        ratio=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
        accepted=accepted / max(drafted, 1),
        drafted=drafted / (pairs * streams * tokens),
    )


def two_or_more(text: str) -> int:
    """An interval needs two pairs. Raises ValueError."""
    number = int(text)
    if number < 2:
        raise ValueError
    return number


async def generate(engine: Engine, work: Work, number: int, tokens: int) -> tuple[int, int]:
    """Generate `tokens` tokens; the drafted and the accepted among them."""
    prompt = work.prompt(number)
    if work.is_chat:
        messages: Any = [{"role": "user", "content": prompt}]
        prompt = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    generation = Generation(prompt, temperature=work.temperature, seed=SEED, max_new_tokens=tokens, ignore_eos=True)
    drafted = accepted = 0
    async with contextlib.aclosing(engine.stream(generation, f"{number}-{time.monotonic_ns()}")) as deltas:
        async for delta in deltas:
            drafted += delta.drafted
            accepted += delta.accepted
    return drafted, accepted


if __name__ == "__main__":
    run_main(main)
