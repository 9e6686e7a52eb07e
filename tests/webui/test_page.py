"""FastChat's web UI in headless Chromium, on a real controller, a real worker with the demo model, and fake workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import expect
from transformers import AutoTokenizer

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.serving.conversation import ChatFormat, own_format
from ipex_vllm.serving.core import Core
from ipex_vllm.serving.fastchat import FastChatServer
from ipex_vllm.serving.slots import Slots
from tests.processes import Server, register
from tests.support import FakeEngine, serving
from tests.webui.conftest import OpenPage

QUESTION = "What does os.path.join do?"
ANSWER = "os.path.join joins two or more pathname components, inserting '/' as needed."
OTHER_QUESTION = "What is a deque?"
OTHER_ANSWER = "collections.deque is a list-like sequence optimized for data accesses near its endpoints."


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return own_format(AutoTokenizer.from_pretrained(MODEL_DIR))


@contextmanager
def fake_worker(
    controller: Server, engine: FakeEngine, name: str, chat_format: ChatFormat, *, reads_images: bool = False
) -> Iterator[str]:
    """Serve `engine` under `name` and make the controller know it; dies without a word to the controller."""
    server = FastChatServer(Core(engine, (name,), Slots(8, 8)), chat_format)
    with serving(server) as url:
        register(controller.url, url, server, reads_images=reads_images)
        yield url


def test_page_needs_no_outside_network_and_lists_the_model(open_page: OpenPage, demo_worker: Server) -> None:
    chat = open_page()
    assert "demo" in chat.models()
    expect(chat.question).to_be_editable()


@pytest.mark.runs(
    "make env-webui",
    ".venv/bin/python -m ipex_vllm.webui --controller-url http://127.0.0.1:21001",
)
def test_every_listening_socket_is_on_loopback(webui: Server, demo_worker: Server, controller: Server) -> None:
    assert [server.listening_at() for server in (webui, demo_worker, controller)] == [{"127.0.0.1"}] * 3


def test_answer_is_right_and_follows_up(open_page: OpenPage, demo_worker: Server) -> None:
    chat = open_page(model="demo")
    chat.set_parameter("Temperature", 0)
    assert chat.ask(QUESTION) == ANSWER
    assert "module" in chat.ask("And in which module is it?")
    expect(chat.answers).to_have_count(2)


def test_answer_streams_in(open_page: OpenPage, controller: Server, chat_format: ChatFormat) -> None:
    words = [f"word{i} " for i in range(40)]
    with fake_worker(controller, FakeEngine(words, interval_s=0.05), "scribe", chat_format):
        chat = open_page(model="scribe")
        chat.record_answers()
        assert chat.ask("Count") == "".join(words).strip()
    states = [state.removesuffix("▌").strip() for state in chat.recorded_answers()]
    assert len(states) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(states))


def test_worker_gets_the_prompt_of_the_models_own_chat_template(
    open_page: OpenPage, controller: Server, chat_format: ChatFormat
) -> None:
    """FastChat's registry would answer `one_shot`, with a dialogue about somebody else, for this name."""
    engine = FakeEngine(["Fine."])
    with fake_worker(controller, engine, "scribe", chat_format):
        chat = open_page(model="scribe")
        chat.ask("How are you?")
        chat.ask("Really?")
    dialogue = [{"role": "user", "content": "How are you?"}]
    longer = [*dialogue, {"role": "assistant", "content": "Fine."}, {"role": "user", "content": "Really?"}]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert [request.prompt for request in engine.seen] == [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in (dialogue, longer)
    ]


def test_sliders_reach_the_worker(open_page: OpenPage, controller: Server, chat_format: ChatFormat) -> None:
    engine = FakeEngine(["Fine."])
    with fake_worker(controller, engine, "scribe", chat_format):
        chat = open_page(model="scribe")
        chat.set_parameter("Temperature", 0.2)
        chat.set_parameter("Top P", 0.5)
        chat.set_parameter("Max output tokens", 80)
        chat.ask("How are you?")
    [request] = engine.seen
    assert (request.temperature, request.top_p, request.max_new_tokens) == (0.2, 0.5, 80)


def test_temperature_zero_twice_gives_the_same_text(open_page: OpenPage, demo_worker: Server) -> None:
    chat = open_page(model="demo")
    chat.set_parameter("Temperature", 0)
    first = chat.ask(OTHER_QUESTION)
    assert first == OTHER_ANSWER
    chat.regenerate.click()
    expect(chat.clear).to_be_disabled()
    assert chat.wait() == first
    expect(chat.answers).to_have_count(1)


