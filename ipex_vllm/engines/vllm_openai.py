"""vLLM's own application for OpenAI's API, over a client of the engine that takes its turn for each request.

It serves what vLLM serves for the model: chat, completions, Responses, Anthropic's messages, tools, structured output,
embeddings, scores, adapters. Mounted, it has no lifespan of its own: what that would do is done here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import types
from collections.abc import AsyncGenerator, Callable
from dataclasses import fields
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ipex_vllm.engines.bounds import check_logprobs, check_stops, shown
from ipex_vllm.engines.generation import InternalError, InvalidParameter
from ipex_vllm.engines.turns import Turn, current_turn
from ipex_vllm.engines.vllm_openai_errors import refusal, tell_errors
from ipex_vllm.engines.vllm_parsers import choose_parsers, register_forced_calls
from ipex_vllm.engines.vllm_requests import draft_counts
from ipex_vllm.errors import EngineError, OptionError, root_cause

logger = logging.getLogger(__name__)

# Fields of vLLM's FrontendArgs that are not options here: the worker listens, answers for TLS and tokens, logs requests
# and gives them ids, in its own way for every path.
OURS = {
    "host",
    "port",
    "uds",
    "grpc_port",
    "root_path",
    "api_key",
    "sse_keep_alive_interval",
    "enable_request_id_headers",
    "disable_fastapi_docs",
    "enable_offline_docs",
    "disable_access_log_for_endpoints",
    "disable_uvicorn_access_log",
}
OUR_PREFIXES = ("ssl_", "enable_ssl_", "uvicorn_", "h11_", "data_parallel_supervisor_", "dp_supervisor_")


def add_front_end_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of vLLM's front end under vLLM's own names, less those that collide with the worker's."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    theirs = argparse.ArgumentParser(add_help=False)
    FrontendArgs.add_cli_args(theirs)
    group = parser.add_argument_group("OpenAI API", "vLLM's front end, which serves it.")
    for action in theirs._actions:
        if action.dest not in OURS and not action.dest.startswith(OUR_PREFIXES):
            group._add_action(action)


def prepare(args: argparse.Namespace, model_path: str) -> None:
    """Complete the front end's arguments before the engine starts. Raises OptionError."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs, validate_parsed_serve_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    defaults = FrontendArgs()
    for field in fields(FrontendArgs):
        if not hasattr(args, field.name):
            setattr(args, field.name, getattr(defaults, field.name))
    args.disable_fastapi_docs = True
    for plugin, read in (
        (args.tool_parser_plugin, ToolParserManager.import_tool_parser),
        (args.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
    ):
        if plugin:
            read(plugin)
    for flag, parser, known in (
        ("--tool-call-parser", args.tool_call_parser, ToolParserManager.list_registered()),
        ("--reasoning-parser", args.reasoning_parser, ReasoningParserManager.list_registered()),
    ):
        if parser and parser not in known:
            raise OptionError(f"{flag} {parser}: there is no such parser; vLLM has {', '.join(sorted(known))}")
    if args.enable_auto_tool_choice and not args.tool_call_parser:
        raise OptionError("--enable-auto-tool-choice asks for --tool-call-parser")
    try:
        validate_parsed_serve_args(args)
    except ValueError as error:
        raise OptionError(f"--chat-template: {root_cause(error)}") from error
    apply_parsers(args, model_path)


def apply_parsers(args: argparse.Namespace, model_path: str) -> None:
    """The parsers of the model's family, where the user has named none."""
    if args.tool_call_parser or args.reasoning_parser:
        return
    chosen = choose_parsers(model_path)
    args.enable_auto_tool_choice = True  # without it vLLM has no parser, for calls that are forced either
    args.tool_call_parser = chosen.tools or register_forced_calls()
    if chosen.tools is None and args.tool_strict_level == "auto":
        args.tool_strict_level = "parameter"  # a model that is not shown its tools can fill in a schema alone
    args.reasoning_parser = chosen.reasoning or ""
    logger.info("parsers: %s", chosen)


async def make_application(llm: Any, args: argparse.Namespace) -> tuple[FastAPI, asyncio.Task[None]]:
    """The application, and the task that logs vLLM's statistics, to be cancelled. Raises EngineError."""
    from vllm import envs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.gc_utils import freeze_gc_heap

    args.structured_outputs_config = llm.vllm_config.structured_outputs_config
    client = TurnTakingClient(llm)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers.copy()
    try:
        tasks = await llm.get_supported_tasks()
        await llm.reset_mm_cache()  # what the memory profile left in it
        app = build_app(args, tasks, llm.model_config)
        await init_app_state(client, app.state, args, tasks)
    except Exception as error:
        logger.debug("vLLM's application could not be made", exc_info=True)
        raise EngineError(
            f"vLLM's OpenAI API could not start (--no-openai leaves it out): {root_cause(error)}"
        ) from error
    finally:  # one of the packages that it is made of configures logging for the whole process
        root.setLevel(level)
        root.handlers[:] = handlers
    app.add_api_route("/v1/models/{name:path}", show_model)
    tell_errors(app)
    app.middleware_stack = app.build_middleware_stack()  # the same package has built it already, without the handler
    # vLLM's error handler tells its server to exit when the engine has died, which the worker sees by itself.
    app.state.server = types.SimpleNamespace(should_exit=False)

    async def log_statistics() -> None:
        while True:
            await asyncio.sleep(envs.VLLM_LOG_STATS_INTERVAL)
            await llm.do_log_stats()

    freeze_gc_heap()
    return app, asyncio.create_task(log_statistics())


async def show_model(request: Request, name: str) -> Response:
    """OpenAI's question after one model, which vLLM 0.32 has no answer for."""
    models = await request.app.state.openai_serving_models.show_available_models()
    for model in models.data:
        if model.id == name:
            return JSONResponse(model.model_dump())
    served = ", ".join(model.id for model in models.data)
    return refusal(request, 404, f"The model {shown(name)} is not served here; {served} is.", "model")


class TurnTakingClient:
    """vLLM's client of the engine, as its application knows it, whose requests begin in their turn and are counted."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    @property
    def dead_error(self) -> BaseException:
        from vllm.exceptions import RetryableRequestError

        told = "The engine has died and the worker is restarting. Send the request again later."
        error: BaseException = RetryableRequestError(told)
        return error

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        turn = current_turn.get()
        num_prompt_tokens = len(prompt.get("prompt_token_ids", ()))
        check_bounds(sampling_params, num_prompt_tokens)
        most_tokens = sampling_params.n * (sampling_params.max_tokens or 0)
        await turn.begin(self._text_of(prompt), num_prompt_tokens + most_tokens)
        counter = Counter(turn, sampling_params)
        with self._told(turn):
            async with contextlib.aclosing(
                self._llm.generate(prompt, sampling_params, request_id, **options)
            ) as outputs:
                async for output in outputs:
                    counter.add(output)
                    yield output

    async def encode(
        self, prompt: Any, pooling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        turn = current_turn.get()
        await turn.begin(self._text_of(prompt), len(prompt.get("prompt_token_ids", ())))
        with self._told(turn):
            async with contextlib.aclosing(self._llm.encode(prompt, pooling_params, request_id, **options)) as outputs:
                async for output in outputs:
                    if output.finished:
                        turn.count(len(output.prompt_token_ids), 0, "stop", None)
                    yield output

    @contextlib.contextmanager
    def _told(self, turn: Turn) -> Any:
        """Notes what fails; a dead engine is told as what it is to the client."""
        from vllm.exceptions import VLLMServerError

        try:
            yield
        except VLLMServerError as error:
            turn.fail(InternalError(root_cause(error)))
            if self._llm.errored:
                raise self.dead_error from error
            raise

    def _text_of(self, prompt: Any) -> Callable[[], str]:
        def text() -> str:
            given = prompt.get("prompt") if isinstance(prompt, dict) else None
            token_ids = prompt.get("prompt_token_ids", []) if isinstance(prompt, dict) else []
            return str(given or self._llm.get_tokenizer().decode(token_ids))

        return text


def check_bounds(params: Any, prompt_tokens: int) -> None:
    """Raise vLLM's error for a client's mistake where a request asks for more than it may of any protocol."""
    from vllm.exceptions import VLLMValidationError

    try:
        check_stops(params.stop or (), params.stop_token_ids or ())
        check_logprobs(params.n, params.logprobs, params.max_tokens or 0)
        check_logprobs(1, params.prompt_logprobs, prompt_tokens)
    except InvalidParameter as error:
        raise VLLMValidationError(str(error)) from error


class Counter:
    """Counts the tokens of one request to the engine, by outputs of any kind."""

    def __init__(self, turn: Turn, sampling_params: Any) -> None:
        from vllm.sampling_params import RequestOutputKind

        self._turn = turn
        self._holds_all = sampling_params.output_kind is RequestOutputKind.CUMULATIVE
        self._counted: dict[int, int] = {}
        self._has_prompt = False

    def add(self, output: Any) -> None:
        prompt_tokens = 0 if self._has_prompt else len(output.prompt_token_ids or ())
        self._has_prompt = True
        num_tokens, finish_reason = 0, None
        for completion in output.outputs:
            before = self._counted.get(completion.index, 0) if self._holds_all else 0
            self._counted[completion.index] = len(completion.token_ids)
            num_tokens += len(completion.token_ids) - before
            finish_reason = completion.finish_reason or finish_reason
            if completion.finish_reason is not None:
                self._turn.count_drafts(*draft_counts(completion))
        # The engine's clock is this machine's; without statistics it tells no time.
        first_token_at = getattr(output.metrics, "first_token_ts", None) or None
        self._turn.count(prompt_tokens, num_tokens, finish_reason, first_token_at)
