"""ipex-llm's own engine: `IPEXLLMAsyncLLMEngine`, which is vLLM 0.6.6's V0 engine with ipex-llm's low-bit layers.

It runs in an environment of its own, which `make env-ipex-llm` builds. What vLLM 0.6.6 shares with the default engine
is inherited from there; docs/engines.md lists the differences that a client can see.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipex_vllm.engines.generation import Delta, Generation
from ipex_vllm.engines.older_transformers import readable_model
from ipex_vllm.engines.vllm import HEALTH_INTERVAL_S, VllmEngine
from ipex_vllm.errors import EngineError, root_cause
from ipex_vllm.options import DTYPES, WorkerOptions
from ipex_vllm.plan.cpu import Plan

logger = logging.getLogger(__name__)

CPU_FORMATS = ("sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8")
FORMATS = {"cpu": CPU_FORMATS, "xpu": (*CPU_FORMATS, "nf3", "nf4", "fp4", "fp8", "fp8_e4m3", "fp8_e5m2")}

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class IpexLlmEngine(VllmEngine):
    name = "ipex-llm"

    def __init__(self, llm: Any, model_copy: tempfile.TemporaryDirectory[str]) -> None:
        super().__init__(llm)
        self._model_copy = model_copy

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Every `AsyncEngineArgs` option of vLLM 0.6.6 but --device, which the worker has. Raises EngineError."""
        if importlib.util.find_spec("ipex_llm") is None:
            raise EngineError(
                "--engine ipex-llm needs an environment of its own: run `make env-ipex-llm`, then start the worker "
                "with .venv-ipex-llm/bin/python"
            )
        from vllm.engine.arg_utils import AsyncEngineArgs

        AsyncEngineArgs.add_cli_args(_WithoutDevice(parser))
        parser.set_defaults(model=None, disable_log_requests=True)

    @classmethod
    async def start(cls, options: WorkerOptions, args: argparse.Namespace, plan: Plan) -> IpexLlmEngine:
        if args.model is not None:
            raise EngineError("--model: the model is given with --model-path")
        low_bit = choose_low_bit(args, options)
        model_copy = tempfile.TemporaryDirectory(prefix="ipex-vllm-")
        args.model = readable_model(options.model_path, Path(model_copy.name))
        args.served_model_name = list(options.names)
        prepare_process(plan)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs

            engine_class = importlib.import_module(f"ipex_llm.vllm.{options.device}.engine").IPEXLLMAsyncLLMEngine
            engine_args = AsyncEngineArgs.from_cli_args(args)
            config = engine_args.create_engine_config()
            if options.device == "cpu" and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                size_kv_cache(config, plan)
            return cls(engine_class.from_engine_args(engine_args, config, load_in_low_bit=low_bit), model_copy)
        except Exception as error:
            logger.debug("ipex-llm's engine could not start", exc_info=True)
            raise EngineError(f"ipex-llm's engine could not start: {root_cause(error)}") from error

    @property
    def context_length(self) -> int:
        return int(self._llm.engine.model_config.max_model_len)

    @property
    def tokenizer(self) -> Any:
        return self._llm.engine.get_tokenizer()

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        # One choice after the other: with several, vLLM 0.6.6 streams until the first one ends and drops the others'.
        for index in range(generation.n):
            seed = None if generation.seed is None else generation.seed + index
            choice = super().stream(replace(generation, n=1, seed=seed), f"{request_id}-{index}")
            async with contextlib.aclosing(choice) as deltas:
                async for delta in deltas:
                    yield replace(delta, index=index)

    async def wait_dead(self) -> str:
        while True:
            try:
                await self._llm.check_health()
            except Exception as error:  # it says so by raising, and not always the same
                return f"ipex-llm's engine died: {root_cause(error)}; its own log lines above say why"
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def stop(self) -> None:
        self._llm.shutdown_background_loop()
        await asyncio.to_thread(self._llm.engine.model_executor.shutdown)
        self._model_copy.cleanup()

    async def _generate(self, token_ids: list[int], params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        outputs = self._llm.generate({"prompt_token_ids": token_ids}, params, request_id)
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
        finally:
            if self._llm.is_running:  # closing the generator is not enough here; on a finished request this is a no-op
                await self._llm.abort(request_id)

    def _is_clients(self, error: Exception) -> bool:
        return isinstance(error, ValueError)


class _WithoutDevice:
    """A parser for vLLM's options that passes over the one the worker has under the same name."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def add_argument(self, *flags: str, **keywords: Any) -> None:
        if "--device" not in flags:
            self._parser.add_argument(*flags, **keywords)


def choose_low_bit(args: argparse.Namespace, options: WorkerOptions) -> str | None:
    """Return ipex-llm's name for --low-bit, None for the weights as they are. Raises EngineError."""
    if options.low_bit_head is not None:
        raise EngineError("--low-bit-head: with --engine ipex-llm the head has the format of the other layers")
    if options.low_bit is None:
        return None
    if options.low_bit in DTYPES:
        args.dtype = DTYPES[options.low_bit]
        return None
    formats = FORMATS[options.device]
    if options.low_bit not in formats:
        raise EngineError(
            f"--low-bit {options.low_bit}: on {options.device}, --engine ipex-llm has {', '.join([*DTYPES, *formats])}"
        )
    return options.low_bit


def size_kv_cache(config: Any, plan: Plan) -> None:
    """Give vLLM's configuration the plan's KV cache, in blocks: its own setting knows whole GiB only."""
    from vllm.worker.cpu_worker import CPUCacheEngine

    cache = config.cache_config
    block_bytes = CPUCacheEngine.get_cache_block_size(
        cache.block_size, cache.cache_dtype, config.model_config, config.parallel_config
    )
    cache.num_gpu_blocks_override = plan.kv_cache_bytes // block_bytes  # on a CPU, "GPU" blocks are in main memory


def prepare_process(plan: Plan) -> None:
    """What vLLM 0.6.6 and ipex-llm read from their process."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, cores)) for cores in plan.rank_cores))
    os.environ["VLLM_PLUGINS"] = ""  # this package's plugin is for the current vLLM
    # ipex-llm asks the first pip in PATH which vLLM is installed.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # vLLM 0.6.6 forks its worker, which would outlive a killed parent and keep its port.
    libc = ctypes.CDLL(None)
    os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
