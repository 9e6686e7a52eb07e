"""Keeps child processes alive: starts them in order, joins their logs, restarts what dies, stops them all.

Nothing of them is left behind: each is a process group of its own, and the kernel tells it when this program dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from rich.console import Console
from rich.text import Text

from ipex_vllm.errors import OneLine, OptionError
from ipex_vllm.lifetime import die_with_parent
from ipex_vllm.options import CONFIG_VARIABLE, ENVIRONMENT_PREFIX
from ipex_vllm.ports import check_port

COLORS = ("cyan", "green", "magenta", "yellow", "blue", "bright_red")
READY_POLL_S = 0.5
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
STABLE_AFTER_S = 60.0  # a child that lived this long starts again with the first back-off
KILL_AFTER_S = 5.0  # beyond a worker's own drain timeout

# Without --verbose: each request's line of FastChat's programs, and what libraries say to their own developers.
NOISE = re.compile(r"^\S+ \S+ \| INFO \| |^INFO: |Triton not|resource_tracker|^\s+warnings\.warn")
# FastChat turns what its libraries write to stderr into log lines of level ERROR, whatever they say.
FASTCHAT_STDERR = re.compile(r"^\S+ \S+ \| ERROR \| stderr \| ")

Role = Literal["controller", "worker", "api", "web"]


@dataclass
class Service:
    """One child process and how to see that it is ready."""

    name: str
    role: Role
    command: list[str]
    port: int
    is_ready: Callable[[], Awaitable[bool]]
    host: str = "127.0.0.1"
    death_signal: signal.Signals = signal.SIGKILL  # what the kernel sends it when this program dies
    stop_timeout_s: float = KILL_AFTER_S
    environ: dict[str, str] = field(default_factory=dict)  # beside this program's own
    tell_death: Callable[[], Awaitable[object]] | None = None  # to others, who would still count on it
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)
    last_line: str = ""


class ServiceFailed(OneLine):
    """A service could not start."""


class Supervisor:
    """Starts services in order, keeps them alive, and stops them in the opposite order."""

    def __init__(self, services: Sequence[Service], console: Console, is_verbose: bool) -> None:
        self._services = services
        self._console = console
        self._is_verbose = is_verbose
        # An empty LOGDIR keeps FastChat from writing log files.
        self._environ = {"LOGDIR": "", **os.environ}
        self._environ.pop(CONFIG_VARIABLE, None)  # a file for this program, which a worker would refuse
        if is_verbose:
            self._environ[f"{ENVIRONMENT_PREFIX}VERBOSE"] = "true"
        else:
            self._environ = {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", **self._environ}
        self._tasks: set[asyncio.Task[None]] = set()
        self._styles = {service.name: COLORS[i % len(COLORS)] for i, service in enumerate(services)}
        self._width = max(len(service.name) for service in services)

    async def start(self) -> None:
        """Start each service and wait until it is ready. Raises ServiceFailed."""
        for service in self._services:
            try:
                check_port(service.host, service.port)
            except OptionError as error:
                raise ServiceFailed(f"{error}; choose another one with --{service.role}-port") from None
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
                service.process.terminate()  # alone: it knows what its own processes have to finish
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
            # A group of its own: Ctrl-C reaches this program alone, and a group can be ended as a whole. But no session
            # of its own: Linux shares CPUs between sessions first (autogroup), and one that mostly waits, as the API
            # server's, got none for up to 1.6 s beside an engine that always computes.
            process_group=0,
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
        # Whoever answers on its port is another program, unless this one runs.
        while not await service.is_ready() or service.process.returncode is not None:
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
            if service.tell_death is not None:
                await service.tell_death()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            await self._spawn(service)


def _signal_group(process: asyncio.subprocess.Process, signal_number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal_number)
