"""Real programs of the service, started and stopped by tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ipex_vllm.server import WorkerServer
from tests.support import free_port, serving

START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60


class Process:
    """A program that answers at `url` when `probe`, a method and a path, succeeds; its log is beside `directory`."""

    def __init__(self, directory: Path, url: str, probe: str, *command: str) -> None:
        self.directory, self.url = directory, url
        self._probe, self._command = probe, command
        self.directory.mkdir()
        self.start()

    def start(self) -> None:
        with self._log_path.open("ab") as log:
            environment = {key: value for key, value in os.environ.items() if key != "LOGDIR"}
            self._process = subprocess.Popen(
                self._command,
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{' '.join(self._command)} did not start:\n{self.log()[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def log(self) -> str:
        return self._log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def _log_path(self) -> Path:
        return self.directory.with_suffix(".log")

    def _answers(self) -> bool:
        method, path = self._probe.split()
        try:
            return httpx.request(method, self.url + path, trust_env=False, timeout=5).is_success
        except httpx.HTTPError:
            return False


@contextmanager
def running(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.stop()


def python_service(directory: Path, probe: str, *module: str) -> Process:
    """`python -m module...` on a free port of this machine."""
    port = str(free_port())
    command = (sys.executable, "-m", *module, "--host", "127.0.0.1", "--port", port)
    return Process(directory, f"http://127.0.0.1:{port}", probe, *command)


def register(controller: str, worker: str, server: WorkerServer) -> None:
    """Make the controller know a worker that sends no heartbeats."""
    body = {"worker_name": worker, "check_heart_beat": False, "worker_status": server.status(), "multimodal": False}
    httpx.post(f"{controller}/register_worker", json=body, trust_env=False).raise_for_status()


@dataclass(frozen=True)
class Stack:
    """URLs of FastChat's servers in front of a worker."""

    worker: str
    controller: str
    openai_server: str


@contextmanager
def fastchat_stack(directory: Path, server: WorkerServer) -> Iterator[Stack]:
    controller_module, api_module = "fastchat.serve.controller", "ipex_vllm.fastchat_api"
    with (
        serving(server) as worker,
        running(python_service(directory / "controller", "POST /list_models", controller_module)) as controller,
        running(
            python_service(directory / "api", "GET /v1/models", api_module, "--controller-address", controller.url)
        ) as api,
    ):
        register(controller.url, worker, server)
        yield Stack(worker, controller.url, api.url)