def test_clear_empties_the_chat(open_page: OpenPage, demo_worker: Server) -> None:
    chat = open_page(model="demo")
    chat.ask(QUESTION)
    chat.clear.click()
    expect(chat.questions).to_have_count(0)
    expect(chat.answers).to_have_count(0)
    chat.ask(OTHER_QUESTION)
    expect(chat.questions).to_have_count(1)


def test_two_tabs_chat_at_the_same_time(open_page: OpenPage, controller: Server, chat_format: ChatFormat) -> None:
    engine = FakeEngine([f"{i} " for i in range(60)], interval_s=0.05)
    with fake_worker(controller, engine, "scribe", chat_format):
        tabs = [open_page(model="scribe") for _ in range(2)]
        for number, tab in enumerate(tabs):
            tab.send(f"Question {number}")
        for tab in tabs:
            expect(tab.answers.last).to_contain_text("5")
        assert engine.num_running == 2
        answers = [tab.wait() for tab in tabs]
    assert answers[0] == answers[1] == " ".join(map(str, range(60)))
    assert [tab.questions.all_inner_texts() for tab in tabs] == [["Question 0"], ["Question 1"]]


def test_stopped_worker_is_told_and_the_page_works_when_it_is_back(open_page: OpenPage, demo_worker: Server) -> None:
    chatting, fresh = open_page(model="demo"), open_page(model="demo")
    chatting.set_parameter("Temperature", 0)
    assert chatting.ask(QUESTION) == ANSWER
    demo_worker.stop()
    assert "NETWORK ERROR" in chatting.ask(OTHER_QUESTION)
    fresh.question.fill(QUESTION)
    fresh.question.press("Enter")
    expect(fresh.page.get_by_text("No worker serves 'demo'")).to_be_visible()

    demo_worker.start()
    chatting.regenerate.click()
    expect(chatting.answers.last).to_contain_text("deque")
    fresh.page.reload()
    fresh.wait_loaded()
    fresh.set_parameter("Temperature", 0)
    assert fresh.ask(QUESTION) == ANSWER


def test_worker_that_vanished_is_told(open_page: OpenPage, controller: Server, chat_format: ChatFormat) -> None:
    with fake_worker(controller, FakeEngine(["Fine."]), "scribe", chat_format):
        chat = open_page(model="scribe")
        chat.ask("How are you?")
    answer = chat.ask("Are you there?")
    assert "NETWORK ERROR" in answer
    assert "error_code: 50003" in answer


def test_a_model_that_reads_pictures_is_listed_and_answers_text(
    open_page: OpenPage, controller: Server, chat_format: ChatFormat
) -> None:
    with fake_worker(controller, FakeEngine(["Fine."]), "painter", chat_format, reads_images=True):
        chat = open_page(model="painter")
        assert "painter" in chat.models()
        assert chat.ask("How are you?") == "Fine."


def test_name_that_fastchat_would_send_to_openai(
    open_page: OpenPage, controller: Server, chat_format: ChatFormat
) -> None:
    with fake_worker(controller, FakeEngine(["Fine."]), "my-gpt-4", chat_format):
        assert open_page(model="my-gpt-4").ask("How are you?") == "Fine."


def test_nothing_typed_is_kept(open_page: OpenPage, webui: Server, demo_worker: Server) -> None:
    open_page(model="demo").ask("What is a needle-in-the-log?")
    assert "needle" not in webui.output
    assert list(webui.folder.iterdir()) == []


@pytest.mark.parametrize(("theme", "is_dark"), [("light", False), ("dark", True)])
def test_themes(open_page: OpenPage, demo_worker: Server, tmp_path: Path, theme: str, is_dark: bool) -> None:
    """Also takes the pictures in docs/images, with SCREENSHOTS=docs/images."""
    chat = open_page(model="demo", __theme=theme)
    chat.set_parameter("Temperature", 0)
    chat.ask(OTHER_QUESTION)
    chat.ask(QUESTION)
    color: str = chat.page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    red, green, blue = map(int, color.removeprefix("rgb(").removesuffix(")").split(","))
    assert (red + green + blue < 200) == is_dark
    chat.page.screenshot(path=Path(os.environ.get("SCREENSHOTS", tmp_path)) / f"webui-{theme}.png")
