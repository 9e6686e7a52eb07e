"""A FastChat worker: `python -m ipex_vllm.worker --model-path X --device cpu`.

Reads the options, chooses the settings for this machine, loads the engine, serves, registers with the controller, and
on SIGTERM drains. vLLM spawns processes that import this module again, so importing it starts nothing. It is longer
than other files because it is read as one story: a worker's life in its order.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from ipex_vllm import ports
from ipex_vllm.demo import resolve_model_path
from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import RequestError
from ipex_vllm.engines.load import ENGINES, EngineLoader
from ipex_vllm.errors import EngineError, OptionError, root_cause, run_main
from ipex_vllm.lifetime import die_with_parent, stop_signals
from ipex_vllm.low_bit import gguf_directory
from ipex_vllm.machine.checkpoint import check_files
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import Parser, WorkerOptions, add_options, from_namespace, layered_arguments, model_name
from ipex_vllm.plan.devices import PLANNERS
from ipex_vllm.plan.plan import Plan
from ipex_vllm.plan.speculation import with_speculation
from ipex_vllm.serving import json_bodies
from ipex_vllm.serving.connections import ListeningSocket, quiet_when_full, raise_descriptor_limit
from ipex_vllm.serving.controller import ControllerClient
from ipex_vllm.serving.conversation import check_template_name, choose_chat_format
from ipex_vllm.serving.core import Core
from ipex_vllm.serving.fastchat import FastChatServer
from ipex_vllm.serving.http_server import HttpServer
from ipex_vllm.serving.slots import Slots

logger = logging.getLogger("ipex_vllm.worker")  # __name__ is "__main__" where it matters

STREAMS_END_TIMEOUT_S = 10.0  # for the error frames of requests that a dead engine left behind
LEAVE_TIMEOUT_S = 1.0  # for the controller, at least; it has the drain's time
ENGINE_STOP_TIMEOUT_S = 3.0  # then its processes are killed


def main(arguments: Sequence[str] | None = None, load: EngineLoader | None = None) -> None:
    """Run a worker and exit the process. `load` imports the engine; by default --engine chooses it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for chatty in ("httpx", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    run_main(lambda: run(sys.argv[1:] if arguments is None else arguments, load))


def run(arguments: Sequence[str], load: EngineLoader | None) -> int:
    """Serve until told to stop and return the exit status. Raises OptionError and EngineError."""
    machine = MachineFacts.probe()
    early = own_options(arguments, load)
    if early.preload:
        PLANNERS[early.device].apply(machine)

    engine_class, options, plan = prepare(machine, arguments, load)
    if options.explain:
        return 0
    # Until the server runs, a signal ends the process wherever it is; exit handlers end the engine's processes.
    for signal_number in stop_signals():
        signal.signal(signal_number, lambda number, _: sys.exit(128 + number))
    if not is_loopback(options.host) and options.api_token is None:
        logger.warning("--host %s opens this worker to the network, and no --api-token guards it", options.host)
    raise_descriptor_limit(options.limit_worker_concurrency + options.limit_worker_queue)
    # Bound before the model loads: a port in use is told at once. Nothing listens on it yet.
    with ports.bind(options.host, options.port) as sock:
        os.register_at_fork(after_in_child=sock.close)  # an engine that outlives this process must not hold the port
        return asyncio.run(serve(engine_class, options, plan, sock))


def prepare(
    machine: MachineFacts, arguments: Sequence[str], load: EngineLoader | None
) -> tuple[type[Engine], WorkerOptions, Plan]:
    """Read the options and choose the settings for this machine. Raises OptionError and EngineError."""
    early = own_options(arguments, load)
    engine_class = load_engine(load or ENGINES[early.engine])
    if not early.verbose:
        engine_class.quiet()
    parser = make_parser(load)
    if engine_class.add_listed_arguments(parser):
        # What is wrong, --help and --explain are answered before the model library is imported, which takes long.
        options, engine_args = read_options(engine_class, parser, arguments)
        if options.explain:
            return engine_class, options, choose_plan(engine_class, options, engine_args, machine)
    parser = make_parser(load)
    add_engine_arguments(engine_class, parser)
    options, engine_args = read_options(engine_class, parser, arguments)
    return engine_class, options, choose_plan(engine_class, options, engine_args, machine)


def read_options(
    engine_class: type[Engine], parser: Parser, arguments: Sequence[str]
) -> tuple[WorkerOptions, argparse.Namespace]:
    """The worker's options and the engine's own, checked. Raises OptionError and EngineError."""
    args = parser.parse_args(layered_arguments(parser, arguments))
    if args.model_names is None:
        args.model_names = model_name(args.model_path)
    args.model_path = model_directory(engine_class, resolve_model_path(args.model_path))
    if args.draft_model is not None:
        args.draft_model = model_directory(engine_class, resolve_model_path(args.draft_model), "--draft-model")
    options: WorkerOptions = from_namespace(WorkerOptions, args)
    engine_args = argparse.Namespace(**{name: vars(args)[name] for name in vars(args).keys() - vars(options).keys()})
    check_model_directory(options.model_path)
    if options.draft_model is not None:
        check_model_directory(options.draft_model, "--draft-model")
    if options.conv_template is not None:
        check_template_name(options.conv_template)
    engine_class.check(options, engine_args)
    if engine_class.demands(engine_args).reads_checkpoint and not options.explain:
        check_weight_files(options.model_path)
    if options.draft_model is not None and not options.explain:
        check_weight_files(options.draft_model, "--draft-model")
    return options, engine_args


def choose_plan(
    engine_class: type[Engine], options: WorkerOptions, engine_args: argparse.Namespace, machine: MachineFacts
) -> Plan:
    """The settings for this machine, which are logged. Raises OptionError and EngineError."""
    demands = engine_class.demands(engine_args)
    model = ModelFacts.read(options.model_path)
    if options.draft_model is not None:
        model = model.beside(ModelFacts.read(options.draft_model))
    model = model.share_of(demands.num_hosts)
    planner = PLANNERS[options.device]
    chosen = with_speculation(planner.choose(planner.probe(machine), options, model, demands), options, model, demands)
    plan = replace(chosen, engine_args=engine_args, serves_openai=options.openai, max_stream_gap=options.max_stream_gap)
    for line in plan.lines:
        logger.info("%s", line)
    return plan


def own_options(arguments: Sequence[str], load: EngineLoader | None) -> argparse.Namespace:
    """The worker's own options, before the engine that adds its options is known."""
    parser = make_parser(load, add_help=False)
    return parser.parse_known_args(layered_arguments(parser, arguments, ignore_unknown=True))[0]


def make_parser(load: EngineLoader | None, add_help: bool = True) -> Parser:
    """The worker's own options; an engine adds its own to it."""
    parser = Parser(
        prog="python -m ipex_vllm.worker", allow_abbrev=False, add_help=add_help, usage="%(prog)s [options]"
    )
    group = parser.add_argument_group("worker")
    if load is None:
        group.add_argument("--engine", choices=ENGINES, default="vllm", help="what runs the model")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="options as `name: value` lines; flags and IPEX_VLLM_* win"
    )
    add_options(group, WorkerOptions)
    return parser


