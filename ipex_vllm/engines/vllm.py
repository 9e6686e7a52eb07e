"""The default engine: upstream vLLM's V1 `AsyncLLM`, with continuous batching and a paged KV cache.

vLLM is imported where it is used: it takes seconds, and its processes must not start before the settings are in place.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from starlette.types import ASGIApp

from ipex_vllm.engines import group, vllm_openai
from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import ContextOverflow, Delta, Generation, InvalidParameter, RequestError
from ipex_vllm.engines.template_bound import bound_templates
from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.engines.vllm_devices import DEVICES, core_process
from ipex_vllm.engines.vllm_failure import check_weights, told_in_one_line
from ipex_vllm.engines.vllm_images import reads_images, with_images, with_placeholders
from ipex_vllm.engines.vllm_imports import import_vllm
from ipex_vllm.engines.vllm_options import add_listed, keep_listing
from ipex_vllm.engines.vllm_pooling import embed
from ipex_vllm.engines.vllm_requests import OutputReader, request_error, sampling_params
from ipex_vllm.engines.vllm_speculation import apply_speculation, check_speculation, no_speculation
from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.low_bit import LOW_BIT_CACHE, OWN_16_BITS, UPSTREAM_KERNELS, quantization_line, vllm_arguments
from ipex_vllm.machine.facts import user_cache
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan.plan import Demands, Plan, context_line

logger = logging.getLogger(__name__)

NO_TEXT = "This worker's model gives embeddings and scores, no text. Ask /worker_get_embeddings or /v1/embeddings."
NO_EMBEDDINGS = "This worker's model gives no embeddings. Start one that does with --runner pooling."
HEALTH_INTERVAL_S = 0.5
FITTED_CONTEXT = -1  # what vLLM makes of `--max-model-len auto`

# Two values of --dtype, by PyTorch's usual names.
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
# Values of --load-format that read a model directory's own files; others bring files of their own, or none.
CHECKPOINT_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")

# Without --verbose, and where the user has not said otherwise.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    "TORCH_LOGS": "-all",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class VllmEngine(Engine):
    name = "vLLM"
    reads_gguf = True

    def __init__(self, llm: Any, args: argparse.Namespace) -> None:
        self._llm = llm
        self._args = args
        self._tasks: tuple[str, ...] = ()  # what the model is for, in vLLM's words
        self._models: Any = None  # of vLLM's application, which loads adapters
        self._statistics: asyncio.Task[None] | None = None
        self._group = join_group(args) if args.nnodes > 1 else None
        self._encoder = PromptEncoder(self.tokenizer, self.context_length)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Every option of vLLM's engine under vLLM's own name, in vLLM's own groups, and of its front end."""
        import_vllm()
        from vllm.engine.arg_utils import AsyncEngineArgs

        own = {action.dest for action in parser._actions}
        AsyncEngineArgs.add_cli_args(parser)
        vllm_openai.add_front_end_arguments(parser)
        parser.set_defaults(model=None)
        keep_listing(parser, own)

    @classmethod
    def quiet(cls) -> None:
        super().quiet()
        logging.getLogger("vllm").setLevel(logging.ERROR)  # until vLLM configures it
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)

    @classmethod
    def add_listed_arguments(cls, parser: argparse.ArgumentParser) -> bool:
        return add_listed(parser)

    @classmethod
    def check(cls, options: WorkerOptions, args: argparse.Namespace) -> None:
        if args.model is not None:
            raise OptionError("--model: the model is given with --model-path")
        check_speculation(options, args)
        if args.lora_modules and not args.enable_lora:
            raise OptionError("--lora-modules asks for --enable-lora")
        if args.enable_lora and not options.openai:
            raise OptionError("--enable-lora: adapters belong to the OpenAI API: leave --no-openai out")
        if options.low_bit_cache is not None and options.low_bit is None:
            raise OptionError("--low-bit-cache keeps what --low-bit makes of the weights: give that, too")
        try:
            wishes = (options.low_bit_head, options.low_bit_outer)
            vllm_arguments(options.low_bit, options.model_path, options.device, *wishes)
        except ValueError as error:
            raise OptionError(f"--low-bit: {error}") from error

    @classmethod
    def demands(cls, args: argparse.Namespace) -> Demands:
        return Demands(
            num_ranks=max(1, args.tensor_parallel_size * args.pipeline_parallel_size // args.nnodes),
            num_hosts=args.nnodes,
            num_stages=args.pipeline_parallel_size,
            dtype=None if args.dtype == "auto" else DTYPE_ALIASES.get(args.dtype, args.dtype),
            max_model_len=None if args.max_model_len == FITTED_CONTEXT else args.max_model_len,
            has_adapters=args.enable_lora,
            reads_checkpoint=args.load_format in CHECKPOINT_FORMATS,
            no_speculation=no_speculation(args),
            takes_own_16_bits=True,
        )

    @classmethod
    async def start(cls, plan: Plan) -> VllmEngine:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from ipex_vllm.engines.vllm_drafts import choose_scheduler

        if current_platform.device_type != plan.device:
            raise EngineError(
                f"--device {plan.device}: the installed vLLM runs on {current_platform.device_type or 'no device'}. "
                f"{DEVICES[plan.device].advice}"
            )
        bound_templates()
        args = argparse.Namespace(**vars(plan.engine_args))
        args.model = plan.model_path
        args.served_model_name = list(plan.names)
        apply_low_bit(args, plan)
        apply_speculation(args, plan)
        apply_plan(args, plan)
        DEVICES[plan.device].prepare(args, plan)
        if plan.serves_openai:
            vllm_openai.prepare(args, plan.model_path)
        if args.load_format in CHECKPOINT_FORMATS:
            check_weights(Path(plan.model_path))
        with told_in_one_line(Path(plan.model_path)):
            engine_args = AsyncEngineArgs.from_cli_args(args)
            if args.nnodes > 1:
                group.choose_interface(args.master_addr)
            if args.node_rank > 0:
                follow(engine_args)
            config = engine_args.create_engine_config(UsageContext.ENGINE_CONTEXT)
            if plan.device == "cpu" and (
                line := quantization_line(config.model_config.quantization, plan.upstream_kernels)
            ):
                logger.info("%s", line)
            whole = config.model_config.max_model_len
            choose_scheduler(config, plan)
            log_choices = {name: vars(args)[name] for name in ("enable_log_requests", "disable_log_stats")}
            with core_process(config):
                engine = cls(AsyncLLM.from_vllm_config(config, **log_choices), args)
            engine._tasks = await engine._llm.get_supported_tasks()
        if plan.context is None and engine.context_length < whole:  # which only vLLM could know
            logger.info("%s", context_line(engine.context_length, whole, plan.kv_cache_bytes * len(plan.rank_cores)))
        return engine

    @property
    def context_length(self) -> int:
        return int(self._llm.model_config.max_model_len)

    @property
    def adapters(self) -> tuple[str, ...]:
        return () if self._models is None else tuple(self._models.lora_requests)

    @property
    def reads_images(self) -> bool:
        return reads_images(self._llm)

    @property
    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    async def count_tokens(self, prompt: str) -> int:
        return len(await self._encoder.encode(prompt))

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        if "generate" not in self._tasks:
            raise InvalidParameter(NO_TEXT)
        if generation.images:
            marked = with_placeholders(self._llm, generation.prompt, len(generation.images))
            generation = replace(generation, prompt=marked)
        token_ids = await self._encoder.encode_for_generation(generation)
        try:
            prompt = tokens_input(token_ids)
            if generation.images:
                prompt = await with_images(self._llm, token_ids, generation.images)
                token_ids = prompt["prompt_token_ids"]
                if len(token_ids) >= self.context_length:
                    raise ContextOverflow(len(token_ids), self.context_length)
            reader = OutputReader(generation, token_ids, self.tokenizer)
            params = sampling_params(generation, self.context_length - len(token_ids))
            adapter = None if self._models is None else self._models.lora_requests.get(generation.model)
            outputs = self._llm.generate(prompt, params, request_id, lora_request=adapter)
            async with contextlib.aclosing(outputs):  # closing it aborts the request
                async for output in outputs:
                    for delta in reader.deltas(output):
                        yield delta
        except RequestError:
            raise
        except Exception as error:
            is_clients = isinstance(error, (ValueError, VLLMClientError))  # vLLM's own check of a request
            raise request_error(error, is_clients, self._llm.errored) from error

    async def warm_up(self) -> None:
        if "generate" in self._tasks:
            await super().warm_up()
        elif "embed" in self._tasks:
            await self.embed(["Hello"])

    async def embed(self, inputs: Sequence[str]) -> tuple[list[list[float]], int]:
        if "embed" not in self._tasks:
            raise InvalidParameter(NO_EMBEDDINGS)
        return await embed(self._llm, self._encoder, inputs)

    async def openai_application(self) -> ASGIApp:
        application, self._statistics = await vllm_openai.make_application(self._llm, self._args)
        self._models = application.state.openai_serving_models
        return application

    async def wait_dead(self) -> str:
        while not self._llm.errored:
            if self._group is not None and (loss := self._group.loss()) is not None:
                return loss
            await asyncio.sleep(HEALTH_INTERVAL_S)
        return "the vLLM engine process died; its own log lines above say why"

    async def stop(self) -> None:
        if self._statistics is not None:
            self._statistics.cancel()
        if self._llm.output_handler is not None:  # it would report the engine's orderly end as a failure
            self._llm.output_handler.cancel()
        # It joins the engine's processes, which takes a moment.
        await asyncio.to_thread(self._llm.shutdown)


def follow(engine_args: Any) -> NoReturn:
    """Compute for the worker with --node-rank 0, which has clients and scheduler, until a signal or an end."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor = MultiprocExecutor(engine_args.create_engine_config(headless=True), monitor_workers=False)
    logger.info("ready: host %d of %d, for %s", engine_args.node_rank, engine_args.nnodes, engine_args.master_addr)
    hosts = join_group(engine_args)
    own = threading.Thread(target=executor.start_worker_monitor, kwargs={"inline": True}, daemon=True)
    own.start()
    while own.is_alive():
        if (loss := hosts.loss()) is not None:
            executor.shutdown()
            raise EngineError(loss)
        own.join(HEALTH_INTERVAL_S)
    raise EngineError("a process of this host has ended; its own log lines above say why")


def join_group(args: Any) -> group.Group:
    return group.join(args.master_addr, args.master_port, args.node_rank, args.nnodes)


def apply_low_bit(args: argparse.Namespace, plan: Plan) -> None:
    """Turn the weights' format into vLLM's own arguments."""
    chosen = vllm_arguments(plan.low_bit, plan.model_path, plan.device, plan.low_bit_head, plan.low_bit_outer)
    # What the user tells vLLM's plugins stays, beside our wishes.
    own = {UPSTREAM_KERNELS: plan.upstream_kernels, OWN_16_BITS: plan.own_16_bits}
    wishes = {**chosen.pop("additional_config", {}), **{name: True for name, wish in own.items() if wish}}
    args.additional_config = {**args.additional_config, **wishes}
    for name, value in chosen.items():
        setattr(args, name, value)
    if plan.low_bit_cache is not None:
        os.environ[LOW_BIT_CACHE] = plan.low_bit_cache or str(user_cache() / "low-bit")
    else:
        os.environ.pop(LOW_BIT_CACHE, None)


def apply_plan(args: argparse.Namespace, plan: Plan) -> None:
    """Hand the plan to vLLM, except where the user already said something to vLLM itself."""
    is_sized = args.kv_cache_memory_bytes is not None or "VLLM_CPU_KVCACHE_SPACE" in os.environ
    if not is_sized and not plan.is_kv_cache_estimated:
        args.kv_cache_memory_bytes = plan.kv_cache_bytes
    if plan.memory_share is not None:
        # vLLM measures the rest on the card, but refuses to start when less is free than its default share.
        args.gpu_memory_utilization = min(args.gpu_memory_utilization, plan.memory_share)
    args.enforce_eager = args.enforce_eager or not plan.use_compile
    if args.max_model_len is None:
        args.max_model_len = FITTED_CONTEXT
