"""What loading a model takes: `python -m benchmarks.low_bit_load --model-path DIR [--formats bf16 sym_int4]`.

Each format is loaded in a process of its own by upstream vLLM on all cores of this machine, eagerly and without its
HTTP server. Figures are resident memory (RSS, with the pages of the checkpoint that are mapped) before loading, at its
peak and afterwards, and the wall time, all of the one step that builds the model and reads and quantizes the weights.
Prints a line per format and, as the last line of its output, the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

from vllm import LLM
from vllm.v1.worker.cpu_worker import CPUWorker

from benchmarks.machine import describe_machine
from ipex_vllm.low_bit import vllm_arguments

GIB = 1 << 30


def resident() -> tuple[int, int]:
    """This process' RSS now and at its highest since `forget_peak`, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(lines[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class MeasuredWorker(CPUWorker):  # type: ignore[misc]
    figures: ClassVar[dict[str, Any]] = {}

    def load_model(self, **options: Any) -> None:
        forget_peak()
        self.figures["rss_before"] = resident()[0]
        started = time.perf_counter()
        super().load_model(**options)
        self.figures["seconds"] = time.perf_counter() - started
        self.figures["rss_after"], self.figures["rss_peak"] = resident()


def load(model_path: str, format_name: str) -> dict[str, Any]:
    """Load in this process, which must be a fresh one, and measure."""
    LLM(
        model=model_path,
        worker_cls=f"{MeasuredWorker.__module__}.{MeasuredWorker.__name__}",
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 26,
        gpu_memory_utilization=0.2,
        skip_tokenizer_init=True,
        **{"dtype": "bfloat16", **vllm_arguments(format_name, model_path, "cpu")},
    )
    return {"format": format_name, **MeasuredWorker.figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--formats", nargs="+", default=["bf16", "sym_int4", "asym_int4", "sym_int8", "fp8_e4m3"])
    options = parser.parse_args()
    # vLLM's engine and worker in the measured process, whose memory is then the weights' and little else.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    rows = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for figures in processes.map(load, [options.model_path] * len(options.formats), options.formats):
            rows.append(figures)
            weights, above = figures["rss_after"] - figures["rss_before"], figures["rss_peak"] - figures["rss_after"]
            print(
                f"{figures['format']:10} weights {weights / GIB:.2f} GiB, peak {above / GIB:.2f} GiB above the final "
                f"memory, {figures['seconds']:.1f} s",
                flush=True,
            )
    print(json.dumps({"model": options.model_path, "machine": describe_machine(), "rows": rows}))
    return 0