def load_engine(load: EngineLoader) -> type[Engine]:
    """Import an engine. Raises EngineError when its model library is not installed."""
    with told_when_not_installed():
        return load()


def add_engine_arguments(engine_class: type[Engine], parser: argparse.ArgumentParser) -> None:
    """Add an engine's options as its model library has them. Raises EngineError when that is not installed."""
    with told_when_not_installed():
        engine_class.add_arguments(parser)


@contextlib.contextmanager
def told_when_not_installed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EngineError(
            f"the engine's model library cannot be imported: {root_cause(error)}; docs/engines.md names what each needs"
        ) from error


def model_directory(engine_class: type[Engine], model_path: str, flag: str = "--model-path") -> str:
    """The directory that stands for a GGUF file, and any other model as it is. Raises OptionError and EngineError."""
    try:
        directory = gguf_directory(model_path)
    except ValueError as error:
        raise EngineError(f"{flag}: {error}") from error
    if directory is None:
        return model_path
    if not engine_class.reads_gguf:
        raise OptionError(f"{flag} {model_path}: GGUF files are read by --engine vllm, not by {engine_class.name}")
    return str(directory)


def check_model_directory(model_path: str, flag: str = "--model-path") -> None:
    """Raise EngineError for a path that holds no model; a name may be one that Hugging Face knows."""
    path = Path(model_path)
    is_path = path.is_absolute() or model_path.startswith((".", "~")) or path.exists()
    if is_path and not (path / "config.json").exists():
        reason = "holds no config.json" if path.exists() else "does not exist"
        if snapshots := sorted(str(config.parent) for config in path.glob("snapshots/*/config.json")):
            raise EngineError(f"{flag} {model_path} is a folder of Hugging Face's cache: give {snapshots[-1]}")
        raise EngineError(f"{flag} {model_path} {reason}: give the directory of a Hugging Face model")
    if is_path:
        try:
            is_object = isinstance(json.loads((path / "config.json").read_text()), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise EngineError(f"{flag}: {path / 'config.json'} is no JSON object: fetch it again")


def check_weight_files(model_path: str, flag: str = "--model-path") -> None:
    """Raise EngineError for a model directory whose weights are not all there."""
    if Path(model_path).is_dir():
        try:
            check_files(Path(model_path))
        except ValueError as error:
            raise EngineError(f"{flag}: {error}") from error


async def serve(engine_class: type[Engine], options: WorkerOptions, plan: Plan, sock: socket.socket) -> int:
    """Load, listen, register; then wait for a signal or the engine's death. Returns the exit status."""
    engine = await engine_class.start(plan)
    try:
        chat_format = choose_chat_format(engine.tokenizer, options.model_path, options.conv_template)
        logger.info("conversation: %s", chat_format.source)
        slots = Slots(options.limit_worker_concurrency, options.limit_worker_queue)
        core = Core(engine, options.names, slots, options.log_prompts)
        openai = await engine.openai_application() if options.openai else None
        json_bodies.install()
        server = FastChatServer(core, chat_format, options.api_token, openai)
        await warm_up(engine)
        ports.listen(sock)
        quiet_when_full(asyncio.get_running_loop())
        http = HttpServer(server.app, core.tally, options.client_timeout)
        http_task = asyncio.create_task(http.serve(sockets=[ListeningSocket(sock)]))
        while not http.started:
            if http_task.done():
                raise EngineError(f"the HTTP server did not start: {why_ended(http_task)}")
            await asyncio.sleep(0.01)
        logger.info(
            "ready: %s at %s, context of %d tokens, %s",
            *options.names[:1],
            options.address,
            engine.context_length,
            "FastChat's protocol" if openai is None else "FastChat's protocol and OpenAI's under /v1",
        )
        controller = ControllerClient(
            options.controller_address, options.address, server.status, is_multimodal=engine.reads_images
        )
        registration = None
        if not options.no_register:
            core.is_registered = lambda: controller.is_registered
            registration = asyncio.create_task(controller.run())
        signals = StopSignals()
        reason = await first_reason_to_stop(engine, http_task, signals)

        slots.is_closed = True
        http.keep_no_connection()
        leaving = None
        if registration is not None:
            registration.cancel()
            leaving = asyncio.create_task(controller.leave())
        if reason is not None:
            logger.error("%s", reason)
        timeout_s = options.drain_timeout if reason is None else STREAMS_END_TIMEOUT_S
        deadline = time.monotonic() + timeout_s
        await core.drain(timeout_s, signals.second)
        if leaving is not None:
            await until_left(leaving, max(deadline - time.monotonic(), LEAVE_TIMEOUT_S), signals.second)
        http.should_exit = True
        await asyncio.wait((http_task,))
    finally:
        await stop_engine(engine)
    logger.info("stopped")
    return 0 if reason is None else EngineError.exit_status


async def warm_up(engine: Engine) -> None:
    """Let the engine compute once, so that no client waits for what that takes. Raises EngineError when it cannot."""
    try:
        await engine.warm_up()
    except RequestError as error:
        raise EngineError(f"the engine failed at its first request: {root_cause(error)}") from error


class StopSignals:
    """The first signal asks for an end in good order, the second for one at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for signal_number in stop_signals():
            asyncio.get_running_loop().add_signal_handler(signal_number, self._note)

    def _note(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def first_reason_to_stop(engine: Engine, http_task: asyncio.Task[None], signals: StopSignals) -> str | None:
    """Wait for a signal (None), or for the death of the engine or of the HTTP server (why)."""
    tasks: tuple[asyncio.Task[Any], ...] = (
        asyncio.create_task(signals.first.wait()),
        asyncio.create_task(engine.wait_dead()),
    )
    await asyncio.wait((*tasks, http_task), return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    if tasks[1].done():
        reason: str = tasks[1].result()
        return reason
    return f"the HTTP server ended: {why_ended(http_task)}" if http_task.done() else None


def why_ended(task: asyncio.Task[None]) -> str:
    error = None if task.cancelled() else task.exception()
    return "it was told to" if error is None else root_cause(error)


async def until_left(leaving: asyncio.Task[None], timeout_s: float, hurry: asyncio.Event) -> None:
    """Wait for the controller's answer, at most `timeout_s` seconds or until `hurry`."""
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait((leaving, hurried), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not leaving.done():
        logger.warning("the controller has not confirmed that this worker left; it will miss its heartbeats")
    for task in (leaving, hurried):
        task.cancel()
    await asyncio.gather(leaving, hurried, return_exceptions=True)


async def stop_engine(engine: Engine) -> None:
    """Stop it, by force where it does not stop: it may hang, or have been suspended."""
    stopping = asyncio.create_task(engine.stop())
    await asyncio.wait((stopping,), timeout=ENGINE_STOP_TIMEOUT_S)
    if not stopping.done():
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    await stopping


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__mp_main__":  # one of vLLM's processes: it must not outlive the worker, even one that is killed
    die_with_parent()
    # A terminal sends Ctrl-C and its hang-up to the whole group; the worker drains, and needs its engine for that.
    os.setpgrp()

if __name__ == "__main__":
    main()
