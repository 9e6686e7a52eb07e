"""The end of a worker: every client is told, the time is kept whatever hangs, and a second signal ends it at once."""

from __future__ import annotations

import contextlib
import io
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from ipex_vllm.supervisor import Service, Supervisor
from tests.processes import ROOT, Server, eventually, fake_worker
from tests.support import free_port, raw_post, split_frames, stream

ENDLESS = {"FAKE_TEXTS": "10000", "FAKE_INTERVAL_S": "0.1"}
PARAMS = {"prompt": "p", "max_new_tokens": 10_000}
REQUEST = b'POST /worker_generate HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"prompt": "p"}'


def running(worker: Server) -> int:
    length: int = httpx.post(f"{worker.url}/worker_get_status", trust_env=False).json()["queue_length"]
    return length


@contextlib.contextmanager
def controller(drips: bool) -> Iterator[str]:
    """One that knows the worker, and answers its leaving byte by byte or not at all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                asked = connection.recv(65536)
                if b"/refresh_all_workers" not in asked:
                    body = b'{"exist": true}'
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                    connection.recv(65536)
                    return
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" if drips else b"")
                while not ended.wait(0.2):
                    connection.sendall(b" " if drips else b"")

        def serve() -> None:
            with contextlib.suppress(OSError), ThreadPoolExecutor() as pool:
                while True:
                    pool.submit(answer, listening.accept()[0])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("drips", [True, False], ids=["byte by byte", "never"])
def test_a_controller_that_does_not_let_go_costs_the_drains_time_at_most(drips: bool, tmp_path: Path) -> None:
    with controller(drips) as url:
        command = ("tests.fake_worker", "--controller-address", url, "--drain-timeout", "2")
        with Server(tmp_path / "worker", "/ready", *command, PYTHONPATH=str(ROOT)) as worker:
            started_at = time.monotonic()
            assert worker.stop() == 0  # which waits for a minute
            assert time.monotonic() - started_at < 15, "before, 35 s and more than a minute"
            assert "has not confirmed that this worker left" in worker.output


def test_a_second_signal_ends_it_at_once_and_clients_are_told(tmp_path: Path) -> None:
    with (
        fake_worker(tmp_path / "worker", "--drain-timeout", "1000", **ENDLESS) as worker,
        ThreadPoolExecutor(2) as pool,
    ):
        answers = [pool.submit(stream, worker.url, **PARAMS) for _ in range(2)]
        eventually(lambda: running(worker) == 2, "running")
        worker.process.send_signal(signal.SIGINT)
        worker.wait_for_output("draining: 2 requests")
        assert worker.stop(signal.SIGINT) == 0
        assert [answer.result()[-1]["error_code"] for answer in answers] == [42903] * 2


def test_an_engine_that_hangs_is_killed_and_clients_are_told(tmp_path: Path) -> None:
    flags = ("--drain-timeout", "0.5")
    with (
        fake_worker(tmp_path / "worker", *flags, FAKE_SUSPENDED="1", **ENDLESS) as worker,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(stream, worker.url, **PARAMS)
        eventually(lambda: running(worker) == 1, "running")
        assert worker.stop() == 0
        assert answer.result()[-1]["error_code"] == 42903
        assert "Traceback" not in worker.output


def test_whoever_is_connected_when_the_door_closes_is_told(tmp_path: Path) -> None:
    with fake_worker(tmp_path / "worker") as worker, contextlib.ExitStack() as stack:
        host, port = worker.url.removeprefix("http://").split(":")
        connections = [stack.enter_context(socket.create_connection((host, int(port)), 30)) for _ in range(20)]
        assert running(worker) == 0  # they are accepted
        worker.process.send_signal(signal.SIGTERM)
        worker.wait_for_output("draining: 0 requests")
        for connection in connections:
            connection.sendall(REQUEST)
        for connection in connections:
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))  # type: ignore[misc]
            assert b'"error_code":42903' in answer
            assert b"connection: close" in answer
        assert worker.process.wait(60) == 0


def test_under_load_no_request_that_was_accepted_goes_unanswered(tmp_path: Path) -> None:
    unanswered = 0
    with fake_worker(tmp_path / "worker", FAKE_TEXTS="5", FAKE_INTERVAL_S="0.01") as worker:

        def hammer() -> int:
            num_unanswered = 0
            while True:
                try:
                    connection = raw_post(worker.url, "/worker_generate_stream", {"prompt": "p"})
                except OSError:  # nobody listens any more
                    return num_unanswered
                with connection:
                    try:
                        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # noqa: B023
                    except ConnectionResetError:
                        answer = b""
                    num_unanswered += b"error_code" not in answer

        with ThreadPoolExecutor(16) as pool:
            hammers = [pool.submit(hammer) for _ in range(16)]
            time.sleep(1)
            assert worker.stop() == 0
            unanswered = sum(future.result() for future in hammers)
    assert unanswered == 0


TELLING = """
import os, signal, subprocess, sys, time
def told(*_):
    print(sys.argv[1], "was told", flush=True)
    time.sleep(0.5)
    sys.exit(0)
signal.signal(signal.SIGTERM, told)
if sys.argv[1] == "worker":
    subprocess.Popen([sys.executable, "-c", open("/proc/self/cmdline").read().split("\\0")[2], "engine"])
print(sys.argv[1], "runs", flush=True)
time.sleep(1000)
"""


async def test_a_service_is_told_to_stop_and_decides_what_becomes_of_its_children() -> None:
    """vLLM's processes end on a SIGTERM of their own, and with them the requests that a worker would finish."""
    shown = io.StringIO()

    async def is_ready() -> bool:
        return "worker runs" in shown.getvalue() and "engine runs" in shown.getvalue()

    command = [sys.executable, "-c", TELLING, "worker"]
    service = Service("worker", "worker", command, free_port(), is_ready)
    supervisor = Supervisor([service], Console(file=shown, width=200), is_verbose=True)
    await supervisor.start()
    assert service.process is not None
    tree = [psutil.Process(service.process.pid), *psutil.Process(service.process.pid).children(recursive=True)]
    await supervisor.stop()
    assert "worker was told" in shown.getvalue()
    assert "engine was told" not in shown.getvalue()
    assert psutil.wait_procs(tree, timeout=10)[1] == []


def test_a_stream_that_ends_with_an_error_is_whole(tmp_path: Path) -> None:
    with fake_worker(tmp_path / "worker", "--drain-timeout", "0", **ENDLESS) as worker:
        with raw_post(worker.url, "/worker_generate_stream", PARAMS) as connection:
            eventually(lambda: running(worker) == 1, "running")
            assert worker.stop() == 0
            content = b"".join(iter(lambda: connection.recv(65536), b""))
        assert content.endswith(b"0\r\n\r\n")
        last = content.split(b"\r\n")[-4]
        assert split_frames(last)[-1]["error_code"] == 42903
