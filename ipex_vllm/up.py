"""The whole service under one command: `python -m ipex_vllm.up`, which is what `make serve` calls.

Starts FastChat's controller, one or more workers, FastChat's OpenAI API server and its web UI, in this order; waits
until a chat would succeed; joins their logs; restarts what dies; and stops everything on Ctrl-C or SIGTERM. FastChat's
programs run unmodified.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ipex_vllm.errors import OptionError
from ipex_vllm.lifetime import die_with_parent
from ipex_vllm.options import (
    CONFIG_VARIABLE,
    ENVIRONMENT_PREFIX,
    Parser,
    add_options,
    config_path,
    from_namespace,
    layered_arguments,
    option,
    read_config,
)

COLORS = ("cyan", "green", "magenta", "yellow", "blue", "bright_red")
FASTCHAT_CONTROLLER, FASTCHAT_API = "fastchat.serve.controller", "ipex_vllm.fastchat_api"
READY_POLL_S = 0.5
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
STABLE_AFTER_S = 60.0  # a child that lived this long starts again with the first back-off
KILL_AFTER_S = 5.0  # beyond a worker's own drain timeout

# Without --verbose: each request's line of FastChat's programs, and what libraries say to their own developers.
NOISE = re.compile(r"^\S+ \S+ \| INFO \| |^INFO: |Triton not|resource_tracker|^\s+warnings\.warn")
# FastChat turns what its libraries write to stderr into log lines of level ERROR, whatever they say.
FASTCHAT_STDERR = re.compile(r"^\S+ \S+ \| ERROR \| stderr \| ")

Role = Literal["controller", "worker", "api", "web"]


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What to start and where. A --config file has the same names, and `workers`: a list of workers' flags."""

    model_path: str = option('model directory or Hugging Face name; "demo" is the model in this package', "demo")
    device: Literal["cpu", "xpu"] = option("what computes", "cpu")
    low_bit: str | None = option("weight format on load, e.g. sym_int4", None)
    replicas: int = option("workers of this model, on consecutive ports", 1)
    host: str = option("address that everything listens on", "127.0.0.1")
    controller_port: int = option("port of FastChat's controller", 21001)
    worker_port: int = option("port of the first worker", 21002)
    api_port: int = option("port of FastChat's OpenAI API server", 8000)
    web_port: int = option("port of FastChat's web UI", 7860)
    web: bool | None = option("start the web UI; default: when its environment is there", None)
    only: Literal["controller", "worker", "api", "web"] | None = option("start this piece alone", None)
    controller_address: str | None = option("URL of a controller elsewhere, with --only", None)
    drain_timeout: float = option("seconds that running requests get to finish at the end", 30.0)
    verbose: bool = option("show all that the programs write, vLLM's and FastChat's INFO lines too", False)

    @property
    def controller_url(self) -> str:
        return self.controller_address or f"http://{self.host}:{self.controller_port}"

    @property
    def api_url(self) -> str:
        return f"http://{self.host}:{self.api_port}"


@dataclass
class Service:
    """One child process and how to see that it is ready."""

    name: str
    role: Role
    command: list[str]
    port: int
    is_ready: Callable[[], Awaitable[bool]]
    death_signal: signal.Signals = signal.SIGKILL  # what the kernel sends it when this program dies
    stop_timeout_s: float = KILL_AFTER_S
    environ: dict[str, str] = field(default_factory=dict)  # beside this program's own
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)
    last_line: str = ""


class ServiceFailed(Exception):
    """A service could not start; the message is the one line that the user sees."""


