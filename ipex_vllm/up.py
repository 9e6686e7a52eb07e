"""The whole service under one command: `python -m ipex_vllm.up`, which is what `make serve` calls.

Starts FastChat's controller, one or more workers, FastChat's OpenAI API server and its web UI, in this order; waits
until a chat would succeed; joins their logs; restarts what dies; and stops everything on Ctrl-C or SIGTERM. FastChat's
programs run unmodified.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from ipex_vllm.errors import OptionError, run_main
from ipex_vllm.lifetime import stop_signals
from ipex_vllm.options import (
    ENVIRONMENT_PREFIX,
    Device,
    Parser,
    WorkerOptions,
    add_options,
    as_word,
    check_flags,
    config_path,
    from_namespace,
    http_address,
    layered_arguments,
    model_name,
    option,
    port_number,
    read_config,
    same_option,
    whole_number,
)
from ipex_vllm.ports import http_url
from ipex_vllm.supervisor import KILL_AFTER_S, Role, Service, ServiceFailed, Supervisor
from ipex_vllm.webui import find_environment

FASTCHAT_CONTROLLER, FASTCHAT_API = "fastchat.serve.controller", "ipex_vllm.fastchat_api"

# A worker's options that this program has as well, for the workers of the one model that needs no file.
OF_THE_MODEL = ("model_path", "device", "low_bit", "low_bit_head", "low_bit_outer", "low_bit_cache")


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What to start and where. A --config file has the same names, and `workers`: a list of workers' flags."""

    model_path: str = same_option(WorkerOptions, "model_path")
    device: Device = same_option(WorkerOptions, "device")
    low_bit: str | None = same_option(WorkerOptions, "low_bit")
    low_bit_head: str | None = same_option(WorkerOptions, "low_bit_head")
    low_bit_outer: str | None = same_option(WorkerOptions, "low_bit_outer")
    low_bit_cache: str | None = same_option(WorkerOptions, "low_bit_cache")
    replicas: int = option("workers of this model, on consecutive ports", 1, parse=whole_number(1))
    host: str = same_option(WorkerOptions, "host")
    controller_port: int = option("port of FastChat's controller", 21001, parse=port_number)
    worker_port: int = option("port of the first worker", 21002, parse=port_number)
    api_port: int = option("port of FastChat's OpenAI API server", 8000, parse=port_number)
    web_port: int = option("port of FastChat's web UI", 7860, parse=port_number)
    web: bool | None = option("start the web UI; default: when its environment is there", None)
    only: Role | None = option("start this piece alone", None)
    controller_address: str | None = option("URL of a controller elsewhere, with --only", None, parse=http_address)
    drain_timeout: float = same_option(WorkerOptions, "drain_timeout")
    verbose: bool = option("show all that the programs write, vLLM's and FastChat's INFO lines too", False)

    @property
    def controller_url(self) -> str:
        return self.controller_address or http_url(self.host, self.controller_port)

    @property
    def api_url(self) -> str:
        return http_url(self.host, self.api_port)

    @property
    def web_url(self) -> str:
        return http_url(self.host, self.web_port)


def make_services(options: UpOptions, workers: Sequence[dict[str, Any]]) -> list[Service]:
    """The services that `options` ask for, in the order in which they start. Raises OptionError."""

    def address(port: int) -> tuple[str, ...]:
        return ("--host", options.host, "--port", str(port))

    python = sys.executable
    controller_url = options.controller_url
    services = [
        Service(
            "controller",
            "controller",
            [python, "-m", FASTCHAT_CONTROLLER, *address(options.controller_port)],
            options.controller_port,
            partial(posts_ok, f"{controller_url}/list_models"),
            host=options.host,
            environ={"NO_PROXY": "*", "no_proxy": "*"},  # it polls the workers: a proxy would only lose them
        )
    ]
    for index, flags in enumerate(workers):
        port = int(flags.get("port", options.worker_port + index))
        module = str(flags.get("module", "ipex_vllm.worker"))
        own: dict[str, Any] = {"host": options.host, "controller-address": controller_url}
        own["drain-timeout"] = options.drain_timeout
        own |= {name: value for name, value in flags.items() if name not in ("port", "module")}
        arguments = [_as_flag(name, value) for name, value in own.items() if value not in (None, False)]
        url = str(own.get("worker-address", http_url(str(own["host"]), port)))
        services.append(
            Service(
                f"worker-{index}" if len(workers) > 1 else "worker",
                "worker",
                [python, "-m", module, "--port", str(port), *arguments],
                port,
                # A further host of a model has no clients, and waits for the others.
                started if int(own.get("node-rank", 0)) else partial(gets_ok, f"{url}/ready", own.get("api-token")),
                host=str(own["host"]),
                death_signal=signal.SIGTERM,  # it ends its engine's processes
                # The controller asks every worker, and forgets those that do not answer.
                tell_death=partial(posts_ok, f"{controller_url}/refresh_all_workers"),
                stop_timeout_s=options.drain_timeout + KILL_AFTER_S,
                # Some flags are switched off by --no-X and some by silence; the worker knows which.
                environ={_as_variable(name): "false" for name, value in own.items() if value is False},
            )
        )
    services.append(
        Service(
            "api",
            "api",
            [python, "-m", FASTCHAT_API, *address(options.api_port), "--controller-address", controller_url],
            options.api_port,
            partial(chats, options.api_url),
            host=options.host,
        )
    )
    if options.web or options.only == "web":
        services.append(
            Service(
                "web",
                "web",
                [python, "-m", "ipex_vllm.webui", *address(options.web_port), "--controller-url", controller_url],
                options.web_port,
                partial(gets_ok, f"{options.web_url}/"),
                host=options.host,
            )
        )
    return [service for service in services if options.only in (None, service.role)]


