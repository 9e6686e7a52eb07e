"""A model's compiled code, without a start that waits for it.

vLLM compiles a model before it takes a request, and then has its largest batch computed, by new code or by what an
earlier start has kept. Here nobody computes that batch. Code that has to be made is made by a fork of the engine, which
has its weights and its imports, and steps run the model eagerly until it is there.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from vllm import envs
from vllm.compilation import decorators
from vllm.compilation.counter import compilation_counter
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.system_utils import set_process_title
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from ipex_vllm.lifetime import die_with_parent
from ipex_vllm.low_bit import COMPILE_BESIDE

# vLLM configures the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")

# Beside steps that keep all cores busy the compiler has a quarter of one, and whatever they leave.
COMPILER_NICENESS = 5
# Reading the code takes a second or two of Python, in which no step goes on: that waits for so long a pause between
# steps, and for one at most so long.
PAUSE_S = 1.0
NO_PAUSE_S = 10.0

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
    # Only Intel's OpenMP can be forked once it has computed.
    can_fork = "libiomp5.so" in Path("/proc/self/maps").read_text()
    if not (WarmUp.is_running and COMPILE_BESIDE in os.environ and can_fork) or envs.VLLM_DISABLE_COMPILE_CACHE:
        return make(model, *arguments, **options)
    child = os.fork()
    if child == 0:
        make_and_exit(model, arguments, options)
    WarmUp.end(model, CodeToCome(model, child))


def make_and_exit(model: Any, arguments: Any, options: Any) -> NoReturn:
    """Compile and keep the code, in a process of its own."""
    status = 1
    try:
        die_with_parent()
        set_process_title("Compiler")
        os.nice(COMPILER_NICENESS)
        # OpenMP has bound the thread that was forked to one core.
        tasks = Path(f"/proc/{os.getppid()}/task").iterdir()
        os.sched_setaffinity(0, set[int]().union(*(os.sched_getaffinity(int(task.name)) for task in tasks)))
        model.aot_compiled_fn = make(model, *arguments, **options)
        model.save_aot_compiled_function()
        status = 0
    except Exception:
        logger.exception("the model was not compiled")
    finally:
        os._exit(status)


class CodeToCome:
    """What computes a model until the process `child` has compiled it: the model itself, eagerly."""

    def __init__(self, model: Any, child: int) -> None:
        self._code: Any = None
        self._last_step: float | None = None
        logger.info("compiling beside the service: steps are eager until that is done, slower for up to a minute")
        threading.Thread(target=self._wait, args=(model, child), daemon=True).start()

    def __call__(self, model: Any, *arguments: Any, **options: Any) -> Any:
        if self._code is None:
            result = model.forward(*arguments, **options)
            self._last_step = time.monotonic()
            return result
        model.aot_compiled_fn = self._code
        return self._code(model, *arguments, **options)

    def _wait(self, model: Any, child: int) -> None:
        started = time.monotonic()
        _, status = os.waitpid(child, 0)
        made = time.monotonic()
        while not self._is_pausing(time.monotonic() - made):
            time.sleep(PAUSE_S / 10)
        code = load(model, model._aot_compilation_path) if status == 0 else None
        if code is None:
            logger.warning("steps stay eager, since the model was not compiled; --compile says why before it serves")
            return
        logger.info("compiled beside the service in %.0f s: steps are faster from now on", made - started)
        self._code = code

    def _is_pausing(self, waited: float) -> bool:
        """Whether the engine has computed its first step, and then none for a while, or for long without a pause."""
        if self._last_step is None:
            return False
        return waited > NO_PAUSE_S or time.monotonic() - self._last_step > PAUSE_S
