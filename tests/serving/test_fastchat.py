"""The worker's endpoints over a fake engine, through a real HTTP server. Each test names a promise to clients."""

import base64
import itertools
import logging
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from ipex_vllm.engines.generation import InternalError
from ipex_vllm.serving import fastchat
from tests.support import FakeEngine, generate, make_server, raw_post, serving, split_frames, stream


def wait_until(condition: Any, what: str) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"still not: {what}")


def post(url: str, path: str, body: Any = None) -> Any:
    return httpx.post(url + path, json=body, timeout=30, trust_env=False).json()


def test_text_only_grows_and_its_last_form_comes_twice() -> None:
    with serving(make_server(FakeEngine([str(i) for i in range(30)], interval_s=0.005))) as url:
        frames = stream(url, prompt="p", echo=False)
    texts = [frame["text"] for frame in frames]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [frame["finish_reason"] for frame in frames[:-1]] == [None] * (len(frames) - 1)
    assert (frames[-1]["finish_reason"], frames[-1]["text"]) == ("stop", frames[-2]["text"])
    assert frames[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 30, "total_tokens": 31}


def test_text_that_looks_like_the_start_of_a_stop_string_is_not_swallowed() -> None:
    with serving(make_server(FakeEngine(["fine", " <"]))) as url:
        assert stream(url, prompt="p", echo=False, stop=["</s>", "<|im_end|>"])[-1]["text"] == "fine <"


def test_generate_answers_the_last_frame() -> None:
    with serving(make_server(FakeEngine())) as url:
        assert generate(url, prompt="p", echo=True) == stream(url, prompt="p", echo=True)[-1]


def test_several_choices() -> None:
    with serving(make_server(FakeEngine())) as url:
        assert [choice["text"] for choice in generate(url, prompt="p", echo=False, n=3)["choices"]] == [
            "Hello world"
        ] * 3


def test_an_error_is_the_only_or_last_frame_with_http_200() -> None:
    engine = FakeEngine(["begun", InternalError("The engine fell over. Send it again.")])
    with serving(make_server(engine)) as url:
        assert stream(url, prompt="p", max_new_tokens=-1)[-1]["error_code"] == 40302
        assert stream(url, prompt="p")[-1] == {"text": "The engine fell over. Send it again.", "error_code": 50001}
        assert generate(url, prompt="p")["error_code"] == 50001


def test_a_bug_is_a_frame_too_and_leaks_no_slot() -> None:
    server = make_server(FakeEngine(["begun", ZeroDivisionError("secret detail")]))
    with serving(server) as url:
        for _ in range(10):  # more than there are slots
            last = stream(url, prompt="p")[-1]
            assert last["error_code"] == 50001
            assert "secret" not in last["text"]
        assert post(url, "/worker_get_status")["queue_length"] == 0


@pytest.mark.parametrize("path", ["/worker_generate", "/count_token", "/worker_get_embeddings"])
@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff"])
def test_a_bad_body_is_an_error_in_the_protocols_form(path: str, body: bytes) -> None:
    with serving(make_server(FakeEngine())) as url:
        response = httpx.post(url + path, content=body, trust_env=False)
        assert (response.status_code, response.json()["error_code"]) == (200, 40302)
        frames = split_frames(httpx.post(url + "/worker_generate_stream", content=body, trust_env=False).content)
        assert frames[-1]["error_code"] == 40302


def test_overflow_is_refused_before_generation_with_the_numbers() -> None:
    engine = FakeEngine(context_length=10)
    with serving(make_server(engine)) as url:
        (frame,) = stream(url, prompt="x" * 10)
        assert frame["error_code"] == 40303
        assert "10 tokens" in frame["text"]
        assert stream(url, prompt="x" * 9)[-1]["error_code"] == 0
        assert post(url, "/model_details") == {"context_length": 10}


def test_tokens_beyond_the_context_are_counted_no_further_and_the_answer_has_both_an_error_and_a_count() -> None:
    """FastChat's API server takes the count alone, and tells its client of the overflow by it."""
    with serving(make_server(FakeEngine(context_length=1000))) as url:
        answer = post(url, "/count_token", {"prompt": "x" * 15_000_000})
    assert answer["error_code"] == 40303
    assert answer["text"].startswith("The prompt has at least 32768 tokens; the context holds 1000 ")
    assert answer["count"] == 32768


