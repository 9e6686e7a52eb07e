"""Start, pause, continue and stop a system's processes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.compare.systems import ROOT, Command, Launch
from benchmarks.load.client import served_models
from benchmarks.options import BenchmarkError

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
# Below this there is no core to spare for the load generator.
MIN_CORES_TO_PIN = 4


def split_cores() -> tuple[set[int], set[int]]:
    """Cores for the servers and for the load generator: apart where there are enough, else all for both."""
    cores = sorted(os.sched_getaffinity(0))
    return (set(cores[:-1]), {cores[-1]}) if len(cores) >= MIN_CORES_TO_PIN else (set(cores), set(cores))


class RunningSystem:
    """A system on `cores`, its output in `log`; `with` starts and stops it.

    Starting raises BenchmarkError, with the last line of the log, when a process ends or is not ready in time.
    """

    def __init__(self, launch: Launch, log: Path, env: Mapping[str, str], cores: set[int]) -> None:
        self.launch = launch
        self._log = log
        self._env = env
        self._cores = cores
        self._processes: list[subprocess.Popen[bytes]] = []
        self.start_s = 0.0

    def __enter__(self) -> RunningSystem:
        self.start()
        return self

    def start(self) -> None:
        """Start all processes and wait until the model is served; how long that took is `start_s`.

        Raises BenchmarkError, with nothing left running.
        """
        begun = time.monotonic()
        try:
            for command in self.launch.commands:
                self._start(command)
            # FastChat's API server answers before its controller knows a worker.
            self._wait_until(self._serves_its_model, "serves no model")
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - begun

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """The processes started here; each may have children."""
        return [process.pid for process in self._processes]

    def _start(self, command: Command) -> None:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command.argv],
                cwd=ROOT,
                env={**os.environ, **command.env, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A session of its own: Ctrl-C is for the benchmark, which then stops the servers itself.
                start_new_session=True,
                preexec_fn=functools.partial(os.sched_setaffinity, 0, self._cores),
            )
        self._processes.append(process)
        self._wait_until(functools.partial(_answers, *command.ready), f"does not answer at {command.ready[1]}")

    def _wait_until(self, is_true: Callable[[], bool], complaint: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_true():
            ended = next((process for process in self._processes if process.poll() is not None), None)
            if ended or time.monotonic() > deadline:
                state = f"ended with status {ended.returncode}" if ended else complaint
                raise BenchmarkError(f"the server {state}; {self._log} ends: {self._last_line()}")
            time.sleep(0.2)

    def _serves_its_model(self) -> bool:
        try:
            return bool(asyncio.run(served_models(self.launch.url, self.launch.protocol)))
        except BenchmarkError:
            return False

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "(nothing)"

    def _tree(self) -> list[psutil.Process]:
        tree = []
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                tree += [root, *root.children(recursive=True)]
        return tree

    def pause(self) -> None:
        """Stop all its processes where they are: they keep their memory and use no CPU."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def _signal(self, number: signal.Signals) -> None:
        signal_all(self._tree(), number)

    def stop(self) -> None:
        """End all processes, the last one started first: politely, then by force."""
        tree = self._tree()
        self.resume()
        for server in reversed(self._processes):
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_TIMEOUT_S)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for server in self._processes:
            server.wait()


def signal_all(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to all of them that are still there."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _answers(method: str, url: str) -> bool:
    request = urllib.request.Request(url, data=b"{}" if method == "POST" else None, method=method)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
