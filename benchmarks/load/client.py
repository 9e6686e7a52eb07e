"""Clients: each sends one request and writes what comes back, and when, into its timeline."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from benchmarks.load.metrics import Timeline
from benchmarks.options import BenchmarkError

# A cumulative FastChat frame holds the whole text, so a line may be long.
READ_BUFFER_BYTES = 2**22


@dataclass(frozen=True)
class Event:
    """One message of a stream. `text` is all of the text so far; counts are the server's, None where it gave none."""

    text: str
    has_token: bool
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None


class Client(Protocol):
    """Sends the request that a timeline describes."""

    async def send(self, timeline: Timeline, clock: Callable[[], float]) -> None:
        """Send, and fill in `timeline` up to `ended`; failures are written there, never raised."""


def record(timeline: Timeline, event: Event, now: float) -> None:
    """Write an event that arrived at `now` into the timeline.

    Where the server counts, a chunk is an event whose count grew: a final frame that repeats the text is none, and a
    token that has no text yet (half a character) is one.
    """
    if event.output_tokens is not None:
        is_chunk = event.output_tokens > (timeline.usage_output_tokens or 0) and event.has_token
        timeline.usage_output_tokens = event.output_tokens
    else:
        is_chunk = event.has_token
    if is_chunk:
        timeline.chunks.append((now, event.output_tokens))
    if event.prompt_tokens is not None:
        timeline.usage_prompt_tokens = event.prompt_tokens
    timeline.text = event.text
    timeline.finish_reason = event.finish_reason or timeline.finish_reason
    timeline.error = event.error or timeline.error


async def fastchat_events(body: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    r"""Events of `/worker_generate_stream`: JSON frames that each end with `\0` and hold the whole text so far."""
    async for frame in _split(body, b"\0"):
        data = json.loads(frame)
        if data["error_code"]:
            yield Event("", False, error=f"error_code {data['error_code']}: {data['text']}")
            return
        usage = data.get("usage") or {}
        yield Event(
            data["text"],
            bool(data["text"]) or bool(usage.get("completion_tokens")),
            data.get("finish_reason"),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
        )


async def openai_events(body: AsyncIterator[bytes]) -> AsyncIterator[Event]:
    """Events of OpenAI's `/v1/completions` with `stream`: server-sent events that each hold a piece of text."""
    text = ""
    async for line in _split(body, b"\n"):
        if not line.startswith(b"data:") or line.removeprefix(b"data:").strip() == b"[DONE]":
            continue
        data = json.loads(line.removeprefix(b"data:"))
        # FastChat's API server sends its errors as an event with status 200.
        if data.get("error") or data.get("error_code"):
            yield Event(text, False, error=str(data.get("error") or f"{data['error_code']}: {data.get('text')}"))
            return
        choice = (data.get("choices") or [{}])[0]
        usage = data.get("usage") or {}
        text += choice.get("text") or ""
        # A final chunk may carry the reason alone. A token without text is told by the usage, where there is one.
        has_token = bool(choice.get("text")) or ("text" in choice and "completion_tokens" in usage)
        yield Event(
            text, has_token, choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens")
        )


async def _split(body: AsyncIterator[bytes], separator: bytes) -> AsyncIterator[bytes]:
    """Yield what stands between separators, without empty pieces."""
    rest = b""
    async for data in body:
        *pieces, rest = (rest + data).split(separator)
        for piece in pieces:
            if piece.strip():
                yield piece
    if rest.strip():
        yield rest


PROTOCOLS: dict[str, tuple[str, Callable[[AsyncIterator[bytes]], AsyncIterator[Event]]]] = {
    "fastchat": ("/worker_generate_stream", fastchat_events),
    "openai": ("/v1/completions", openai_events),
}


def request_body(protocol: str, model: str, timeline: Timeline) -> dict[str, Any]:
    """The JSON of a greedy request; with `must_reach_max` the server is told to ignore end-of-sequence."""
    common = {"model": model, "prompt": timeline.prompt, "temperature": 0, "ignore_eos": timeline.must_reach_max}
    if protocol == "fastchat":
        return common | {"max_new_tokens": timeline.max_tokens, "echo": False}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return common | {"max_tokens": timeline.max_tokens, "stream": True, "stream_options": usage}


class HttpClient:
    """Speaks one of PROTOCOLS with a server; use as an async context manager."""

    def __init__(self, url: str, protocol: str, model: str, timeout_s: float) -> None:
        if protocol not in PROTOCOLS:
            raise BenchmarkError(f"protocol {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
        path, self._events = PROTOCOLS[protocol]
        self._url = url.rstrip("/") + path
        self._protocol = protocol
        self._model = model
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)

    async def __aenter__(self) -> HttpClient:
        # A connection for each request: some servers, llama.cpp's among them, close one that could be used again.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=self._timeout,
            read_bufsize=READ_BUFFER_BYTES,
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def send(self, timeline: Timeline, clock: Callable[[], float]) -> None:
        body = request_body(self._protocol, self._model, timeline)
        timeline.started = clock()
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    timeline.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                    return
                async for event in self._events(response.content.iter_any()):
                    record(timeline, event, clock())
        except TimeoutError:
            timeline.error = f"no end within {self._timeout.total:g} s"
        except (aiohttp.ClientError, ValueError, KeyError, TypeError) as error:
            timeline.error = f"{type(error).__name__}: {error}"
        finally:
            timeline.ended = clock()


async def only_model(url: str, protocol: str) -> str:
    """Ask a server for the one model it serves. Raises BenchmarkError when it cannot be reached or has several."""
    names = await served_models(url, protocol)
    if len(names) != 1:
        raise BenchmarkError(f"{url} serves {', '.join(names) or 'no model'}: name one with --model")
    return names[0]


async def served_models(url: str, protocol: str) -> list[str]:
    """Ask a server for the models it serves. Raises BenchmarkError when it cannot be reached."""
    method, path = ("POST", "/worker_get_status") if protocol == "fastchat" else ("GET", "/v1/models")
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
            session.request(method, url.rstrip("/") + path) as response,
        ):
            data = await response.json(content_type=None)
        names = data["model_names"] if protocol == "fastchat" else [model["id"] for model in data["data"]]
        return [str(name) for name in names]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"no {protocol} server answers at {url} ({type(error).__name__}: {error})") from None


class Clock:
    """Seconds since its creation, monotonic."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._start

    async def sleep_until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - self()))
