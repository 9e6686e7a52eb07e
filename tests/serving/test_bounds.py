"""What one request may ask for: beyond it a client is told the bound, at once, and nobody else waits."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest

from ipex_vllm.engines.generation import InternalError
from ipex_vllm.engines.vllm_requests import request_error
from ipex_vllm.serving.large_bodies import MAX_BODY_BYTES
from tests.support import FakeEngine, generate, make_server, serving, split_frames

LONG = "x" * 10**6
TOO_MUCH = [
    ({"stop": [str(i) for i in range(10**6)]}, "stop has 1000000 strings; at most 128 are possible."),
    ({"stop": [LONG]}, "The stop strings have 1000000 characters; at most 16384 are possible."),
    ({"stop_token_ids": list(range(10**6))}, "stop_token_ids has 1000000 ids; at most 1024 are possible."),
    ({"stop_token_ids": [2**31]}, "a list of token ids (integers from 0 to 2147483647)"),
    ({"top_k": 2**40}, "top_k must be between -1 and 2147483647"),
    ({"n": 64, "logprobs": 20, "max_new_tokens": 900}, "at most 262144 are possible"),
    ({"n": 64, "logprobs": 20, "max_new_tokens": 1, "echo": True, "prompt": "p" * 900}, "at most 262144 are possible"),
    ({"temperature": LONG}, "temperature must be a number, not 'xxx"),
    ({"temperature": [LONG] * 10}, "temperature must be a number, not ['xxx"),
    ({"n": 10**4000}, "n must be between 1 and 64, not 1000"),
    ({"seed": {LONG: LONG}}, "seed must be an integer, not {'xxx"),
    ({"echo": LONG}, "echo must be true or false, not 'xxx"),
    ({"model": LONG}, "This worker serves fake-model, not 'xxx"),
]


@pytest.mark.parametrize(("params", "told"), TOO_MUCH, ids=lambda value: str(value)[:20])
def test_too_much_is_refused_with_the_bound_and_shown_in_part(
    params: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    with caplog.at_level(logging.DEBUG, "ipex_vllm"), serving(make_server(engine)) as url:
        answer = generate(url, **{"prompt": "p", "echo": False, **params})
    assert answer["error_code"] == (40301 if "model" in params else 40302)
    assert told in answer["text"]
    assert len(answer["text"]) < 400
    assert all(len(record.getMessage()) < 400 for record in caplog.records)
    assert engine.num_running == 0


def test_what_is_usual_is_not_too_much() -> None:
    with serving(make_server(FakeEngine())) as url:
        for params in (
            {"stop": [f"stop {i}" for i in range(128)], "stop_token_ids": list(range(1024))},
            {"logprobs": 20, "echo": True, "prompt": "p" * 900},
            {"n": 64, "logprobs": 1},
        ):
            assert generate(url, **{"prompt": "p", **params})["error_code"] == 0


def test_so_many_texts_to_embed_are_refused() -> None:
    with serving(make_server(FakeEngine())) as url:
        answer = httpx.post(f"{url}/worker_get_embeddings", json={"input": ["a"] * 2049}, trust_env=False).json()
    assert answer == {"text": "input has 2049 texts; at most 2048 are possible.", "error_code": 40302}


@pytest.mark.parametrize("path", ["/worker_generate", "/worker_generate_stream", "/count_token"])
@pytest.mark.parametrize("lone", [b'"prompt": "a\\ud800b"', b'"prompt": "a\xed\xa0\x80b"'], ids=["escaped", "raw"])
def test_half_a_surrogate_is_no_text(path: str, lone: bytes) -> None:
    assert refused(path, b"{" + lone + b"}") == (
        "prompt holds half of a surrogate pair, U+D800 at character 1, which is no text."
    )


@pytest.mark.parametrize("name", ["stop", "model"])
def test_half_a_surrogate_is_no_text_in_other_fields_either(name: str) -> None:
    text = refused("/worker_generate", json.dumps({"prompt": "p", name: "a\udfff"}).encode())
    assert text.startswith(f"{name} holds half of a surrogate pair, U+DFFF")


def test_brackets_within_brackets_are_no_json() -> None:
    assert "not JSON: maximum recursion depth" in refused("/worker_generate", b"[" * 10**6)


@pytest.mark.parametrize("path", ["/worker_generate", "/worker_generate_stream", "/count_token"])
def test_a_body_of_more_than_the_bound_is_refused(path: str) -> None:
    assert refused(path, b'{"prompt": "%s"}' % bytes(MAX_BODY_BYTES)) == "The request body is larger than 16 MiB."


def test_what_the_engine_library_refuses_is_told_in_part() -> None:
    assert len(str(request_error(ValueError(LONG), is_clients=True, has_died=False))) <= 300
    assert isinstance(request_error(ValueError("broken"), is_clients=False, has_died=False), InternalError)


def refused(path: str, body: bytes) -> str:
    with serving(make_server(FakeEngine())) as url:
        content = httpx.post(url + path, content=body, trust_env=False, timeout=30).content
    (answer,) = split_frames(content) if path.endswith("stream") else [json.loads(content)]
    assert answer["error_code"] == 40302
    text: str = answer["text"]
    return text
