"""FastChat's API server in front of two workers as processes, of which one dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import Server, eventually, fake_worker, fastchat_api, fastchat_controller

NUM_TEXTS = 2
INTERVAL_S = 1.5
USER = {"role": "user", "content": "Hi"}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [USER], "stream": True}),
    ("/v1/chat/completions", {"messages": [USER]}),
    ("/v1/completions", {"prompt": "p", "stream": True}),
    ("/v1/completions", {"prompt": "p"}),
]


@dataclass
class Pair:
    controller_url: str
    api: Server
    workers: tuple[Server, Server]

    def both_run(self) -> None:
        """Whatever was before, both run, and the controller knows that."""
        for worker in self.workers:
            if worker.process.poll() is not None:
                worker.start()
            body = {"worker_name": worker.url, "check_heart_beat": False, "worker_status": None}
            self.post(f"{self.controller_url}/register_worker", body)

    def post(self, url: str, body: Any) -> httpx.Response:
        return httpx.post(url, json=body, timeout=60, trust_env=False)

    def ask(self, kind: tuple[str, dict[str, Any]]) -> httpx.Response:
        path, body = kind
        return self.post(self.api.url + path, {"model": "demo", "max_tokens": NUM_TEXTS, **body})


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("retry")
    texts = {"FAKE_TEXTS": "10", "FAKE_INTERVAL_S": str(INTERVAL_S)}
    with (
        fastchat_controller(folder / "controller") as controller,
        fastchat_api(folder / "api", controller.url) as api,
        fake_worker(folder / "first", **texts) as first,
        fake_worker(folder / "second", **texts) as second,
    ):
        yield Pair(controller.url, api, (first, second))


@pytest.fixture
def pair(started: Pair) -> Pair:
    started.both_run()
    return started


def text_of(answer: httpx.Response) -> str:
    """What was said, streamed or not; a stream begins once and ends once."""
    assert answer.status_code == 200, answer.text
    if not answer.headers["content-type"].startswith("text/event-stream"):
        choice = answer.json()["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert sum(choice.get("delta", {}).get("role") is not None for choice in choices) <= 1
    return "".join(choice["delta"].get("content") or "" if "delta" in choice else choice["text"] for choice in choices)


def test_what_a_dead_worker_would_get_is_answered_by_another(pair: Pair) -> None:
    pair.workers[0].kill()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(pair.ask, KINDS * 2))
    assert [text_of(answer) for answer in answers] == ["word " * NUM_TEXTS] * 8
    with httpx.Client(trust_env=False) as client:
        address = {"model": "demo"}
        asked = [client.post(f"{pair.controller_url}/get_worker_address", json=address).json() for _ in range(2)]
    assert asked == [{"address": pair.workers[1].url}] * 2, "the controller knows of it"


def test_what_a_worker_has_begun_without_a_token_is_answered_by_another(pair: Pair) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(pair.ask, kind) for kind in KINDS * 2]
        eventually(lambda: all(num_running(worker) == 4 for worker in pair.workers), "both have begun")
        pair.workers[0].kill()
        assert [text_of(answer.result()) for answer in answers] == ["word " * NUM_TEXTS] * 8


def num_running(worker: Server) -> int:
    return int(httpx.post(f"{worker.url}/worker_get_status", trust_env=False).json()["queue_length"])


def test_what_has_a_token_is_not_begun_anew(pair: Pair) -> None:
    body = {"model": "demo", "prompt": "p", "stream": True, "max_tokens": 10}
    seen = ""
    with httpx.stream("POST", f"{pair.api.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
        for text in answer.iter_text():
            if "word" in text and not seen:
                (busy,) = [worker for worker in pair.workers if num_running(worker)]
                busy.kill()
            seen += text
    *events, error, done, rest = seen.split("\n\n")
    assert 1 <= len([event for event in events if "word" in event]) < 10
    assert "does not answer" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert (done, rest) == ("data: [DONE]", "")


def test_where_no_worker_is_left_that_is_told_at_once(pair: Pair) -> None:
    for worker in pair.workers:
        worker.kill()
    for path, body in KINDS:
        pair.post(f"{pair.controller_url}/register_worker", {**KNOWN, "worker_name": pair.workers[0].url})
        answer = pair.ask((path, body))
        error = json.loads(answer.text.removesuffix("\n\ndata: [DONE]\n\n").split("data: ")[-1])["error"]
        assert (answer.status_code, error["type"]) == (503, "server_error")
        assert "Try again later." in error["message"]


KNOWN = {"check_heart_beat": False, "worker_status": {"model_names": ["demo"], "speed": 1, "queue_length": 0}}