def test_another_model_is_refused_and_none_is_fine() -> None:
    with serving(make_server(FakeEngine())) as url:
        assert stream(url, prompt="p", model="other")[-1]["error_code"] == 40301
        assert stream(url, prompt="p", model="fake-model")[-1]["error_code"] == 0
        assert stream(url, prompt="p")[-1]["error_code"] == 0


class Embedding(FakeEngine):
    async def embed(self, inputs: Sequence[str]) -> tuple[list[list[float]], int]:
        return [[0.6, 0.8] for _ in inputs], 7


def test_embeddings_are_logged_and_counted_as_texts_are(caplog: pytest.LogCaptureFixture) -> None:
    server, headers = make_server(Embedding()), {"X-Request-Id": "abc"}
    with caplog.at_level(logging.INFO), serving(server) as url:
        for body in ({"input": "a"}, {"input": []}):
            answer = httpx.post(url + "/worker_get_embeddings", json=body, headers=headers, trust_env=False)
            assert answer.headers["x-request-id"] == "abc"
    lines = [record.getMessage() for record in caplog.records if "abc" in record.getMessage()]
    assert [line.split(" ttft")[0] for line in lines] == [
        "request abc stop prompt_tokens=7 completion_tokens=0",
        "request abc error 40302 prompt_tokens=0 completion_tokens=0",
    ]
    assert (server.core.tally.finished, server.core.tally.errors) == ({"stop": 1}, {40302: 1})


def test_embeddings_answer_a_clear_error_or_vectors() -> None:
    body = {"input": ["a", "b"]}
    with serving(make_server(FakeEngine())) as url:
        answer = post(url, "/worker_get_embeddings", body)
        assert answer["error_code"] == 40302
        assert "hf_worker" in answer["text"]
    with serving(make_server(Embedding())) as url:
        assert post(url, "/worker_get_embeddings", body) == {"embedding": [[0.6, 0.8]] * 2, "token_num": 7}
        encoded = post(url, "/worker_get_embeddings", {**body, "encoding_format": "base64"})["embedding"]
        assert struct.unpack("<2f", base64.b64decode(encoded[1])) == pytest.approx((0.6, 0.8))


def test_beyond_the_slots_requests_wait_and_beyond_the_queue_they_are_refused() -> None:
    server = make_server(FakeEngine(["a", "b"], interval_s=0.3), limit=2, queue_limit=3)
    with serving(server) as url, ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(generate, url, prompt="p") for _ in range(9)]
        wait_until(lambda: server.core.slots.queue_length == 5, "2 running and 3 waiting")
        assert post(url, "/worker_get_status") == {"model_names": ["fake-model"], "speed": 1, "queue_length": 5}
        codes = sorted(answer.result()["error_code"] for answer in answers)
        assert codes == [0] * 5 + [42903] * 4
        assert server.core.slots.queue_length == 0


def test_a_stream_shows_signs_of_life_while_it_queues_and_while_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastchat, "SIGN_OF_LIFE_S", 0.1)
    server = make_server(FakeEngine(["a", "b"], interval_s=0.5), limit=1)
    with serving(server) as url, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(httpx.post, f"{url}/worker_generate_stream", json={"prompt": "p"}) for _ in range(2)]
        contents = sorted((answer.result().content for answer in answers), key=lambda content: content.count(b"\0\0"))
    for content in contents:
        assert content.startswith(b"\0\0")
        assert split_frames(content)[-1]["text"] == "pab"
    first, second = (len(content.split(b"{")[0]) for content in contents)
    assert second > first, "the second one queued for as long as the first one ran"


def test_a_disconnect_frees_the_slot_and_the_engine_at_once() -> None:
    engine = FakeEngine(["x"] * 1000, interval_s=0.02)
    server = make_server(engine, limit=3)
    with serving(server) as url:
        for path in ("/worker_generate_stream", "/worker_generate", "/worker_generate_stream"):
            connections = [raw_post(url, path, {"prompt": "p"}) for _ in range(3)]
            wait_until(lambda: engine.num_running == 3, "all running")
            for connection in connections:
                connection.close()
            wait_until(lambda: engine.num_running == 0, "aborted")
            assert server.core.slots.num_in_use == 0
        assert server.core.tally.disconnects == 9


