"""The supervisor: what it refuses to start, and how it says so. tests/e2e runs it for real."""

import asyncio
import io
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from fastapi import FastAPI
from rich.console import Console

from ipex_vllm.errors import OptionError
from ipex_vllm.supervisor import Service, ServiceFailed, Supervisor
from ipex_vllm.up import chats, make_services, read_options, up, welcome
from tests.processes import ROOT
from tests.support import FakeEngine, free_port, make_server, serving


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def script(name: str, code: str, is_ready: Callable[[], Awaitable[bool]]) -> Service:
    return Service(name, "worker", [sys.executable, "-c", code], free_port(), is_ready, stop_timeout_s=5)


async def always() -> bool:
    return True


async def never() -> bool:
    return False


async def test_a_port_in_use_is_one_line_and_starts_nothing() -> None:
    with serving(make_server(FakeEngine())) as url:
        port = url.rsplit(":", 1)[1]
        options, workers = read_options(["--api-port", port, "--controller-port", str(free_port()), "--no-web"])
        out = console()
        assert await up(options, workers, out) == 1
    assert printed(out).splitlines() == [
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another one with --api-port"
    ]


async def test_a_child_that_dies_before_it_is_ready_is_told_with_its_last_words() -> None:
    code = "import sys; print('loading'); print('error: no such model'); sys.exit(3)"
    supervisor = Supervisor([script("worker", code, never)], console(), is_verbose=False)
    with pytest.raises(ServiceFailed, match="worker ended with status 3 before it was ready: no such model"):
        await supervisor.start()
    await supervisor.stop()


async def test_children_are_groups_in_this_session() -> None:
    service = script("worker", "import time; time.sleep(1000)", always)
    supervisor = Supervisor([service], console(), is_verbose=False)
    await supervisor.start()
    assert service.process is not None
    pid = service.process.pid
    assert os.getpgid(pid) == pid, "Ctrl-C would reach it"
    assert os.getsid(pid) == os.getsid(0), "it would have to share the CPUs with an engine's session, and wait"
    await supervisor.stop()


