"""Real programs of the service, started and stopped by tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import httpx
import psutil

from ipex_vllm.ports import http_url
from ipex_vllm.serving.fastchat import FastChatServer
from tests.support import free_port, serving

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 300


class Program:
    """A command that runs in a folder of its own, with its output beside that; nothing of it outlives the context."""

    def __init__(
        self,
        folder: Path,
        *command: str,
        ready_at: str | None = None,
        is_ignoring_hangup: bool = False,
        **environ: str,
    ) -> None:
        self.folder, self._log = folder, folder.with_suffix(".log")
        self._command, self._ready_at = command, ready_at
        self._is_ignoring_hangup = is_ignoring_hangup
        self._environ = {**os.environ, "LOGDIR": "", **environ}  # "" keeps FastChat from writing log files
        self.folder.mkdir(parents=True)
        self.start()

    def start(self) -> None:
        """Start it, again if it has ended; with `ready_at`, wait until a GET of that URL succeeds."""
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environ,
                preexec_fn=partial(set_signals, self._is_ignoring_hangup),
            )
        if self._ready_at is not None:
            try:
                self.wait_until(lambda: self._answers(), f"answer at {self._ready_at}")
            except BaseException:
                self.kill()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The program's process and all below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def listening_at(self) -> set[str]:
        """The addresses on which the tree accepts connections; some port of one at least."""
        found = {
            connection.laddr.ip
            for process in self.tree()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert found
        return found

    def wait_for_output(self, text: str) -> None:
        self.wait_until(lambda: text in self.output, f"output {text!r}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            assert self.process.poll() is None, f"ended with status {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what} after {START_TIMEOUT_S} s:\n{self.output}"
            time.sleep(0.2)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send the signal and return the exit status; nothing of the tree may be left."""
        tree = self.tree()
        self.process.send_signal(signal_number)
        status = self.process.wait(60)
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive, f"left behind: {alive}\n{self.output}"
        return status

    def kill(self) -> None:
        if self.process.poll() is None:
            for process in self.tree():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait(60)

    def _answers(self) -> bool:
        try:
            return httpx.get(str(self._ready_at), trust_env=False, timeout=5).is_success
        except httpx.HTTPError:
            return False


def set_signals(is_ignoring_hangup: bool) -> None:
    """What a shell starts a program with, or `nohup`, however the tests were started."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignoring_hangup else signal.SIG_DFL)


class Server(Program):
    """`python -m module...` on a free port of this machine, ready when a GET of `ready_path` succeeds."""

    def __init__(
        self, folder: Path, ready_path: str, *module: str, is_ignoring_hangup: bool = False, **environ: str
    ) -> None:
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        command = (sys.executable, "-m", *module, "--host", "127.0.0.1", "--port", port)
        super().__init__(
            folder, *command, ready_at=self.url + ready_path, is_ignoring_hangup=is_ignoring_hangup, **environ
        )


def worker(folder: Path, *arguments: str, **environ: str) -> Server:
    """A ready worker; it takes little memory, so that several fit on a small machine."""
    small = ("--kv-cache-gib", "0.25", "--no-compile")
    return Server(folder, "/ready", "ipex_vllm.worker", *small, *arguments, **environ)


def fake_worker(folder: Path, *arguments: str, is_ignoring_hangup: bool = False, **environ: str) -> Server:
    """A ready worker on the fake engine, known to no controller: tests/fake_worker.py tells what `environ` may set."""
    return Server(
        folder,
        "/ready",
        *("tests.fake_worker", "--no-register", *arguments),
        is_ignoring_hangup=is_ignoring_hangup,
        PYTHONPATH=str(ROOT),
        **environ,
    )


def fastchat_controller(folder: Path, **environ: str) -> Server:
    return Server(folder, "/test_connection", "fastchat.serve.controller", **environ)


def fastchat_api(folder: Path, controller_url: str, **environ: str) -> Server:
    arguments = ("ipex_vllm.fastchat_api", "--controller-address", controller_url)
    return Server(folder, "/v1/models", *arguments, **environ)


def register(controller_url: str, worker_url: str, server: FastChatServer, *, reads_images: bool = False) -> None:
    """Make the controller know a worker that sends no heartbeats."""
    body = {"worker_name": worker_url, "check_heart_beat": False, "worker_status": server.status()}
    body["multimodal"] = reads_images
    httpx.post(f"{controller_url}/register_worker", json=body, trust_env=False).raise_for_status()


def listed_models(controller_url: str) -> list[str]:
    """What the controller lists; nothing while there is none. One that is slow is waited for."""
    try:
        answer = httpx.post(f"{controller_url}/list_models", trust_env=False, timeout=60).json()
    except (httpx.NetworkError, httpx.RemoteProtocolError):
        return []
    models: list[str] = answer["models"]
    return models


@dataclass(frozen=True)
class Stack:
    """URLs of FastChat's servers in front of a worker."""

    worker: str
    controller: str
    openai_server: str
    api: Server


@contextlib.contextmanager
def fastchat_stack(folder: Path, server: FastChatServer, **environ: str) -> Iterator[Stack]:
    """The controller and the API server, the latter with `environ`, in front of `server`."""
    with (
        serving(server) as worker_url,
        fastchat_controller(folder / "controller") as controller,
        fastchat_api(folder / "api", controller.url, **environ) as api,
    ):
        register(controller.url, worker_url, server)
        yield Stack(worker_url, controller.url, api.url, api)


class Service(Program):
    """Everything that `make serve` starts, but the web UI."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        host: str = "127.0.0.1",
        is_ignoring_hangup: bool = False,
        **environ: str,
    ) -> None:
        ports = {role: free_port() for role in ("controller", "worker", "api")}
        self.controller_url, self.worker_url, self.api_url = (http_url(host, port) for port in ports.values())
        flags = ["--host", host, "--no-web"]
        flags += [word for role, port in ports.items() for word in (f"--{role}-port", str(port))]
        command = (sys.executable, "-m", "ipex_vllm.up", *flags, *arguments)
        super().__init__(folder, *command, is_ignoring_hangup=is_ignoring_hangup, **environ)
        try:
            self.wait_for_output("Ready.")
        except BaseException:
            self.kill()
            raise

    def models(self) -> list[str]:
        return listed_models(self.controller_url)

    def workers(self) -> list[psutil.Process]:
        """The processes of its workers on the fake engine, in the order of their ports."""
        return sorted((p for p in self.tree() if "tests.fake_worker" in p.cmdline()), key=lambda p: p.pid)

    def process_of(self, module: str) -> psutil.Process:
        """The service's child that runs `python -m module`."""
        (found,) = [process for process in self.tree() if module in process.cmdline()]
        return found


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.1)
