"""A model's compiled code, without a start that waits for it.

vLLM compiles a model before it takes a request, or reads what an earlier start has kept, and then has its largest batch
computed. Here nobody computes that batch. Where no code is kept, a fork of the engine makes it, which has its weights
and its imports; steps run the model eagerly until a thread has read what the fork has kept.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from vllm import envs
from vllm.compilation import decorators
from vllm.compilation.counter import compilation_counter
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig
from vllm.utils.system_utils import set_process_title
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from ipex_vllm.lifetime import die_with_parent
from ipex_vllm.low_bit import COMPILE_BESIDE

# The worker's own, which an engine core that is a fork of it has as well.
logger = logging.getLogger(__name__)

# Reading code is seconds of Python, most of them PyTorch's compiler being imported. A step, which gives Python's lock
# away in each of its hundreds of operators, gets it back after so many seconds instead of 0.005.
SWITCH_INTERVAL_S = 0.0002

# PyTorch's own, in whose place vLLM puts a function that does nothing.
set_num_threads = torch._C.set_num_threads

load = decorators._try_load_aot_compiled_fn
make = TorchCompileWithNoGuardsWrapper.aot_compile
warm_up = CPUModelRunner.warming_up_model


class NothingToCompute(Exception):
    """Ends a warm-up where its batch would be computed."""


def mend() -> None:
    """Of the models that are opened from now on; a second call changes nothing."""
    CPUModelRunner.warming_up_model = warm_up_without_a_batch
    decorators._try_load_aot_compiled_fn = load_in_warm_up
    TorchCompileWithNoGuardsWrapper.aot_compile = make_beside


class WarmUp:
    """Whether vLLM's warm-up runs, and for the one compiled model alone."""

    is_running = False

    @classmethod
    def end(cls, model: Any, code: Any) -> None:
        """Have `model` computed by `code` from now on; a warm-up has nothing left to do. Raises NothingToCompute."""
        model.was_aot_compile_fn_loaded_from_disk = True  # or vLLM would save it
        if cls.is_running:
            model.aot_compiled_fn = code
            raise NothingToCompute


def warm_up_without_a_batch(self: Any) -> None:
    """vLLM's `warming_up_model`, where no other rank and no draft takes part and the KV cache's size is known."""
    config: VllmConfig = self.vllm_config
    drafts = config.speculative_config
    WarmUp.is_running = (
        config.cache_config.kv_cache_memory_bytes is not None
        and config.parallel_config.world_size_across_dp == 1
        and (drafts is None or drafts.method == "custom_class")
        and compilation_counter.num_models_seen == 1
    )
    try:
        warm_up(self)
    except NothingToCompute:
        self.encoder_cache.clear()
    finally:
        WarmUp.is_running = False


def load_in_warm_up(model: Any, path: str) -> Any:
    """vLLM's function for code that is kept at `path`; None where there is none, or another version's."""
    code = load(model, path)
    if code is not None:
        WarmUp.end(model, code)
    return code


def make_beside(model: Any, *arguments: Any, **options: Any) -> Any:
    """vLLM's `aot_compile`: the code of a model, for these arguments of its first call."""
    if not WarmUp.is_running or COMPILE_BESIDE not in os.environ or envs.VLLM_DISABLE_COMPILE_CACHE:
        return make(model, *arguments, **options)
    child = os.fork()
    if child == 0:
        make_and_exit(model, arguments, options)
    logger.info("compiling beside the service: steps are slower until that is done, for a minute or so")
    WarmUp.end(model, CodeToCome(model, child))


def make_and_exit(model: Any, arguments: Any, options: Any) -> NoReturn:
    """Compile and keep the code, in a process of its own."""
    status = 1
    try:
        die_with_parent()
        set_process_title("Compiler")
        # OpenMP has bound the thread that was forked to one core, where steps go on. The others are its other threads'.
        tasks = Path(f"/proc/{os.getppid()}/task").iterdir()
        cores = set[int]().union(*(os.sched_getaffinity(int(task.name)) for task in tasks))
        os.sched_setaffinity(0, cores - os.sched_getaffinity(0) or cores)
        model.aot_compiled_fn = make(model, *arguments, **options)
        model.save_aot_compiled_function()
        status = 0
    except Exception:
        logger.exception("the model was not compiled")
    finally:
        os._exit(status)


class CodeToCome:
    """What computes a model until the process `child` has made its code, and kept it: the model itself, eagerly.

    With a thread less, whose core is the compiler's: the threads of each operator wait for each other, and sharing a
    core with the compiler made steps fifteen times as long, while all that they leave of it was too little for that.
    """

    def __init__(self, model: Any, child: int) -> None:
        self._num_threads = torch.get_num_threads()
        set_num_threads(max(self._num_threads - 1, 1))
        self._code: Any = None
        self._is_over = False
        self._has_computed = threading.Event()
        threading.Thread(target=self._get, args=(model, child), daemon=True).start()

    def __call__(self, model: Any, *arguments: Any, **options: Any) -> Any:
        is_over = self._is_over
        compute = self._code or type(model).forward
        result = compute(model, *arguments, **options)
        self._has_computed.set()
        if is_over:
            # Not earlier: attention was planned for this step's number of threads.
            set_num_threads(self._num_threads)
            model.aot_compiled_fn = compute
        return result

    def _get(self, model: Any, child: int) -> None:
        started = time.monotonic()
        _, status = os.waitpid(child, 0)
        took = time.monotonic() - started
        self._has_computed.wait()  # until then the engine starts, by settings that reading changes for a while
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._code = load(model, model._aot_compilation_path) if status == 0 else None
        sys.setswitchinterval(interval)
        self._is_over = True
        if self._code is None:
            logger.warning("steps stay eager, since the model was not compiled; --compile says why before it serves")
        else:
            logger.info("compiled beside the service in %.0f s: steps are faster now", took)
