"""FastChat's worker endpoints: they parse and render, with protocol.py; what lies between is the core's.

The way of a request: an endpoint calls `frames`, which calls `Core.stream`, which calls `Engine.stream`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import struct
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Send

from ipex_vllm.engines.bounds import MAX_SHOWN
from ipex_vllm.engines.generation import ContextOverflow, Generation, InvalidParameter, RequestError, tokens_of
from ipex_vllm.serving.connections import ConnectionLimit
from ipex_vllm.serving.conversation import ChatFormat
from ipex_vllm.serving.core import Core, Tally, bug_error
from ipex_vllm.serving.json_bodies import loads
from ipex_vllm.serving.large_bodies import LargeBodies, TooLarge, whole_body
from ipex_vllm.serving.metrics import exposition
from ipex_vllm.serving.openai import OpenAIServer, request_id
from ipex_vllm.serving.protocol import (
    FRAMES_MEDIA_TYPE,
    EmbeddingRequest,
    GenerateRequest,
    Transcript,
    encode_frame,
    error_payload,
    parse_prompt,
)
from ipex_vllm.serving.refusals import BearerToken
from ipex_vllm.serving.slots import Overloaded

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# FastChat's frames repeat the whole text. A stream may spend this much on repeating itself; what comes faster is
# merged into the next frame. So the cost of a token does not grow with the text before it.
FRAME_BYTES_PER_S = 64 * 1024
MIN_FRAME_INTERVAL_S = 0.02
LARGE_BODY_BYTES_PER_S = 16 << 20  # a twentieth to a tenth of the time, at 3 to 7 ms for a MiB, in small pieces
# FastChat's API server and web UI end a stream that is silent for 100 s, without an error. They skip an empty frame.
SIGN_OF_LIFE_S = 15.0


class FrameResponse(StreamingResponse):
    """A stream of frames whose generator is closed, and so its request aborted, the moment that the client is gone."""

    def __init__(self, frames: AsyncGenerator[dict[str, Any], None], tally: Tally, headers: dict[str, str]) -> None:
        super().__init__((), headers=headers, media_type=FRAMES_MEDIA_TYPE)  # the frames are sent below
        self._frames = frames
        self._tally = tally
        self._sent_at = time.monotonic()

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            signs_of_life = asyncio.create_task(self._show_life(send))
            try:
                async for payload in frames:
                    body = encode_frame(payload)
                    self._tally.frames += 1
                    self._tally.frame_bytes += len(body)
                    self._sent_at = time.monotonic()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            finally:
                signs_of_life.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _show_life(self, send: Send) -> None:
        """Send an empty frame whenever there was none for SIGN_OF_LIFE_S, as while the request queues."""
        while True:
            await asyncio.sleep(self._sent_at + SIGN_OF_LIFE_S - time.monotonic())
            if time.monotonic() >= self._sent_at + SIGN_OF_LIFE_S:
                self._sent_at = time.monotonic()
                await send({"type": "http.response.body", "body": b"\0", "more_body": True})


class FastChatServer:
    """The HTTP application of one worker.

    Args:
        core: the loaded model, and the requests to it.
        chat_format: how a conversation becomes a prompt.
        api_token: when set, every request must carry it as a bearer token.
        openai: the engine's own application for the paths of OpenAI's API, beside FastChat's.
    """

    def __init__(
        self, core: Core, chat_format: ChatFormat, api_token: str | None = None, openai: ASGIApp | None = None
    ) -> None:
        self.core = core
        self.chat_format = chat_format
        self.app = FastAPI(title="ipex-vllm worker", docs_url=None, redoc_url=None, openapi_url=None)
        endpoints: dict[str, Callable[..., Coroutine[Any, Any, Response]]] = {
            "/worker_generate_stream": self.generate_stream,
            "/worker_generate": self.generate,
            "/worker_get_embeddings": self.get_embeddings,
            "/worker_get_status": self.get_status,
            "/count_token": self.count_token,
            "/worker_get_conv_template": self.get_conv_template,
            "/model_details": self.model_details,
        }
        for path, endpoint in endpoints.items():
            self.app.add_api_route(path, endpoint, methods=["POST"], response_model=None)
        probes = {"/health": self.health, "/ready": self.ready, "/metrics": self.metrics}
        for path, endpoint in probes.items():
            self.app.add_api_route(path, endpoint, methods=["GET"], response_model=None)
        if openai is not None:
            self.app.mount("", OpenAIServer(core, openai))  # the last one: it gets what is left
        self.app.add_exception_handler(RequestError, self._on_request_error)
        self.app.add_exception_handler(ClientDisconnect, self._on_disconnect)
        self.app.add_exception_handler(Exception, self._on_bug)
        self.app.add_middleware(LargeBodies, bytes_per_s=LARGE_BODY_BYTES_PER_S)
        if api_token:
            self.app.add_middleware(BearerToken, token=api_token)
        self.app.add_middleware(ConnectionLimit, tally=core.tally)  # the last one added comes first

    # Endpoints

    async def generate_stream(self, request: Request) -> Response:
        headers = {"x-request-id": request_id(request.headers)}
        try:
            body = await read_json(request)
        except RequestError as error:
            return Response(encode_frame(error_payload(error)), headers=headers, media_type=FRAMES_MEDIA_TYPE)
        return FrameResponse(self.frames(body, headers["x-request-id"]), self.core.tally, headers)

    async def generate(self, request: Request) -> Response:
        headers = {"x-request-id": request_id(request.headers)}
        frames = self.frames(await read_json(request), headers["x-request-id"])
        return JSONResponse(await until_disconnect(request, last_of(frames)), headers=headers)

    async def get_embeddings(self, request: Request) -> Response:
        headers = {"x-request-id": request_id(request.headers)}
        embedding = self.embeddings(await read_json(request), headers["x-request-id"])
        return JSONResponse(await until_disconnect(request, embedding), headers=headers)

    async def get_status(self) -> Response:
        if self.core.slots.is_closed:  # what makes the controller drop this worker
            return JSONResponse(error_payload(Overloaded("This worker is shutting down.")), 503)
        return JSONResponse(self.status())

    async def count_token(self, request: Request) -> Response:
        given = parse_prompt(await read_json(request))
        # FastChat's API server takes the count, and goes on to what tells its client of the error.
        try:
            prompt = self.chat_format.normalize(given)
            num_tokens = await until_disconnect(request, self.core.engine.count_tokens(prompt))
        except (ContextOverflow, InvalidParameter) as error:
            self.core.tally.count_error(error)
            count = error.prompt_tokens if isinstance(error, ContextOverflow) else 0
            return JSONResponse({**error_payload(error), "count": count})
        return JSONResponse({"count": num_tokens, "error_code": 0})

    async def get_conv_template(self) -> Response:
        return JSONResponse({"conv": self.chat_format.conversation})

    async def model_details(self) -> Response:
        return JSONResponse({"context_length": self.core.engine.context_length})

    async def health(self) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self) -> Response:
        return JSONResponse({"ready": self.core.is_ready()}, 200 if self.core.is_ready() else 503)

    async def metrics(self) -> Response:
        content, content_type = exposition(self.core)
        return Response(content, media_type=content_type)

    # The way of a request

    def status(self) -> dict[str, Any]:
        return {"model_names": list(self.core.names), "speed": 1, "queue_length": self.core.slots.queue_length}

    async def frames(self, body: object, request_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the frames of one request; an error is the last of them."""
        try:
            with self.core.recorded(request_id) as record:
                request = GenerateRequest.parse(body)
                self.core.check_model(request.generation.model)
                transcript = Transcript(request)
                next_frame_at = 0.0
                generation = as_templated(request.generation, self.chat_format)
                async with aclosing(self.core.stream(generation, record)) as deltas:
                    async for delta in deltas:
                        transcript.add(delta)
                        now = time.monotonic()
                        if now >= next_frame_at and not transcript.is_finished:
                            payload = transcript.payload()
                            next_frame_at = now + max(MIN_FRAME_INTERVAL_S, _size(payload) / FRAME_BYTES_PER_S)
                            yield payload
                last = transcript.payload()
                # FastChat's clients take the text from a frame without a reason, and the reason from one without new
                # text.
                yield {**last, "finish_reason": None}
                yield last
        except RequestError as error:
            yield error_payload(error)

    async def embeddings(self, body: object, request_id: str) -> dict[str, Any]:
        """The answer to one request for embeddings, or its error."""
        try:
            with self.core.recorded(request_id) as record:
                request = EmbeddingRequest.parse(body)
                self.core.check_model(request.model)
                async with self.core.slots.take(sum(map(tokens_of, request.inputs))):
                    vectors, record.prompt_tokens = await self.core.engine.embed(request.inputs)
                record.outcome = "stop"
        except RequestError as error:
            return error_payload(error)
        encoded: list[Any] = [_as_base64(vector) for vector in vectors] if request.base64 else vectors
        return {"embedding": encoded, "token_num": record.prompt_tokens}

    # Errors outside of frames

    async def _on_request_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        self.core.tally.count_error(error)
        return JSONResponse(error_payload(error))

    async def _on_disconnect(self, request: Request, _: Exception) -> Response:
        logger.debug("%s: the client went away", request.url.path)
        return Response()  # to nobody

    async def _on_bug(self, request: Request, error: Exception) -> Response:
        logger.error("%s failed on a bug of this worker", request.url.path, exc_info=error)
        return JSONResponse(error_payload(bug_error()))


