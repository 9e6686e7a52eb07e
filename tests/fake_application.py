"""An engine's own application for OpenAI's API, of the simplest kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Body, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from ipex_vllm.engines.generation import InternalError
from ipex_vllm.engines.turns import current_turn
from ipex_vllm.serving.fastchat import until_disconnect

BODY = Body()  # of FastAPI, which asks for it as a default
CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


class Application:
    """Answers as vLLM's does: `tokens` times `word`, one in `interval_s` seconds, streamed or not, after a check."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.num_running = self.num_answered = 0
        for path in (CHAT, MESSAGES, "/v1/responses"):
            self.app.add_api_route(path, self.answer, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/models", self.models)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)
        self.num_answered += 1

    async def models(self) -> JSONResponse:
        return JSONResponse({"data": []})

    async def answer(self, request: Request, body: Any = BODY) -> JSONResponse | StreamingResponse:
        if body.get("wrong"):
            return JSONResponse({"error": {"message": "wrong"}}, 400)
        if body.get("bug"):
            raise ZeroDivisionError("secret")
        words = self.generate(**body)
        if body.pop("stream", False):
            return StreamingResponse((f"data: {word}\n\n" async for word in words), media_type="text/event-stream")
        return JSONResponse(await until_disconnect(request, all_of(words)))

    async def generate(
        self,
        tokens: int = 2,
        interval_s: float = 0.0,
        parts: int = 1,
        fails: bool = False,
        stream: bool = False,
        word: str = "word",
    ) -> AsyncIterator[str]:
        turn = current_turn.get()
        await asyncio.gather(*(turn.begin(lambda: "private", 1000) for _ in range(parts)))
        self.num_running += 1
        try:
            for index in range(tokens):
                await asyncio.sleep(interval_s)
                turn.count(7 if index == 0 else 0, 1, "stop" if index == tokens - 1 else None, None)
                yield word
            if fails:
                turn.fail(InternalError("the engine"))
        finally:
            self.num_running -= 1


async def all_of(words: AsyncIterator[str]) -> list[str]:
    return [word async for word in words]
