"""Serve tiny models of many architectures in each precision and hold them against Transformers.

python -m benchmarks.models [NAME ...] [--formats float sym_int8 sym_int4] [--table docs/models.md]

Each result is a line of JSON, the last words of the output. Ends with status 1 if one is other than known.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.models import answers, tiny
from benchmarks.models.architecture import Architecture
from benchmarks.models.report import FLOAT, FORMATS, is_expected, write
from benchmarks.models.served import FORK, ask
from benchmarks.models.zoo import ARCHITECTURES
from ipex_vllm.low_bit import importance
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.plan import cpu

T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}; all by default")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--table", type=Path, help="a Markdown file whose table is written anew")
    parser.add_argument("--verbose", action="store_true", help="show what the workers log, and tracebacks")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cpu.apply(MachineFacts.probe())  # Intel's OpenMP: with GNU's nothing that has computed can be forked
    import_all()
    results = []
    cores = FORK.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = tempfile.tempdir = folder  # killed workers leave sockets behind
        # A core for each model that is asked, and as many at once as there are cores.
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), FORK, take_core, (cores,)) as lanes:
            asked = partial(compare, formats=args.formats, parent=Path(folder), verbose=args.verbose)
            for result in (result for row in lanes.map(asked, args.names or ARCHITECTURES) for result in row):
                results.append(result)
                print(json.dumps(result), flush=True)
    if args.table is not None:
        write(args.table, results)
    return 0 if all(map(is_expected, results)) else 1


def import_all() -> None:
    """What every worker would import for itself."""
    import vllm.entrypoints.launchers.api_server.app_state
    import vllm.entrypoints.launchers.app
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from transformers.models.auto import tokenization_auto
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins
    from vllm.v1.sample import sampler

    import ipex_vllm.worker  # noqa: F401

    # vLLM asks a fresh process, which imports all of it, what kind of model a class is.
    registry._run_in_subprocess = lambda function: function()
    load_general_plugins()
    # Transformers gives some types of models, Qwen3.5's among them, another tokenizer than their directory names.
    tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.clear()
    sampler.batched_count_greater_than = plain_count  # else compiled, for two seconds a model
    gc.freeze()  # vLLM collects garbage at each start, which would look through all of this


def plain_count(values: Any, bounds: Any) -> Any:
    return (values >= bounds).sum(-1)


def take_core(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})


def compare(name: str, formats: list[str], parent: Path, verbose: bool) -> list[dict[str, Any]]:
    architecture, folder = ARCHITECTURES[name], parent / name
    folder.mkdir()
    results = []
    for format_name in formats:
        started = time.perf_counter()
        model, quantized = folder / "tiny", folder / f"{format_name}.npy"
        try:
            if not model.exists():
                forked(write_model, architecture, model)
            answer = ask(architecture, model, None if format_name == FLOAT else format_name, quantized, verbose)
            result = vars(forked(answers.difference, architecture, model, answer, quantized))
        except Exception as error:
            if verbose:
                traceback.print_exc()
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        seconds = round(time.perf_counter() - started, 1)
        results.append({"name": name, "format": format_name, **result, "seconds": seconds})
    return results


def write_model(architecture: Architecture, folder: Path) -> None:
    tiny.make(architecture, folder)
    importance.of_checkpoint(str(folder))  # else a start measures it


def forked(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own: what computes must not be forked, nor a crash take others along."""
    with ProcessPoolExecutor(1, FORK) as process:
        return process.submit(function, *arguments).result()


if __name__ == "__main__":
    sys.exit(main())
