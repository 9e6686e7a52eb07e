"""A worker's process, and the whole service, over the fake engine: ports, signals, the end. tests/e2e has vLLM's."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.processes import ROOT, Program, Service, eventually, fake_worker, fastchat_controller, listed_models
from tests.support import free_port, generate, stream


@pytest.fixture
def fake_workers(tmp_path: Path) -> str:
    """A configuration file for `ipex_vllm.up`."""
    file = tmp_path / "service.yaml"
    file.write_text("workers: [{module: tests.fake_worker, model-path: demo, model-names: fake}]\n")
    return str(file)


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[str]:
    with fastchat_controller(tmp_path / "controller") as running:
        yield running.url


def queue_length(url: str) -> int:
    length: int = httpx.post(f"{url}/worker_get_status", trust_env=False).json()["queue_length"]
    return length


def loading_worker(folder: Path, port: int, controller: str) -> Program:
    flags = ("--port", str(port), "--controller-address", controller)
    command = (sys.executable, "-m", "tests.fake_worker", *flags)
    running = Program(folder, *command, PYTHONPATH=str(ROOT), FAKE_START_S="4")
    running.wait_for_output("cores: ")  # it has read its options, and binds before it loads
    return running


def test_of_two_workers_on_a_port_the_second_ends_while_the_first_loads(controller: str, tmp_path: Path) -> None:
    port = free_port()
    with loading_worker(tmp_path / "first", port, controller) as first:
        eventually(lambda: is_bound(port), "bound")
        second = subprocess.run(
            [sys.executable, "-m", "tests.fake_worker", "--port", str(port), "--no-register"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert second.returncode == 2
        assert second.stderr.endswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use\n")
        first.wait_for_output("Registered")
        assert generate(f"http://127.0.0.1:{port}", prompt="p")["error_code"] == 0


def test_a_worker_that_cannot_listen_ends_and_registers_nowhere(controller: str, tmp_path: Path) -> None:
    """Where a port is shared, as after a restart, another program can listen while the model loads."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        with loading_worker(tmp_path / "worker", other.getsockname()[1], controller) as running:
            other.listen()
            assert running.process.wait(60) == 2
            assert "error: cannot listen on 127.0.0.1:" in running.output
            assert "Registered" not in running.output
    assert listed_models(controller) == []


def is_bound(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def test_the_whole_service_on_an_ipv6_address(fake_workers: str, tmp_path: Path) -> None:
    port = free_port()
    arguments = ("--config", fake_workers, "--web", "--web-port", str(port))
    with Service(tmp_path / "up", *arguments, host="::1", PYTHONPATH=str(ROOT)) as service:
        assert service.models() == ["fake"]
        assert httpx.get(f"http://[::1]:{port}/", trust_env=False).is_success
        assert completion(service) == "word word "
        assert service.stop() == 0


def test_the_controller_hears_of_a_dead_replica_at_once(tmp_path: Path) -> None:
    """By itself it would send the dead one its share of the requests until a heartbeat is missed, 90 s."""
    file = tmp_path / "service.yaml"
    file.write_text("workers:\n" + "  - {module: tests.fake_worker, model-path: demo, model-names: fake}\n" * 2)
    with Service(tmp_path / "up", "--config", str(file), "--verbose", PYTHONPATH=str(ROOT)) as service:
        service.workers()[0].kill()
        eventually(lambda: f"Remove stale worker: {service.worker_url}" in service.output, "forgotten", timeout_s=30)
        answers = [completion(service) for _ in range(4)]
        assert answers == ["word word "] * 4
        eventually(lambda: service.output.count(f"Register done: {service.worker_url}") == 2, "back again")


def completion(service: Service) -> str:
    body = {"model": "fake", "prompt": "p"}
    answer = httpx.post(f"{service.api_url}/v1/completions", json=body, trust_env=False).json()
    text: str = answer["choices"][0]["text"]
    return text


def test_an_address_that_cannot_be_ends_the_api_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ipex_vllm.fastchat_api", "--controller-address", "127.0.0.1:21001"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: argument --controller-address: expected http://HOST:PORT")


def test_a_proxy_in_the_environment_is_asked_for_nothing(fake_workers: str, tmp_path: Path) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    environ = {"HTTP_PROXY": dead, "http_proxy": dead, "ALL_PROXY": dead, "all_proxy": dead}
    environ |= {"NO_PROXY": "", "no_proxy": "", "PYTHONPATH": str(ROOT)}
    with Service(tmp_path / "up", "--config", fake_workers, **environ) as service:
        assert httpx.get(f"{service.api_url}/v1/models", trust_env=False).json()["data"], "the controller polled it"
        body = {"model": "fake", "messages": "p", "stream": True}
        events = httpx.post(f"{service.api_url}/v1/chat/completions", json=body, trust_env=False).text
        assert '"content":"word word "' in events or events.count('"content":"word "') == 2
        assert events.endswith("data: [DONE]\n\n")


def test_a_hangup_drains_a_worker(tmp_path: Path) -> None:
    with (
        fake_worker(tmp_path / "worker", FAKE_TEXTS="20", FAKE_INTERVAL_S="0.1") as running,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(stream, running.url, prompt="p", echo=False)
        eventually(lambda: queue_length(running.url) == 1, "running")
        assert running.stop(signal.SIGHUP) == 0
        assert answer.result()[-1]["text"] == "word " * 20


def test_a_hangup_that_is_ignored_stays_ignored(fake_workers: str, tmp_path: Path) -> None:
    arguments = ("--config", fake_workers)
    with (
        fake_worker(tmp_path / "worker", is_ignoring_hangup=True) as worker,
        Service(tmp_path / "up", *arguments, is_ignoring_hangup=True, PYTHONPATH=str(ROOT)) as service,
    ):
        for program in (worker, service):
            program.process.send_signal(signal.SIGHUP)
        service.process_of("tests.fake_worker").kill()
        service.wait_for_output("starting it again")  # it goes on with its work
        assert generate(worker.url, prompt="p")["error_code"] == 0
        for program in (worker, service):
            assert program.process.poll() is None
            assert program.stop() == 0


def test_what_the_drain_cuts_off_ends_with_an_error_and_no_traceback(tmp_path: Path) -> None:
    limits = ("--drain-timeout", "0.5", "--limit-worker-concurrency", "2")
    with (
        fake_worker(tmp_path / "worker", *limits, FAKE_TEXTS="1000", FAKE_INTERVAL_S="0.1") as running,
        ThreadPoolExecutor(3) as pool,
    ):
        params = {"prompt": "p", "max_new_tokens": 1000}
        streams = [pool.submit(stream, running.url, **params) for _ in range(2)]  # one of the three waits
        whole = pool.submit(generate, running.url, **params)
        eventually(lambda: queue_length(running.url) == 3, "all there")
        assert running.stop() == 0
        for answer in (*(stream.result()[-1] for stream in streams), whole.result()):
            assert answer["error_code"] == 42903
            assert "shut down before the request was finished" in answer["text"]
        for word in ("disconnect", "Traceback", "Exception"):
            assert word not in running.output