class Supervisor:
    """Starts services in order, keeps them alive, and stops them in the opposite order."""

    def __init__(self, services: Sequence[Service], console: Console, is_verbose: bool) -> None:
        self._services = services
        self._console = console
        self._is_verbose = is_verbose
        # An empty LOGDIR keeps FastChat from writing log files.
        self._environ = {"LOGDIR": "", **os.environ}
        self._environ.pop(CONFIG_VARIABLE, None)  # a file for this program, which a worker would refuse
        if not is_verbose:
            self._environ = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", **self._environ}
        self._tasks: set[asyncio.Task[None]] = set()
        self._styles = {service.name: COLORS[i % len(COLORS)] for i, service in enumerate(services)}
        self._width = max(len(service.name) for service in services)

    async def start(self) -> None:
        """Start each service and wait until it is ready. Raises ServiceFailed."""
        for service in self._services:
            check_port(service)
        for service in self._services:
            self.say(service, "starting")
            await self._spawn(service)
            await self._wait_ready(service)
            self.say(service, "ready")

    async def keep_alive(self) -> None:
        """Restart whatever dies, for ever."""
        await asyncio.gather(*(self._keep_one_alive(service) for service in self._services))

    async def stop(self) -> None:
        for service in reversed(self._services):
            if service.process is not None and service.process.returncode is None:
                self.say(service, "stopping")
                _signal_group(service.process, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(service.process.wait(), service.stop_timeout_s)
            if service.process is not None:
                _signal_group(service.process, signal.SIGKILL)  # whatever is left of it and of its children
                await service.process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def say(self, service: Service, text: str) -> None:
        style = self._styles[service.name]
        self._console.print(
            Text(f"{service.name:{self._width}} | ", style), Text.from_ansi(text), sep="", soft_wrap=True
        )

    async def _spawn(self, service: Service) -> None:
        service.process = await asyncio.create_subprocess_exec(
            *service.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environ | service.environ,
            start_new_session=True,  # so that Ctrl-C reaches this program alone, and a group can be ended as a whole
            preexec_fn=partial(die_with_parent, service.death_signal),
        )
        task = asyncio.create_task(self._copy_log(service, service.process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _copy_log(self, service: Service, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        pending = b""
        while part := await process.stdout.read(65536):
            *lines, pending = re.split(rb"[\r\n]+", pending + part)  # a progress bar rewrites its line with \r
            for line in lines:
                text = FASTCHAT_STDERR.sub("", line.decode(errors="replace"))
                if text.strip() and (self._is_verbose or not NOISE.search(text)):
                    service.last_line = text.strip()
                    self.say(service, text)

    async def _wait_ready(self, service: Service) -> None:
        assert service.process is not None
        while not await service.is_ready():
            if service.process.returncode is not None:
                await asyncio.sleep(0.2)  # for its last words
                raise ServiceFailed(
                    f"{service.name} ended with status {service.process.returncode} before it was ready: "
                    f"{service.last_line.removeprefix('error: ')}"
                )
            await asyncio.sleep(READY_POLL_S)

    async def _keep_one_alive(self, service: Service) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            assert service.process is not None
            started_at = time.monotonic()
            # Not wait(): that waits for the log's end as well, which the dead child's own children hold open.
            while (status := service.process.returncode) is None:
                await asyncio.sleep(READY_POLL_S)
            _signal_group(service.process, signal.SIGKILL)  # its children, which would keep the port
            if time.monotonic() - started_at > STABLE_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            self.say(service, f"ended with status {status}; starting it again in {backoff_s:g} s")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            await self._spawn(service)


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
        )
    ]
    for index, flags in enumerate(workers):
        port = int(flags.get("port", options.worker_port + index))
        module = str(flags.get("module", "ipex_vllm.worker"))
        own: dict[str, Any] = {"host": options.host, "controller-address": controller_url}
        own["drain-timeout"] = options.drain_timeout
        own |= {name: value for name, value in flags.items() if name not in ("port", "module")}
        arguments = [_as_flag(name, value) for name, value in own.items() if value not in (None, False)]
        url = str(own.get("worker-address", f"http://{options.host}:{port}"))
        services.append(
            Service(
                f"worker-{index}" if len(workers) > 1 else "worker",
                "worker",
                [python, "-m", module, "--port", str(port), *arguments],
                port,
                partial(gets_ok, f"{url}/ready", own.get("api-token")),
                death_signal=signal.SIGTERM,  # it ends its engine's processes
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
        )
    )
    if options.web or options.only == "web":
        services.append(
            Service(
                "web",
                "web",
                [python, "-m", "ipex_vllm.webui", *address(options.web_port), "--controller-url", controller_url],
                options.web_port,
                partial(gets_ok, f"http://{options.host}:{options.web_port}/"),
            )
        )
    return [service for service in services if options.only in (None, service.role)]


async def posts_ok(url: str) -> bool:
    return await _answers("POST", url)


async def gets_ok(url: str, token: str | None = None) -> bool:
    return await _answers("GET", url, headers={"Authorization": f"Bearer {token}"} if token else {})


async def chats(api_url: str) -> bool:
    """Whether the API server completes a chat with every model that it lists."""
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            models = [entry["id"] for entry in (await client.get(f"{api_url}/v1/models")).json()["data"]]
            for model in models:
                body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
                answer = await client.post(f"{api_url}/v1/chat/completions", json=body)
                answer.json()["choices"]
    except (httpx.HTTPError, KeyError, ValueError):
        return False
    return bool(models)


async def _answers(method: str, url: str, headers: dict[str, str] | None = None) -> bool:
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
            return (await client.request(method, url, headers=headers)).is_success
    except httpx.HTTPError:
        return False


def check_port(service: Service) -> None:
    """Raise ServiceFailed when the service's port is taken."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", service.port))
        except OSError:
            raise ServiceFailed(
                f"port {service.port} is in use; choose another one with --{service.role}-port"
            ) from None


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
        flags = {"model-path": options.model_path, "device": options.device, "low-bit": options.low_bit}
        workers = [flags] * options.replicas
    if not isinstance(workers, list) or not workers or not all(isinstance(worker, dict) for worker in workers):
        raise OptionError(f"{path}: workers must be a list of `flag: value` mappings, one for each worker")
    if options.web is None:
        from ipex_vllm.webui import find_environment

        options = replace(options, web=find_environment() is not None)
    return options, [{name.replace("_", "-"): value for name, value in worker.items()} for worker in workers]


async def up(options: UpOptions, workers: Sequence[dict[str, Any]], console: Console) -> int:
    """Run the service until a signal comes; return the exit status."""
    supervisor = Supervisor(make_services(options, workers), console, options.verbose)
    stopped = asyncio.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
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
    names = str(workers[0].get("model-names") or Path(str(workers[0]["model-path"])).name)
    message = {"role": "user", "content": "What does itertools.chain do?"}
    body = json.dumps({"model": names.split(",")[0], "messages": [message]})
    lines = [
        "",
        "[bold green]Ready.[/]",
        f"  OpenAI API   {options.api_url}/v1",
        f"  controller   {options.controller_url}",
    ]
    if options.web:
        lines.append(f"  web UI       http://{options.host}:{options.web_port}")
    lines += [
        "Try it:",
        f"  curl {options.api_url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d '{escape(body)}'",
        "Ctrl-C stops everything.",
        "",
    ]
    return "\n".join(lines)


def _as_flag(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name}={value}"


def _as_variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.replace("-", "_").upper()


def _signal_group(process: asyncio.subprocess.Process, signal_number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)


def main(arguments: Sequence[str] | None = None) -> None:
    console = Console(stderr=False)
    try:
        options, workers = read_options(sys.argv[1:] if arguments is None else arguments)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(asyncio.run(up(options, workers, console)))


if __name__ == "__main__":
    main()
