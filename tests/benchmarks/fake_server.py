"""A server without a model that answers in FastChat's worker protocol and OpenAI's, one token per word.

As a process: `python -m tests.benchmarks.fake_server PORT [TOKEN_SECONDS]`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Behaviour:
    """How the fake server treats requests, and what it saw of them."""

    token_s: float = 0.0
    tokens_per_chunk: int = 1
    end_early_after: int | None = None
    error: str | None = None
    drop_after: int | None = None
    stream_usage: bool = True
    gate: asyncio.Event | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


def create_app(behaviour: Behaviour) -> web.Application:
    async def stream(request: web.Request, limit_name: str, to_message: Any, end: bytes) -> web.StreamResponse:
        body = await request.json()
        behaviour.bodies.append(body)
        behaviour.running += 1
        behaviour.most_running = max(behaviour.most_running, behaviour.running)
        try:
            if behaviour.gate:
                await behaviour.gate.wait()
            return await answer(request, body, body[limit_name], to_message, end)
        finally:
            behaviour.running -= 1

    async def answer(
        request: web.Request, body: dict[str, Any], limit: int, to_message: Any, end: bytes
    ) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        total = min(limit, behaviour.end_early_after or limit)
        prompt_tokens = len(body["prompt"].split())
        for first in range(0, total, behaviour.tokens_per_chunk):
            if behaviour.error:
                await response.write(to_message(None, 0, 0, None, behaviour.error))
                return response
            done = min(first + behaviour.tokens_per_chunk, total)
            await asyncio.sleep(behaviour.token_s * (done - first))
            await response.write(to_message((first, done), prompt_tokens, done, None, None))
            if behaviour.drop_after and done >= behaviour.drop_after:
                assert request.transport is not None
                request.transport.close()
                return response
        reason = "length" if total == limit else "stop"
        await response.write(to_message((total, total), prompt_tokens, total, reason, None) + end)
        return response

    def words(first: int, last: int) -> str:
        return "".join(f" w{index}" for index in range(first, last))

    def usage(prompt: int, output: int) -> dict[str, Any]:
        counts = {"prompt_tokens": prompt, "completion_tokens": output}
        return {"usage": counts} if behaviour.stream_usage else {}

    def fastchat(span: Any, prompt: int, output: int, reason: str | None, error: str | None) -> bytes:
        frame = {"text": error, "error_code": 50001} if error else {"text": words(0, span[1]), "error_code": 0}
        return json.dumps({**frame, **usage(prompt, output), "finish_reason": reason}).encode() + b"\0"

    def openai(span: Any, prompt: int, output: int, reason: str | None, error: str | None) -> bytes:
        chunk: dict[str, Any] = {"error": {"message": error}} if error else {}
        if not error:
            chunk = {"choices": [{"text": words(*span), "finish_reason": reason}], **usage(prompt, output)}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    async def generate_stream(request: web.Request) -> web.StreamResponse:
        return await stream(request, "max_new_tokens", fastchat, b"")

    async def completions(request: web.Request) -> web.StreamResponse:
        return await stream(request, "max_tokens", openai, b"data: [DONE]\n\n")

    async def status(_: web.Request) -> web.Response:
        return web.json_response({"model_names": ["fake"], "speed": 1, "queue_length": behaviour.running})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    app = web.Application()
    app.router.add_post("/worker_generate_stream", generate_stream)
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/worker_get_status", status)
    app.router.add_get("/v1/models", models)
    return app


if __name__ == "__main__":
    port, *rest = sys.argv[1:]
    web.run_app(
        create_app(Behaviour(token_s=float(rest[0]) if rest else 0.0)),
        host="127.0.0.1",
        port=int(port),
        shutdown_timeout=0.1,
    )
