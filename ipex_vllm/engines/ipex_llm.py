"""ipex-llm's own engine: `IPEXLLMAsyncLLMEngine`, which is vLLM 0.6.6's V0 engine with ipex-llm's low-bit layers.

It runs in an environment of its own, which `make env-ipex-llm` builds. docs/engines.md lists the differences from the
default engine that a client can see.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import Delta, Generation, RequestError
from ipex_vllm.engines.older_transformers import readable_model
from ipex_vllm.engines.template_bound import bound_templates
from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.engines.vllm_devices import thread_binding
from ipex_vllm.engines.vllm_requests import OutputReader, request_error, sampling_params
from ipex_vllm.errors import EngineError, OptionError, root_cause
from ipex_vllm.lifetime import die_with_parent
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.options import Device, WorkerOptions
from ipex_vllm.plan.plan import Demands, Plan

logger = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 0.5

DTYPE_FORMATS = {row.name: row.dtype for row in FORMATS.values() if row.kind == "dtype" and row.dtype}
CPU_FORMATS = ("sym_int4", "asym_int4", "sym_int5", "asym_int5", "sym_int8")
DEVICE_FORMATS: dict[Device, tuple[str, ...]] = {
    "cpu": CPU_FORMATS,
    "xpu": (*CPU_FORMATS, "nf3", "nf4", "fp4", "fp8", "fp8_e4m3", "fp8_e5m2"),
}


class IpexLlmEngine(Engine):
    name = "ipex-llm"

    def __init__(self, llm: Any, model_copy: tempfile.TemporaryDirectory[str]) -> None:
        self._llm = llm
        self._model_copy = model_copy
        self._encoder = PromptEncoder(self.tokenizer, self.context_length)

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
    def check(cls, options: WorkerOptions, args: argparse.Namespace) -> None:
        if args.model is not None:
            raise OptionError("--model: the model is given with --model-path")
        for flag, wish in (("--low-bit-head", options.low_bit_head), ("--low-bit-outer", options.low_bit_outer)):
            if wish is not None:
                raise OptionError(f"{flag}: with --engine ipex-llm all layers have one format")
        if options.low_bit_cache is not None:
            raise OptionError("--low-bit-cache: what the default engine, vLLM's, keeps")
        if options.upstream_kernels:
            raise OptionError("--upstream-kernels: a choice of the default engine, vLLM's")
        formats = [*DTYPE_FORMATS, *DEVICE_FORMATS[options.device]]
        if options.low_bit not in (None, *formats):
            raise OptionError(
                f"--low-bit {options.low_bit}: on {options.device}, --engine ipex-llm has {', '.join(formats)}"
            )

    @classmethod
    def demands(cls, args: argparse.Namespace) -> Demands:
        return Demands(
            num_ranks=args.tensor_parallel_size * args.pipeline_parallel_size,
            num_stages=args.pipeline_parallel_size,
            dtype=None if args.dtype == "auto" else args.dtype,
            max_model_len=args.max_model_len,
        )

    @classmethod
    async def start(cls, plan: Plan) -> IpexLlmEngine:
        args = argparse.Namespace(**vars(plan.engine_args))
        args.device = plan.device
        low_bit, args.dtype = choose_low_bit(plan.low_bit, args.dtype)
        model_copy = tempfile.TemporaryDirectory(prefix="ipex-vllm-")
        args.model = readable_model(plan.model_path, Path(model_copy.name))
        args.served_model_name = list(plan.names)
        prepare_process(plan)
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs

            bound_templates()
            engine_class = importlib.import_module(f"ipex_llm.vllm.{plan.device}.engine").IPEXLLMAsyncLLMEngine
            if plan.context is not None:
                args.max_model_len = plan.context
            engine_args = AsyncEngineArgs.from_cli_args(args)
            config = engine_args.create_engine_config()
            if plan.device == "cpu" and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
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

    async def count_tokens(self, prompt: str) -> int:
        return len(await self._encoder.encode(prompt))

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        # One choice after the other: with several, vLLM 0.6.6 streams until the first one ends and drops the others'.
        for index in range(generation.n):
            seed = None if generation.seed is None else generation.seed + index
            choice = self._stream_choice(replace(generation, n=1, seed=seed), f"{request_id}-{index}")
            async with contextlib.aclosing(choice) as deltas:
                async for delta in deltas:
                    yield replace(delta, index=index)

    async def _stream_choice(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        token_ids = await self._encoder.encode_for_generation(generation)
        reader = OutputReader(generation, token_ids, self.tokenizer)
        try:
            params = sampling_params(generation, self.context_length - len(token_ids))
            outputs = self._llm.generate({"prompt_token_ids": token_ids}, params, request_id)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    for delta in reader.deltas(output):
                        yield delta
        except RequestError:
            raise
        except Exception as error:
            raise request_error(error, isinstance(error, ValueError), self._llm.errored) from error
        finally:
            if self._llm.is_running:  # closing the generator is not enough here; on a finished request this is a no-op
                await self._llm.abort(request_id)

    async def wait_dead(self) -> str:
        while True:
            try:
                await self._llm.check_health()
            except Exception as error:  # it says so by raising, and not always the same
                self._end_what_was_not_begun(error)
                return f"ipex-llm's engine died: {root_cause(error)}; its own log lines above say why"
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _end_what_was_not_begun(self, error: Exception) -> None:
        """Tell requests that the next step would have taken up: a vLLM 0.6.6 that dies tells only those that run."""
        waiting = self._llm._request_tracker._new_requests
        while not waiting.empty():
            stream, _ = waiting.get_nowait()
            stream.finish(exception=error)

    async def stop(self) -> None:
        self._llm.shutdown_background_loop()
        await asyncio.to_thread(self._llm.engine.model_executor.shutdown)
        self._model_copy.cleanup()


class _WithoutDevice:
    """A parser for vLLM's options that passes over the one the worker has under the same name."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def add_argument(self, *flags: str, **keywords: Any) -> None:
        if "--device" not in flags:
            self._parser.add_argument(*flags, **keywords)


def choose_low_bit(low_bit: str | None, dtype: str) -> tuple[str | None, str]:
    """ipex-llm's name for a format, None for weights as they are; and vLLM's dtype, which is `dtype` unless named."""
    named = DTYPE_FORMATS.get(low_bit or "")
    return (low_bit, dtype) if named is None else (None, named)


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
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", thread_binding(plan))
    os.environ["VLLM_PLUGINS"] = ""  # this package's plugin is for the current vLLM
    # ipex-llm asks the first pip in PATH which vLLM is installed.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # vLLM 0.6.6 forks its worker, which would outlive a killed parent and keep its port.
    os.register_at_fork(after_in_child=die_with_parent)
