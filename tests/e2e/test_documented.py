"""The pieces of the service as README and docs start them, word for word but for the model and where they listen."""

import contextlib
import sys
from pathlib import Path

import openai
import pytest

from tests.processes import Program, eventually, listed_models
from tests.support import free_port
from tests.test_docs import DOCUMENTS, ROOT, instructions

QUESTION = "What does itertools.chain do?"


def documented(document: Path, *words: str) -> list[list[str]]:
    """The document's commands that begin with these words."""
    assert document in DOCUMENTS
    return [command for command in instructions(document) if command[: len(words)] == [*words]]


def start(folder: Path, command: list[str], *more: str, **replaced: str) -> Program:
    """Start a documented `python -m ...`; `replaced` are placeholders and what stands for them here."""
    for old, new in replaced.items():
        command = [word.replace(old, new) for word in command]
    return Program(folder, sys.executable, *command[1:], *more)


def answer(api_url: str) -> str:
    with openai.OpenAI(base_url=f"{api_url}/v1", api_key="none", timeout=120) as client:
        messages = [{"role": "user", "content": QUESTION}]
        completion = client.chat.completions.create(model="demo", messages=messages, temperature=0)  # type: ignore[call-overload]
        content: str = completion.choices[0].message.content
        return content


@pytest.mark.runs(
    "python -m fastchat.serve.controller",
    "python -m ipex_vllm.worker --model-path /path/or/name --device cpu --low-bit sym_int4",
    "python -m ipex_vllm.fastchat_api",
)
def test_one_piece_at_a_time(tmp_path: Path) -> None:
    controller, worker, api = documented(ROOT / "README.md", "python", "-m")
    ports = [str(free_port()) for _ in range(3)]
    controller_url = f"http://127.0.0.1:{ports[0]}"
    address = ("--controller-address", controller_url)
    demo = [word.replace("/path/or/name", "demo") for word in worker]
    with (
        start(tmp_path / "controller", controller, "--port", ports[0]) as running,
        start(tmp_path / "worker", demo, "--port", ports[1], *address),
        start(tmp_path / "api", api, "--port", ports[2], *address),
    ):
        running.wait_until(lambda: listed_models(controller_url) == ["demo"], "worker")
        assert "iterable" in answer(f"http://127.0.0.1:{ports[2]}")


@pytest.mark.runs(
    "python -m ipex_vllm.up --only controller --host 10.0.0.1",
    "python -m ipex_vllm.up --only api --host 10.0.0.1 --controller-address http://10.0.0.1:21001",
    "python -m ipex_vllm.up --only web --host 10.0.0.1 --controller-address http://10.0.0.1:21001",
    "python -m ipex_vllm.up --only worker --host 10.0.0.2 --controller-address http://10.0.0.1:21001 "
    "--model-path MODEL",
)
def test_several_machines(tmp_path: Path) -> None:
    """Each of the machines is an address of this one."""
    machines = {"10.0.0.1": "127.0.0.11", "10.0.0.2": "127.0.0.12", "MODEL": "demo"}
    commands = documented(ROOT / "docs" / "several-machines.md", "python", "-m", "ipex_vllm.up", "--only")
    assert [command[4] for command in commands] == ["controller", "api", "web", "worker"]
    with contextlib.ExitStack() as stack:
        parts = []
        for command in commands:
            parts.append(stack.enter_context(start(tmp_path / command[4], command, **machines)))
            parts[0].wait_for_output("Ready:")  # the controller; the API server is ready when there is a worker
        for part in parts:
            part.wait_for_output("Ready:")
        eventually(lambda: listed_models("http://127.0.0.11:21001") == ["demo"], "registered")
        assert "iterable" in answer("http://127.0.0.11:8000")