async def started() -> bool:
    return True


async def posts_ok(url: str) -> bool:
    return await _answers("POST", url)


async def gets_ok(url: str, token: str | None = None) -> bool:
    return await _answers("GET", url, headers={"Authorization": f"Bearer {token}"} if token else {})


async def chats(api_url: str) -> bool:
    """Whether the API server completes a chat with every model that it lists, or embeds where it gives no text."""
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            models = [entry["id"] for entry in (await client.get(f"{api_url}/v1/models")).json()["data"]]
            for model in models:
                body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
                answer = await client.post(f"{api_url}/v1/chat/completions", json=body)
                if "choices" not in answer.json():
                    body = {"model": model, "input": "Hello"}
                    (await client.post(f"{api_url}/v1/embeddings", json=body)).json()["data"]
    except (httpx.HTTPError, KeyError, ValueError):
        return False
    return bool(models)


async def _answers(method: str, url: str, headers: dict[str, str] | None = None) -> bool:
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            return (await client.request(method, url, headers=headers)).is_success
    except httpx.HTTPError:
        return False


def read_options(arguments: Sequence[str]) -> tuple[UpOptions, list[dict[str, Any]]]:
    """The options, and each worker's flags. Raises OptionError."""
    parser = Parser(prog="python -m ipex_vllm.up", allow_abbrev=False, description=__doc__)
    parser.add_argument("--config", metavar="FILE.yaml", help="options as `name: value` lines, and `workers`")
    add_options(parser, UpOptions)
    args = parser.parse_args(layered_arguments(parser, arguments, ignore_unknown=True))
    options: UpOptions = from_namespace(UpOptions, args)
    workers: Any = None
    path = config_path(arguments)
    if path:
        content = read_config(path)
        workers = content.pop("workers", None)
        names = set(vars(options))
        if unknown := [name for name in content if name.replace("-", "_") not in names]:
            raise OptionError(f"{path}: there is no option {unknown[0]!r} (see --help)")
    if workers is None:
        workers = [{name: getattr(options, name) for name in OF_THE_MODEL}] * options.replicas
    if not isinstance(workers, list) or not workers or not all(isinstance(worker, dict) for worker in workers):
        raise OptionError(f"{path}: workers must be a list of `flag: value` mappings, one for each worker")
    workers = [{str(name).replace("_", "-"): value for name, value in worker.items()} for worker in workers]
    for index, worker in enumerate(workers):
        if not worker.get("model-path"):
            raise OptionError(f"{path}: worker {index} has no model-path")
        check_flags(worker, WorkerOptions, f"{path}: worker {index}")
    if options.web is None:
        options = replace(options, web=find_environment() is not None)
    return options, workers


async def up(options: UpOptions, workers: Sequence[dict[str, Any]], console: Console) -> int:
    """Run the service until a signal comes; return the exit status."""
    supervisor = Supervisor(make_services(options, workers), console, options.verbose)
    stopped = asyncio.Event()
    for signal_number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(signal_number, stopped.set)
    waiting = asyncio.create_task(stopped.wait())
    try:
        starting = asyncio.create_task(supervisor.start())
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            return 0
        await starting
        console.print(welcome(options, workers), highlight=False, soft_wrap=True)
        keeping = asyncio.create_task(supervisor.keep_alive())
        await asyncio.wait((keeping, waiting), return_when=asyncio.FIRST_COMPLETED)
        keeping.cancel()
        return 0
    except ServiceFailed as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    finally:
        waiting.cancel()
        await supervisor.stop()


def welcome(options: UpOptions, workers: Sequence[dict[str, Any]]) -> str:
    """What a user can do now."""
    if options.only is not None:
        return f"[bold]Ready:[/] {options.only}, with the controller at {options.controller_url}"
    names = as_word(workers[0].get("model-names") or model_name(str(workers[0]["model-path"])))
    question = "What does itertools.chain do?" if workers[0]["model-path"] == "demo" else "What is gravity?"
    message = {"role": "user", "content": question}
    body = json.dumps({"model": names.split(",")[0], "messages": [message]})
    lines = [
        "",
        "[bold green]Ready.[/]",
        f"  OpenAI API   {options.api_url}/v1",
        f"  controller   {options.controller_url}",
    ]
    if options.web:
        lines.append(f"  web UI       {options.web_url}")
    lines += [
        "Try it:",
        f"  curl {options.api_url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d '{escape(body)}'",
        "Ctrl-C stops everything.",
        "",
    ]
    return "\n".join(lines)


def _as_flag(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name}={as_word(value)}"


def _as_variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.replace("-", "_").upper()


def run(arguments: Sequence[str]) -> int:
    """Run the service and return the exit status. Raises OptionError."""
    options, workers = read_options(arguments)
    return asyncio.run(up(options, workers, Console(stderr=False)))


def main(arguments: Sequence[str] | None = None) -> None:
    run_main(lambda: run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
