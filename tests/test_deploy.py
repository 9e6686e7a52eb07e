"""The recipes in docs/deploy, each given to the tool that reads it in earnest."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from ipex_vllm.options import WorkerOptions, from_namespace, layered_arguments
from ipex_vllm.serving.conversation import ChatFormat
from ipex_vllm.serving.core import Core
from ipex_vllm.serving.fastchat import FastChatServer
from ipex_vllm.serving.slots import Slots
from ipex_vllm.worker import make_parser
from tests.processes import Program, fastchat_stack
from tests.serving.test_fastchat import wait_until
from tests.serving.test_openai import ask, make
from tests.support import FakeEngine, free_port, serving
from tests.test_chat import CHATML

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
BIN = Path(sys.executable).parent


def tool(name: str) -> str:
    path = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert path, f"{name} is missing: run `make deploy-tools`"
    return path


def check(*command: str | Path, **options: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile() -> None:
    check(BIN / "hadolint", DEPLOY / "Dockerfile")


def test_compose_file() -> None:
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_kubernetes_manifest() -> None:
    check(BIN / "kubernetes-validate", "--strict", "--quiet", DEPLOY / "kubernetes.yaml")


def test_systemd_units(tmp_path: Path) -> None:
    for path in (DEPLOY / "systemd").glob("ipex-vllm*"):
        # What is verified includes that the programs exist: here they are in another directory.
        text = path.read_text().replace("/opt/ipex-vllm/.venv/bin/python", sys.executable)
        (tmp_path / path.name.replace("@.", "@demo.")).write_text(text)
    check(tool("systemd-analyze"), "verify", *sorted(tmp_path.iterdir()))


def commands() -> Iterator[list[str]]:
    """The command of every program in the recipes, as words that follow `python -m`."""
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        yield service["command"]
    for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()):
        if document["kind"] == "Deployment":
            [container] = document["spec"]["template"]["spec"]["containers"]
            yield container["args"]
    for path in (DEPLOY / "systemd").glob("*.service"):
        [line] = [line for line in path.read_text().splitlines() if line.startswith("ExecStart=")]
        yield shlex.split(line.partition(" -m ")[2])


def flags_of(module: str) -> set[str]:
    """All flags that the recipes give to a program."""
    words = [word for command in commands() if command[0] == module for word in command[1:]]
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize("module", ["fastchat.serve.controller", "fastchat.serve.openai_api_server", "ipex_vllm.webui"])
def test_flags_are_those_of_the_programs(module: str) -> None:
    given = flags_of(module.replace("fastchat.serve.openai_api_server", "ipex_vllm.fastchat_api"))
    assert given
    # FastChat sends its own standard output through its log, to standard error, and with LOGDIR to a file.
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "LOGDIR": ""},
        text=True,
        check=True,
    ).stdout
    assert not [flag for flag in given if flag not in shown]


def test_flags_of_the_worker() -> None:
    parser = make_parser(load=None)
    for module, *arguments in commands():
        if module == "ipex_vllm.worker":
            filled_in = [argument.replace("$(POD_IP)", "10.0.0.7") for argument in arguments]  # as Kubernetes does
            assert parser.parse_args(filled_in).port == 21002


def test_worker_options_of_the_systemd_unit() -> None:
    lines = (DEPLOY / "systemd" / "demo.env").read_text().splitlines()
    environ = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    parser = make_parser(load=None)
    options = from_namespace(WorkerOptions, parser.parse_args(layered_arguments(parser, [], environ)))
    assert (options.model_path, options.port) == ("demo", 21002)
    assert len(environ) == 3
    assert options.controller_address == "http://127.0.0.1:21001"


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(interval_s=0.05, context_length=10_000)


@contextlib.contextmanager
def running_nginx(directory: Path, recipe: str, ready_path: str, **replaced: str) -> Iterator[str]:
    """A recipe's server block in a real nginx, with this test's addresses; yields its URL."""
    url = f"127.0.0.1:{free_port()}"
    text = (DEPLOY / recipe).read_text()
    for old, new in (("listen 80;", f"listen {url};"), *replaced.items()):
        assert old in text
        text = text.replace(old, new)
    # The rest of nginx's configuration, as Debian has it, in directories of this test's own.
    paths = "".join(f"{name}_temp_path {directory}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    main = f"daemon off; pid {directory}/pid; events {{}} http {{ access_log off; {paths}\n{text} }}"
    (directory / "nginx.conf").write_text(main)
    command = (tool("nginx"), "-e", f"{directory}/error.log", "-c", f"{directory}/nginx.conf")
    check(*command, "-t")
    with Program(directory / "nginx", *command, ready_at=f"http://{url}{ready_path}"):
        yield f"http://{url}"


@pytest.fixture(scope="module")
def nginx(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real nginx in front of FastChat's API server and a worker; yields its URL."""
    directory = tmp_path_factory.mktemp("service")
    with fastchat_stack(directory, FastChatServer(Core(engine, ("fake",), Slots(8, 8)), ChatFormat(CHATML))) as stack:
        api = stack.openai_server.partition("//")[2]
        with running_nginx(directory, "nginx.conf", "/v1/models", **{"127.0.0.1:8000": api}) as url:
            yield url


def chat_through(url: str) -> contextlib.AbstractContextManager[httpx.Response]:
    body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "Go on"}]}
    return httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def test_nginx_streams(nginx: str, engine: FakeEngine) -> None:
    engine.texts = [f"word{i} " for i in range(60)]
    with chat_through(nginx) as response:
        lines = response.iter_lines()
        next(line for line in lines if "word2" in line)
        assert engine.num_running == 1, "the answer came only when it was complete"
        assert any("word59" in line for line in lines)


def test_client_that_leaves_through_nginx_is_noticed(nginx: str, engine: FakeEngine) -> None:
    engine.texts = ["word "] * 10_000  # eight minutes
    with chat_through(nginx) as response:
        next(line for line in response.iter_lines() if "word" in line)
    while engine.num_running:
        time.sleep(0.05)


def test_nginx_shares_requests_among_workers_and_passes_on_what_one_refuses(tmp_path: Path) -> None:
    (first, one), (second, other) = (make(limit=2, queue_limit=0) for _ in range(2))
    with serving(first) as first_url, serving(second) as second_url, ThreadPoolExecutor(4) as pool:
        workers = {"127.0.0.1:21002": first_url, "127.0.0.1:21003": second_url}
        replaced = {address: url.partition("//")[2] for address, url in workers.items()}
        with running_nginx(tmp_path, "nginx-workers.conf", "/v1/models", **replaced) as url:
            running = [pool.submit(ask, url, tokens=100, interval_s=0.02) for _ in range(4)]
            wait_until(lambda: (one.num_running, other.num_running) == (2, 2), "two requests on each")
            assert ask(url).status_code == 429
            assert [answer.result().status_code for answer in running] == [200] * 4
            first.core.slots.is_closed = True  # it drains
            assert [ask(url).status_code for _ in range(6)] == [200] * 6
            # A request is counted once its answer is out, so the client may know first.
            wait_until(lambda: second.core.tally.finished["stop"] >= 8, "the second worker has answered eight")
