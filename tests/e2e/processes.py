"""Real processes for the end-to-end tests: workers and whole services, on ports of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil

from tests.support import free_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300


class Program:
    """`python -m MODULE ARGUMENTS` with its output in a file; the whole process tree is gone when it is left."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, **environ: str) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environ},
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The program's process and all below it."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def wait_for(self, url: str) -> None:
        """Wait until a GET of `url` succeeds."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with status {self.process.returncode}:\n{self.output}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, trust_env=False, timeout=5).is_success:
                    return
            time.sleep(0.2)
        raise AssertionError(f"not ready after {START_TIMEOUT_S} s:\n{self.output}")

    def wait_for_output(self, text: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while text not in self.output:
            assert self.process.poll() is None, f"ended with status {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"{text!r} did not appear:\n{self.output}"
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
            tree = self.tree()
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait(60)


@contextlib.contextmanager
def program(module: str, arguments: Sequence[str], log: Path, **environ: str) -> Iterator[Program]:
    running = Program(module, arguments, log, **environ)
    try:
        yield running
    finally:
        running.kill()


@contextlib.contextmanager
def worker(folder: Path, *arguments: str, name: str = "worker", **environ: str) -> Iterator[tuple[Program, str]]:
    """A ready worker and its URL; it takes little memory, so that several fit on a small machine."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    small = ["--port", str(port), "--kv-cache-gib", "0.25", "--no-compile", *arguments]
    with program("ipex_vllm.worker", small, folder / f"{name}.log", **environ) as running:
        running.wait_for(f"{url}/ready")
        yield running, url


class Service:
    """Everything that `make serve` starts, but the web UI."""

    def __init__(self, folder: Path, *arguments: str, **environ: str) -> None:
        self.controller_port, self.worker_port, self.api_port = free_port(), free_port(), free_port()
        self.controller_url = f"http://127.0.0.1:{self.controller_port}"
        self.worker_url = f"http://127.0.0.1:{self.worker_port}"
        self.api_url = f"http://127.0.0.1:{self.api_port}"
        ports = ["--controller-port", str(self.controller_port), "--worker-port", str(self.worker_port)]
        ports += ["--api-port", str(self.api_port), "--no-web"]
        self.program = Program("ipex_vllm.up", [*ports, *arguments], folder / "up.log", **environ)
        try:
            self.program.wait_for_output("Ready.")
        except BaseException:
            self.program.kill()
            raise

    def models(self) -> list[str]:
        """What the controller lists; nothing while it does not answer."""
        try:
            answer = httpx.post(f"{self.controller_url}/list_models", trust_env=False).json()
        except httpx.HTTPError:
            return []
        models: list[str] = answer["models"]
        return models

    def process_of(self, module: str) -> psutil.Process:
        """The service's child that runs `python -m module`."""
        (found,) = [process for process in self.program.tree() if module in process.cmdline()]
        return found


def eventually(condition: object, what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.1)
