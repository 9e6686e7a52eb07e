"""Requests of every kind that clients could send, and what every answer must be.

By hand, against a service that runs: `python -m tests.fuzz --minutes 60 --worker URL --api URL --pid PID`. It ends with
a count of the outcomes, and of what each process holds, or with the first answer that was none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.watch import Watch

WORKER_PATHS = ("/worker_generate", "/worker_generate_stream", "/worker_get_embeddings", "/count_token")
WORKER_PATHS += ("/worker_get_status", "/worker_get_conv_template", "/model_details")
OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")
OPENAI_PATHS += ("/tokenize", "/detokenize", "/v1/messages/count_tokens")  # the worker's own
API_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/api/v1/token_check")
LAST_EVENTS = ("data: [DONE]", "event: message_stop", "event: error")
LAST_EVENTS += ("event: response.completed", "event: response.incomplete", "event: response.failed")
TIMEOUT_S = 60
MAX_ERROR = 1500  # characters

texts = st.text(st.characters(), max_size=30)  # halves of surrogates among them
numbers = st.one_of(
    st.integers(-3, 70), st.integers(), st.floats(), st.floats(-3, 3), st.sampled_from([2**31, 2**63, 1e308])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts, st.just("word " * 1000))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "", None])
parts = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"])}, optional={"text": values}), max_size=3
)
messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": roles, "content": st.one_of(texts, parts, values), "name": values}),
    max_size=4,
)
fields: dict[str, st.SearchStrategy[Any]] = {
    **{
        name: st.one_of(texts, values)
        for name in ("prompt", "model", "input", "stop", "suffix", "user", "encoding_format")
    },
    **{name: st.one_of(numbers, values) for name in ("temperature", "top_p", "top_k", "min_p", "n", "best_of", "seed")},
    **{name: st.one_of(numbers, values) for name in ("max_new_tokens", "max_tokens", "logprobs", "presence_penalty")},
    **{
        name: st.one_of(numbers, values)
        for name in ("frequency_penalty", "repetition_penalty", "max_completion_tokens")
    },
    **{name: st.one_of(st.booleans(), values) for name in ("echo", "ignore_eos", "use_beam_search", "stream")},
    **dict.fromkeys(("stop_token_ids", "tools", "response_format", "logit_bias", "stream_options", "prompts"), values),
    "messages": st.one_of(messages, values),
}
objects = st.fixed_dictionaries({}, optional=fields)
required: dict[str, st.SearchStrategy[Any]] = {"prompt": texts, "input": texts, "messages": messages}
usable = st.fixed_dictionaries(
    required, optional={name: field for name, field in fields.items() if name not in required}
)


@st.composite
def bodies(draw: st.DrawFn, model: str) -> bytes:
    """A body: mostly JSON, mostly of fields that exist, sometimes with bytes of it changed."""
    content = draw(st.one_of(objects, usable, usable.map(lambda body: {**body, "model": model}), values))
    body = json.dumps(content, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        start = draw(st.integers(0, len(body)))
        body = body[:start] + draw(st.binary(max_size=8)) + body[start + draw(st.integers(0, 8)) :]
    return body


def check(path: str, response: httpx.Response) -> str:
    """The outcome, in a word. Raises AssertionError for an answer that is none in the protocol's form."""
    if path not in WORKER_PATHS:
        return check_openai(response)
    assert response.status_code == 200
    if path == "/worker_generate_stream":
        *frames, rest = response.content.split(b"\0")
        assert rest == b""
        last = json.loads([frame for frame in frames if frame][-1])
        assert last["error_code"] or last["finish_reason"]
    else:
        last = json.loads(response.content)
    if last.get("error_code"):
        assert len(last["text"]) < 600, "an error repeats no more than a little of what it refuses"
        assert last["error_code"] != 50001, last
    return str(last.get("error_code", 0))


def check_openai(response: httpx.Response) -> str:
    if response.headers["content-type"].startswith("text/event-stream"):
        *_, last, rest = response.text.split("\n\n")
        assert (rest, last.split("\n")[0]) in [("", end) for end in LAST_EVENTS], response.text[-500:]
        return "stream"
    answer = json.loads(response.content)
    assert response.status_code < 500, answer
    if response.status_code >= 400:
        error = answer.get("error", answer)  # FastChat's own have the object's fields on top
        assert error["message"]
        assert len(error["message"]) < MAX_ERROR
    return str(response.status_code)


def fuzz(client: httpx.Client, paths: tuple[str, ...], model: str, num_examples: int) -> Counter[str]:
    """Send so many bodies; return how often each outcome was. Raises AssertionError for an answer that is none."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=num_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(paths), bodies(model))
    def send(path: str, body: bytes) -> None:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        outcomes[f"{path} {check(path, response)}"] += 1

    send()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", required=True, help="URL of a worker")
    parser.add_argument("--api", help="URL of FastChat's API server")
    parser.add_argument("--model", default="demo", help="a name that they serve")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--pid", type=int, required=True, help="the process whose tree is watched")
    options = parser.parse_args()
    targets = [(options.worker, WORKER_PATHS), (options.worker, OPENAI_PATHS), (options.api, API_PATHS)]
    clients = [(httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False), paths) for url, paths in targets if url]
    outcomes: Counter[str] = Counter()
    watch = Watch(options.pid)
    end = time.monotonic() + 60 * options.minutes
    try:
        while time.monotonic() < end:
            for client, paths in clients:
                outcomes += fuzz(client, paths, options.model, 200)
                watch.look()
    finally:
        for outcome, count in sorted(outcomes.items()):
            print(f"{count:8} {outcome}")
        print(f"{sum(outcomes.values()):8} bodies")
        print(*watch.report(), sep="\n")


if __name__ == "__main__":
    main()
