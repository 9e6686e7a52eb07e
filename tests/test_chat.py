"""The terminal chat, typed at through a pseudo-terminal, on a fake worker behind FastChat's own servers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pexpect
import pytest
from fastchat.conversation import SeparatorStyle

from ipex_vllm.serving.conversation import ChatFormat
from ipex_vllm.serving.core import Core
from ipex_vllm.serving.fastchat import FastChatServer
from ipex_vllm.serving.slots import Slots
from tests.processes import Stack, fastchat_stack
from tests.support import FakeEngine, free_port, serving

CHATML = {
    "name": "chat_template",
    "system_template": "{system_message}",
    "system_message": "",
    "roles": ["<user>", "<reply>"],
    "messages": [],
    "offset": 0,
    "sep_style": int(SeparatorStyle.NO_COLON_TWO),
    "sep": "</user>",
    "sep2": "</reply>",
    "stop_str": None,
    "stop_token_ids": [],
}
NAMES = ("first-model", "second-model")

Open = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(context_length=10_000)


class ModelsAskedFor(Core):
    """Keeps the names that clients send, which no engine sees."""

    asked: ClassVar[list[str | None]] = []

    def check_model(self, model: str | None) -> None:
        self.asked.append(model)
        super().check_model(model)


@pytest.fixture(scope="module")
def stack(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    server = FastChatServer(ModelsAskedFor(engine, NAMES, Slots(8, 8)), ChatFormat(CHATML))
    with fastchat_stack(tmp_path_factory.mktemp("service"), server) as stack:
        yield stack


@pytest.fixture(params=["worker", "controller", "openai_server"])
def url(stack: Stack, request: pytest.FixtureRequest) -> str:
    """One after the other, everything that can be chatted with."""
    address: str = getattr(stack, request.param)
    return address


@pytest.fixture
def open_chat(engine: FakeEngine, tmp_path: Path) -> Iterator[Open]:
    engine.seen.clear()
    ModelsAskedFor.asked.clear()
    engine.texts, engine.interval_s = ("Hello", " world"), 0.0
    opened = []

    def open_chat(*arguments: str) -> pexpect.spawn[str]:
        command = ["-m", "ipex_vllm.chat", *arguments]
        chat = pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=60, dimensions=(40, 200))
        opened.append(chat)
        return chat

    yield open_chat
    for chat in opened:
        chat.close(force=True)


def test_answers_and_remembers(open_chat: Open, url: str, engine: FakeEngine) -> None:
    chat = open_chat("--url", url, "--temperature", "0.5")
    chat.expect_exact("> ")
    chat.sendline("One?")
    chat.expect_exact("Hello world")
    chat.expect_exact("> ")
    chat.sendline("Two?")
    chat.expect_exact("Hello world")
    chat.expect_exact("> ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    assert [request.prompt for request in engine.seen] == [
        "<user>One?</user><reply>",
        "<user>One?</user><reply>Hello world</reply><user>Two?</user><reply>",
    ]
    assert {request.temperature for request in engine.seen} == {0.5}


def test_ctrl_c_stops_the_answer_and_not_the_program(open_chat: Open, url: str, engine: FakeEngine) -> None:
    engine.texts, engine.interval_s = [f"word{i} " for i in range(1000)], 0.05
    chat = open_chat("--url", url)
    chat.expect_exact("> ")
    chat.sendline("Go on")
    chat.expect_exact("word3")  # it streams: the thousandth is a minute away
    chat.sendintr()
    chat.expect_exact("(stopped)")
    chat.expect_exact("> ")
    engine.texts, engine.interval_s = ["Done."], 0.0
    chat.sendline("And now?")
    chat.expect_exact("Done.")
    assert "word3" in engine.seen[-1].prompt, "what was seen of a stopped answer is part of the conversation"
    assert "word900" not in engine.seen[-1].prompt
    chat.expect_exact("> ")
    chat.sendintr()
    chat.expect_exact("/quit")
    chat.expect_exact("> ")
    chat.sendline("/quit")
    chat.expect(pexpect.EOF)


def test_stopped_answer_is_aborted_at_the_worker(open_chat: Open, stack: Stack, engine: FakeEngine) -> None:
    engine.texts, engine.interval_s = ["word "] * 1000, 0.05
    chat = open_chat("--url", stack.worker)
    chat.expect_exact("> ")
    chat.sendline("Go on")
    chat.expect_exact("word word")
    assert engine.num_running == 1
    chat.sendintr()
    chat.expect_exact("> ")
    chat.sendline("/model")
    chat.expect_exact("* first-model")
    while engine.num_running:
        time.sleep(0.05)


def test_commands(open_chat: Open, stack: Stack, engine: FakeEngine) -> None:
    chat = open_chat("--url", stack.controller, "--model", "second-model", "--system", "Be brief.")
    for line, answer in (
        ("/model", "* second-model"),
        ("/model first-model", "* first-model"),
        ("/model third-model", "there is no model 'third-model': choose from first-model, second-model"),
        ("/set temperature 0.2", "temperature 0.2"),
        ("/set max_tokens 1", "max_tokens 1"),
        ("/set temperature warm", "temperature takes a number"),
        ("/set warmth 1", "there is no setting 'warmth'"),
        ("/nonsense", "there is no command /nonsense"),
        ("/help", "/quit"),
        ("One?", "Hello"),
        ("/clear", "A new conversation."),
        ("Two?", "Hello"),
        ("/system Be long.", "A new conversation."),
        ("Three?", "Hello"),
    ):
        chat.expect_exact("> ")
        chat.sendline(line)
        chat.expect_exact(answer)
    assert [request.prompt for request in engine.seen] == [
        "Be brief.<user>One?</user><reply>",
        "Be brief.<user>Two?</user><reply>",
        "Be long.<user>Three?</user><reply>",
    ]
    assert {(r.temperature, r.max_new_tokens) for r in engine.seen} == {(0.2, 1)}
    assert ModelsAskedFor.asked == ["first-model"] * 3


def test_error_is_one_line_and_the_question_is_forgotten(open_chat: Open, url: str, engine: FakeEngine) -> None:
    chat = open_chat("--url", url)
    chat.expect_exact("> ")
    chat.sendline("/set temperature -1")
    chat.expect_exact("> ")
    chat.sendline("One?")
    chat.expect(r"error: [^\n]*temperature")
    chat.expect_exact("> ")
    chat.sendline("/set temperature 0")
    chat.expect_exact("> ")
    chat.sendline("Two?")
    chat.expect_exact("Hello world")
    assert [request.prompt for request in engine.seen] == ["<user>Two?</user><reply>"]


def test_nobody_there(open_chat: Open) -> None:
    chat = open_chat("--url", f"http://127.0.0.1:{free_port()}")
    chat.expect(r"error: http://127.0.0.1:[^\n]* does not answer [^\n]*: is it running")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 1


def test_token(open_chat: Open, engine: FakeEngine) -> None:
    server = FastChatServer(Core(engine, NAMES, Slots(8, 8)), ChatFormat(CHATML), api_token="secret")
    with serving(server) as url:
        chat = open_chat("--url", url)
        chat.expect_exact("asks for a token: give it with --api-token")
        chat = open_chat("--url", url, "--api-token", "secret")
        chat.expect_exact("> ")
        chat.sendline("One?")
        chat.expect_exact("Hello world")
