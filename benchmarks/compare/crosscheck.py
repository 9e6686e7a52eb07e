"""Check our figures against vLLM's own benchmark: both load one running OpenAI server in turn, with the same lengths.

python -m benchmarks.crosscheck --url http://127.0.0.1:8000 --model-path DIR --concurrency 4
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.compare.statistics import paired_ratio
from benchmarks.load.client import only_model
from benchmarks.load.generate import LoadOptions, make_work
from benchmarks.load.measure import Target, measure
from benchmarks.load.output import number, print_json_line, print_table
from benchmarks.load.workload import PromptWriter
from benchmarks.machine import describe_machine
from benchmarks.options import BenchmarkError, add_options
from ipex_vllm.options import Parser, from_namespace, option

# The `vllm bench serve` command, without the `vllm` command, which the CPU wheel cannot run.
VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True, kw_only=True)
class CrosscheckOptions:
    """The server and the work."""

    url: str = option("base URL of an OpenAI server")
    model_path: str = option("the model's local directory")
    concurrency: int = option("requests at a time", 4)
    requests: int = option("requests in each run", 16)
    prompt: int = option("prompt tokens", 64)
    output: int = option("output tokens", 32)
    rounds: int = option("times that both are run", 6)


def ours(options: CrosscheckOptions, model: str, writer: PromptWriter, seed: int) -> dict[str, float]:
    load = LoadOptions(
        prompt=str(options.prompt),
        output=str(options.output),
        arrivals=f"closed:{options.concurrency}",
        requests=options.requests,
        seed=seed,
    )
    run = asyncio.run(
        measure(Target(options.url, "openai", model), make_work(load, writer), load, f"ours, seed {seed}")
    )
    if run.partial:
        raise KeyboardInterrupt
    summary = run.summary
    if summary["requests"]["ok"] != options.requests:
        raise BenchmarkError(f"not all requests went well: {', '.join(summary['errors'])}")
    tails = {name: summary[f"{name}_s"]["mean"] * 1000 for name in ("ttft", "tpot", "itl")}
    return {
        "output tok/s": summary["output_tps"],
        **{f"mean {name.upper()} ms": value for name, value in tails.items()},
    }


def theirs(options: CrosscheckOptions, model: str, seed: int) -> dict[str, float]:
    address = urlsplit(options.url)
    with tempfile.TemporaryDirectory() as directory:
        arguments: Mapping[str, object] = {
            "backend": "openai",
            "host": address.hostname,
            "port": address.port,
            "endpoint": "/v1/completions",
            "model": model,
            "tokenizer": options.model_path,
            "dataset-name": "random",
            "random-input-len": options.prompt,
            "random-output-len": options.output,
            "num-prompts": options.requests,
            "max-concurrency": options.concurrency,
            "seed": seed,
            "result-dir": directory,
            "result-filename": "result.json",
        }
        flags = [f"--{name}={value}" for name, value in arguments.items()]
        command = [sys.executable, "-c", VLLM_BENCH, *flags, "--ignore-eos", "--save-result"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise BenchmarkError(f"vLLM's benchmark failed: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads((Path(directory) / "result.json").read_text())
    return {
        "output tok/s": result["output_throughput"],
        **{f"mean {name.upper()} ms": result[f"mean_{name}_ms"] for name in ("ttft", "tpot", "itl")},
    }


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, CrosscheckOptions)
    options: CrosscheckOptions = from_namespace(CrosscheckOptions, parser.parse_args())
    if options.rounds < 2:
        raise BenchmarkError("--rounds must be at least 2, or there is no interval")
    writer = PromptWriter(Path(options.model_path))
    model = asyncio.run(only_model(options.url, "openai"))
    ours(options, model, writer, seed=1_000_000)
    pairs = []
    for round in range(options.rounds):
        # A B B A, and different prompts in every run, or a prefix cache would answer.
        first = ours(options, model, writer, round) if round % 2 == 0 else None
        second = theirs(options, model, round)
        pairs.append((first or ours(options, model, writer, round), second))
    rows, metrics = [], {}
    for name in pairs[0][0]:
        mine, other = [pair[0][name] for pair in pairs], [pair[1][name] for pair in pairs]
        ratio = paired_ratio(mine, other)
        metrics[name] = {"ours": mine, "vllm_bench": other, "ours_to_theirs": asdict(ratio)}
        middle = len(pairs) // 2
        interval = f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
        rows.append([name, number(sorted(mine)[middle]), number(sorted(other)[middle]), interval])
    title = f"{model}, {options.concurrency} at a time, {options.prompt} in, {options.output} out"
    print_table(title, ["metric", "ours", "vllm bench serve", "ours / theirs (95 % interval)"], rows)
    print_json_line(
        {"kind": "crosscheck", "options": asdict(options), "metrics": metrics, "machine": describe_machine()}
    )
    return 0