async def test_what_dies_is_started_again_and_all_of_it_is_stopped(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    child = "import time; time.sleep(1000)"
    code = (
        f"import subprocess, sys; open({str(starts)!r}, 'a').write('x');"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    service = script("worker", code, always)
    out = console()
    supervisor = Supervisor([service], out, is_verbose=False)
    await supervisor.start()
    keeping = asyncio.create_task(supervisor.keep_alive())
    await reaches(lambda: starts.exists() and tree(service) == 2)
    assert service.process is not None
    first = psutil.Process(service.process.pid).children()
    service.process.send_signal(signal.SIGKILL)
    await reaches(lambda: starts.read_text() == "xx" and tree(service) == 2)
    assert not psutil.wait_procs(first, timeout=5)[1], "the dead child's own child would keep the port"
    keeping.cancel()
    left = psutil.Process(service.process.pid).children(recursive=True)
    await supervisor.stop()
    assert not psutil.wait_procs(left, timeout=5)[1]
    assert "ended with status -9; starting it again in 1 s" in printed(out)


def tree(service: Service) -> int:
    assert service.process is not None
    try:
        return 1 + len(psutil.Process(service.process.pid).children())
    except psutil.NoSuchProcess:
        return 0


async def reaches(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.05)


async def test_progress_bars_and_fastchats_stderr_are_readable_lines() -> None:
    code = (
        "print('10%', end='\\r'); print('100%');"
        "print('2026-01-01 00:00:00 | ERROR | stderr | a plain line');"
        "print('2026-01-01 00:00:00 | INFO | stdout | noise')"
    )
    out = console()
    service = script("worker", code, never)
    supervisor = Supervisor([service], out, is_verbose=False)
    with pytest.raises(ServiceFailed):
        await supervisor.start()
    await supervisor.stop()
    lines = printed(out).splitlines()
    assert "worker | 100%" in lines
    assert "worker | a plain line" in lines
    assert "noise" not in printed(out)


@pytest.mark.parametrize("is_verbose", [True, False])
async def test_the_workers_are_as_verbose_as_the_service(is_verbose: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPEX_VLLM_VERBOSE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    code = "import os; print(os.environ.get('IPEX_VLLM_VERBOSE'), os.environ.get('VLLM_LOGGING_LEVEL'))"
    service = script("worker", code, never)
    supervisor = Supervisor([service], console(), is_verbose)
    with pytest.raises(ServiceFailed, match="true None" if is_verbose else "None ERROR"):
        await supervisor.start()
    await supervisor.stop()


def test_a_file_describes_several_workers(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(
        "controller-port: 31001\nworkers:\n"
        "  - {model-path: /models/a, low_bit: sym_int4}\n"
        "  - {model-path: /models/b, port: 5000, module: workers.hf_worker, trust-remote-code: true, compile: false}\n"
    )
    options, workers = read_options(["--config", str(file), "--no-web"])
    services = make_services(options, workers)
    assert [service.name for service in services] == ["controller", "worker-0", "worker-1", "api"]
    first, second = (service.command for service in services[1:3])
    assert first[1:5] == ["-m", "ipex_vllm.worker", "--port", "21002"]
    assert {"--model-path=/models/a", "--low-bit=sym_int4", "--controller-address=http://127.0.0.1:31001"} <= {*first}
    assert second[1:5] == ["-m", "workers.hf_worker", "--port", "5000"]
    assert "--trust-remote-code" in second
    assert services[2].environ == {"IPEX_VLLM_COMPILE": "false"}, "which is not the same as saying nothing"
    assert '"model": "a"' in welcome(options, workers).replace("\\[", "[")


async def test_the_file_can_be_named_by_the_environment_and_the_workers_do_not_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("workers: [{model-path: /models/a}, {model-path: /models/b}]\n")
    monkeypatch.setenv("IPEX_VLLM_CONFIG", str(file))
    _, workers = read_options(["--no-web"])
    assert workers == [{"model-path": "/models/a"}, {"model-path": "/models/b"}]
    service = script("worker", "import os; print('file:', os.environ.get('IPEX_VLLM_CONFIG'))", never)
    supervisor = Supervisor([service], console(), is_verbose=False)
    with pytest.raises(ServiceFailed, match="file: None"):
        await supervisor.start()
    await supervisor.stop()


def test_replicas_take_consecutive_ports_and_one_piece_can_run_alone() -> None:
    options, workers = read_options(["--replicas", "3", "--only", "worker", "--controller-address", "http://far:1"])
    services = make_services(options, workers)
    assert [service.port for service in services] == [21002, 21003, 21004]
    assert all("--controller-address=http://far:1" in service.command for service in services)


def test_make_takes_a_path_with_a_space() -> None:
    command = ["make", "-n", "--no-print-directory", "serve", "MODEL=a b"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=60)
    assert shlex.split(made.stdout.splitlines()[-1])[-4:] == ["--model-path", "a b", "--device", "cpu"]


def test_a_list_of_names_reaches_the_worker_as_its_flag(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("workers: [{model-path: /models/a, model-names: [alpha, beta]}]")
    options, workers = read_options(["--config", str(file), "--no-web"])
    assert "--model-names=alpha,beta" in make_services(options, workers)[1].command
    assert '"model": "alpha"' in welcome(options, workers).replace("\\[", "[")


@pytest.mark.parametrize(
    "content",
    [
        "workers: 5",
        "workers: []",
        "nonsense: 1",
        "- a list",
        "workers: [{port: 5000}]",
        "workers: [{model-path: ~}]",
        "workers: [{model-path: demo, port: x}]",
        "workers: [{model-path: demo, model-names: ','}]",
        "worker-port: 70000",
        "replicas: 0",
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(content)
    with pytest.raises(OptionError, match=r"service\.yaml") as caught:
        read_options(["--config", str(file), "--no-web"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("embeds", [True, False])
async def test_a_model_that_gives_no_text_is_ready_when_it_embeds(embeds: bool) -> None:
    app = FastAPI()
    told = {"error": {"message": "This worker's model gives embeddings and scores, no text."}}
    app.get("/v1/models")(lambda: {"data": [{"id": "bert"}]})
    app.post("/v1/chat/completions")(lambda: told)
    app.post("/v1/embeddings")(lambda: {"data": []} if embeds else told)
    with serving(SimpleNamespace(app=app)) as url:  # type: ignore[arg-type]
        assert await chats(url) is embeds


async def test_a_further_host_of_a_model_is_not_waited_for_until_it_has_clients() -> None:
    options, _ = read_options(["--only", "worker", "--worker-port", str(free_port())])
    first, further = make_services(options, [{"model-path": "demo", "node-rank": rank} for rank in (0, 1)])
    assert [await first.is_ready(), await further.is_ready()] == [False, True]
