"""Bodies are read as the standard library reads them, but quickly, and never as something that is no JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from ipex_vllm.serving.json_bodies import dumps, install, loads
from ipex_vllm.serving.large_bodies import LARGE

VALUES = [
    {"prompt": 'a "b" \\ \n\t\u2028 漢 \U0001f600', "n": 1, "stop": None, "logit_bias": {"1": -0.5}, "stream": True},
    [2**63, -(2**63) - 1, 10**40, 1.5e-300, 0.1, -0.0, [], {}, ""],
    "text",
]
LARGE_TEXT = "large " * (LARGE // 6 + 1)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("ascii_alone", [True, False])
def test_what_the_standard_library_wrote_is_read_as_it_was(value: object, ascii_alone: bool) -> None:
    assert loads(json.dumps(value, ensure_ascii=ascii_alone).encode()) == value


@pytest.mark.parametrize("value", VALUES)
def test_what_is_written_is_what_the_standard_library_reads(value: object) -> None:
    assert json.loads(dumps(value)) == value


def test_half_a_surrogate_is_read_and_not_written() -> None:
    for body in (b'"a\\ud800"', b'"a\xed\xa0\x80"'):
        assert loads(body) == "a\ud800"
    with pytest.raises(ValueError, match="surrogates not allowed"):
        dumps("a\ud800")


@pytest.mark.parametrize("body", [b'{"a": NaN}', b"[-Infinity]", b"[1e999]", b"[-1e999]"])
@pytest.mark.parametrize("rest", ["", LARGE_TEXT], ids=["small", "large"])
def test_what_is_no_number_is_refused(body: bytes, rest: str) -> None:
    with pytest.raises(ValueError, match=r"is no number|more than a number can be|malformed|out of range"):
        loads(b'[%s,"%s"]' % (body, rest.encode()))


@pytest.mark.parametrize("rest", ["", LARGE_TEXT], ids=["small", "large"])
def test_what_is_wrong_is_told_with_its_place(rest: str) -> None:
    text = rest.encode()
    with pytest.raises(json.JSONDecodeError, match=rf"\(char {len(text) + 5}\)"):
        loads(b'["%s", x]' % text)
    with pytest.raises(json.JSONDecodeError, match=r"Unterminated|truncated"):
        loads(b'["%s' % text)


def test_brackets_in_brackets_are_refused() -> None:
    with pytest.raises(RecursionError):
        loads(b"[" * (2 * LARGE))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(Request, "json", Request.json)  # put back afterwards
    app = FastAPI()

    @app.post("/")
    async def take(body: dict[str, int]) -> int:
        return sum(body.values())

    install()
    with TestClient(app) as client:
        yield client


def test_an_application_reads_bodies_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", None)
    assert client.post("/", content=b'{"a": 1, "b": 2}', headers={"content-type": "application/json"}).text == "3"


@pytest.mark.parametrize("body", [b"{", b'{"a": NaN}', b'{"a":"%s"' % LARGE_TEXT.encode()])
def test_an_application_tells_that_a_body_is_no_json(client: TestClient, body: bytes) -> None:
    answer = client.post("/", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 1000