def test_a_request_that_waits_can_be_given_up() -> None:
    engine = FakeEngine(["x"] * 1000, interval_s=0.02)
    server = make_server(engine, limit=1)
    with serving(server) as url:
        running = raw_post(url, "/worker_generate_stream", {"prompt": "p"})
        wait_until(lambda: engine.num_running == 1, "running")
        waiting = raw_post(url, "/worker_generate_stream", {"prompt": "p"})
        wait_until(lambda: server.core.slots.num_waiting == 1, "waiting")
        waiting.close()
        wait_until(lambda: server.core.slots.num_waiting == 0, "gone")
        running.close()
        wait_until(lambda: server.core.slots.num_in_use == 0, "gone too")


def test_bytes_grow_linearly_with_the_output() -> None:
    """FastChat's frames repeat the whole text: one frame a token would send 4 times the bytes for twice the tokens."""

    def num_bytes(num_tokens: int) -> int:
        server = make_server(FakeEngine(["four"] * num_tokens, interval_s=0.001))
        with serving(server) as url:
            content = read_slowly(raw_post(url, "/worker_generate_stream", {"prompt": "p", "max_new_tokens": 10**6}))
        frames = split_frames(content)
        assert frames[-1]["text"] == "p" + "four" * num_tokens
        return len(content)

    assert num_bytes(2000) <= 2.5 * num_bytes(1000)


def test_the_event_loop_stays_free_while_a_long_prompt_is_counted() -> None:
    release = threading.Event()

    class Slow(FakeEngine):
        @property
        def tokenizer(self) -> Any:
            class Tokenizer:
                bos_token = None

                def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
                    assert release.wait(20)
                    return {"input_ids": [0] * len(text)}

            return Tokenizer()

    with serving(make_server(Slow(context_length=10**6))) as url, ThreadPoolExecutor(1) as pool:
        counting = pool.submit(post, url, "/count_token", {"prompt": "x" * 100_000})
        assert post(url, "/worker_get_status")["queue_length"] == 0
        assert not counting.done()
        release.set()
        assert counting.result() == {"count": 100_000, "error_code": 0}


def test_a_closed_worker_fails_the_poll_that_keeps_it_registered() -> None:
    server = make_server(FakeEngine())
    with serving(server) as url:
        assert httpx.get(url + "/ready", trust_env=False).status_code == 200
        server.core.slots.is_closed = True
        assert httpx.post(url + "/worker_get_status", trust_env=False).status_code == 503
        assert httpx.get(url + "/ready", trust_env=False).status_code == 503
        assert httpx.get(url + "/health", trust_env=False).status_code == 200
        assert generate(url, prompt="p")["error_code"] == 42903


def test_an_api_token_guards_every_endpoint() -> None:
    server = make_server(FakeEngine(), api_token="s3cret")
    with serving(server) as url:
        for route in server.app.routes:
            method = next(iter(getattr(route, "methods", None) or {"GET"}))
            refused = httpx.request(method, url + route.path, json={}, trust_env=False)  # type: ignore[attr-defined]
            assert (refused.status_code, refused.json()["error_code"]) == (401, 40101)
        headers = {"Authorization": "Bearer s3cret"}
        assert httpx.post(url + "/model_details", headers=headers, trust_env=False).status_code == 200


def test_one_log_line_a_request_with_its_id_and_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(make_server(FakeEngine())) as url:
        response = httpx.post(
            url + "/worker_generate", json={"prompt": "private"}, headers={"X-Request-Id": "abc"}, trust_env=False
        )
        assert response.headers["x-request-id"] == "abc"
    (line,) = [record.getMessage() for record in caplog.records if "abc" in record.getMessage()]
    assert "stop prompt_tokens=7 completion_tokens=2 ttft=" in line
    assert "private" not in caplog.text


def test_metrics_count_what_happened() -> None:
    with serving(make_server(FakeEngine())) as url:
        stream(url, prompt="p")
        stream(url, prompt="p", max_new_tokens=0)
        text = httpx.get(url + "/metrics", trust_env=False).text
    assert 'ipex_vllm_requests_total{finish_reason="stop"} 1.0' in text
    assert 'ipex_vllm_errors_total{error_code="40302"} 1.0' in text
    assert "ipex_vllm_completion_tokens_total 2.0" in text
    assert "ipex_vllm_slots_in_use 0.0" in text


def read_slowly(connection: socket.socket) -> bytes:
    """Read a chunked answer to its end, with pauses, and return its body."""
    raw = b""
    with connection:
        while part := connection.recv(16384):
            raw += part
            time.sleep(0.005)
    body, rest = b"", raw.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body