def as_templated(generation: Generation, chat_format: ChatFormat) -> Generation:
    """The generation with the prompt that the model's own template would give."""
    return replace(generation, prompt=chat_format.normalize(generation.prompt))


async def read_json(request: Request) -> Any:
    """Return the body as JSON. Raises InvalidParameter."""
    try:
        return loads(await whole_body(request))
    except TooLarge as error:
        raise InvalidParameter(str(error)) from error
    except (ValueError, RecursionError) as error:  # the latter for brackets within thousands of brackets
        raise InvalidParameter(f"The request body is not JSON: {str(error)[:MAX_SHOWN]}.") from error


async def last_of(frames: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    async with aclosing(frames):
        async for payload in frames:
            last = payload
    return last


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns; where the client goes away first, cancel it and raise ClientDisconnect."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Task[Any], ...] = (asyncio.create_task(work), asyncio.create_task(disconnected()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        result: Result = await tasks[0]
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _size(payload: dict[str, Any]) -> int:
    """About how many bytes a frame has, without encoding it."""
    choices = payload.get("choices", [payload])
    return 128 + sum(len(choice["text"]) + _logprobs_size(choice.get("logprobs")) for choice in choices)


def _logprobs_size(logprobs: dict[str, list[Any]] | None) -> int:
    if logprobs is None or not logprobs["tokens"]:
        return 0
    num_alternatives = len(logprobs["top_logprobs"][-1] or ())
    return (64 + 28 * num_alternatives) * len(logprobs["tokens"])


def _as_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
