"""Serve tiny models of many architectures in each precision and hold them against Transformers.

python -m benchmarks.models [NAME ...] [--formats float sym_int8 sym_int4] [--table docs/models.md]

Each result is a line of JSON, the last words of the output. Ends with status 1 if one is other than known.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.models.report import FLOAT, FORMATS, is_expected, write
from benchmarks.models.zoo import ARCHITECTURES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}; all by default")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--table", type=Path, help="a Markdown file whose table is written anew")
    parser.add_argument("--verbose", action="store_true", help="show what vLLM logs, and tracebacks")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if not args.verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import_all()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for name in args.names or ARCHITECTURES:
            for result in in_a_child(name, args.formats, Path(folder) / name, args.verbose):
                results.append(result)
                print(json.dumps(result), flush=True)
    if args.table is not None:
        write(args.table, results)
    return 0 if all(map(is_expected, results)) else 1


def import_all() -> None:
    """What every child would import for itself."""
    import transformers  # noqa: F401
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins
    from vllm.v1.sample import sampler

    # vLLM asks a fresh process, which imports all of it, what kind of model a class is.
    registry._run_in_subprocess = lambda function: function()
    load_general_plugins()
    sampler.batched_count_greater_than = plain_count  # else compiled, for two seconds a model
    gc.freeze()  # vLLM collects garbage at each start, which would look through all of this


def plain_count(values: Any, bounds: Any) -> Any:
    return (values >= bounds).sum(-1)


def in_a_child(name: str, formats: list[str], folder: Path, verbose: bool) -> Iterator[dict[str, Any]]:
    """Fork: what has been imported stays, and a model that crashes takes nobody along."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with open(writing, "w") as pipe:
            for result in compare(name, formats, folder, verbose):
                pipe.write(json.dumps(result) + "\n")
                pipe.flush()
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        for line in pipe:
            yield json.loads(line)
    _, status = os.waitpid(child, 0)
    if status:
        yield {"name": name, "error": f"ended with status {status}"}


def compare(name: str, formats: list[str], folder: Path, verbose: bool) -> Iterator[dict[str, Any]]:
    from vllm.distributed import cleanup_dist_env_and_memory

    from benchmarks.models import answers, tiny
    from ipex_vllm.low_bit import importance

    architecture = ARCHITECTURES[name]
    # Before vLLM has changed Transformers' classes, as it does for models that it runs by them.
    original = tiny.make(architecture, folder)
    importance.of_checkpoint(str(folder))
    for format_name in formats:
        try:
            started = time.perf_counter()
            model = copy.deepcopy(original)
            quantized: list[Any] = []
            low_bit = None if format_name == FLOAT else format_name
            chosen = {"dtype": architecture.dtype, "pictures": architecture.pictures, **architecture.engine}
            answer = answers.of_vllm(folder, low_bit, quantized, **chosen)
            if quantized:
                answers.dequantized(model, quantized)
            result = {**vars(answers.difference(model, answer)), "quantized": len(quantized)}
        except Exception as error:
            if verbose:
                traceback.print_exc()
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        yield {"name": name, "format": format_name, **result, "seconds": time.perf_counter() - started}
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    sys.exit(main())
