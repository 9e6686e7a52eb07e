"""FastChat's worker endpoints over any engine: all that a client can see is decided here and in protocol.py.

The way of a request: `frames` parses it, holds a slot, and turns the engine's deltas into frames.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import logging
import struct
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ipex_vllm.engines.engine import Engine
from ipex_vllm.serving.conversation import ChatFormat
from ipex_vllm.serving.metrics import exposition
from ipex_vllm.serving.protocol import (
    EmbeddingRequest,
    GenerateRequest,
    InternalError,
    InvalidModel,
    InvalidParameter,
    Overloaded,
    Transcript,
    Unauthorized,
    WorkerError,
    encode_frame,
    parse_prompt,
)

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

# FastChat's frames repeat the whole text. A stream may spend this much on repeating itself; what comes faster is
# merged into the next frame. So the cost of a token does not grow with the text before it.
FRAME_BYTES_PER_S = 64 * 1024
MIN_FRAME_INTERVAL_S = 0.02
MAX_BODY_BYTES = 16 << 20
FRAMES_MEDIA_TYPE = "application/octet-stream"  # JSON texts with zero bytes between them have no type of their own


class Slots:
    """At most `limit` requests at once; `queue_limit` more may wait; any beyond are refused."""

    def __init__(self, limit: int, queue_limit: int) -> None:
        self._semaphore = asyncio.Semaphore(limit)
        self.limit = limit
        self._queue_limit = queue_limit
        self.num_in_use = 0
        self.num_waiting = 0
        self.is_closed = False

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Hold a slot. Raises Overloaded."""
        if self.is_closed:
            raise Overloaded("This worker is shutting down. Send the request again; another worker will take it.")
        if self._semaphore.locked() and self.num_waiting >= self._queue_limit:
            raise Overloaded(
                f"{self.limit} requests are running and {self.num_waiting} are waiting, the most that this worker "
                "takes. Try again later."
            )
        self.num_waiting += 1
        try:
            await self._semaphore.acquire()
        finally:
            self.num_waiting -= 1
        self.num_in_use += 1
        try:
            yield
        finally:
            self.num_in_use -= 1
            self._semaphore.release()

    @property
    def queue_length(self) -> int:
        """What FastChat's controller balances by."""
        return self.num_in_use + self.num_waiting


@dataclass
class Tally:
    """What this server did since it started, for `metrics.py`."""

    finished: Counter[str] = field(default_factory=Counter)  # by finish reason
    errors: Counter[int] = field(default_factory=Counter)  # by error code
    disconnects: int = 0
    frames: int = 0
    frame_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class FrameResponse(StreamingResponse):
    """A stream of frames whose generator is closed, and so its request aborted, the moment that the client is gone."""

    body_iterator: AsyncGenerator[bytes, None]

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await super().stream_response(send)


class WorkerServer:
    """The HTTP application of one worker.

    Args:
        engine: the loaded model.
        names: model names that clients may use.
        chat_format: how a conversation becomes a prompt.
        slots: how many requests run and wait.
        api_token: when set, every request must carry it as a bearer token.
        log_prompts: write prompts into the log.
    """

    def __init__(
        self,
        engine: Engine,
        names: tuple[str, ...],
        chat_format: ChatFormat,
        slots: Slots,
        api_token: str | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.engine = engine
        self.names = names
        self.chat_format = chat_format
        self.slots = slots
        self.tally = Tally()
        self.is_registered: Callable[[], bool] = lambda: True  # the worker knows, where there is a controller
        self._log_prompts = log_prompts
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
        self.app.add_exception_handler(WorkerError, self._on_worker_error)
        self.app.add_exception_handler(Exception, self._on_bug)
        if api_token:
            self.app.add_middleware(BearerToken, token=api_token)

    # Endpoints

    async def generate_stream(self, request: Request) -> Response:
        headers = {"x-request-id": request_id(request)}
        try:
            body = await read_json(request)
        except WorkerError as error:
            return Response(encode_frame(error.payload()), headers=headers, media_type=FRAMES_MEDIA_TYPE)
        return FrameResponse(
            self.encoded_frames(body, headers["x-request-id"]), headers=headers, media_type=FRAMES_MEDIA_TYPE
        )

    async def generate(self, request: Request) -> Response:
        headers = {"x-request-id": request_id(request)}
        body = await read_json(request)

        async def last_frame() -> dict[str, Any]:
            async with aclosing(self.frames(body, headers["x-request-id"])) as frames:
                async for payload in frames:
                    last = payload
            return last

        return JSONResponse(await until_disconnect(request, last_frame()), headers=headers)

    async def get_embeddings(self, request: Request) -> Response:
        embedding_request = EmbeddingRequest.parse(await read_json(request))
        self._check_model(embedding_request.model)
        async with self.slots.take():
            vectors, num_tokens = await until_disconnect(request, self.engine.embed(embedding_request.inputs))
        encoded: list[Any] = [_as_base64(vector) for vector in vectors] if embedding_request.base64 else vectors
        return JSONResponse({"embedding": encoded, "token_num": num_tokens})

    async def get_status(self) -> Response:
        if self.slots.is_closed:  # what makes the controller drop this worker
            return JSONResponse({"text": "This worker is shutting down.", "error_code": Overloaded.error_code}, 503)
        return JSONResponse(self.status())

    async def count_token(self, request: Request) -> Response:
        prompt = self.chat_format.normalize(parse_prompt(await read_json(request)))
        return JSONResponse({"count": await self.engine.count_tokens(prompt), "error_code": 0})

    async def get_conv_template(self) -> Response:
        return JSONResponse({"conv": self.chat_format.conversation})

    async def model_details(self) -> Response:
        return JSONResponse({"context_length": self.engine.context_length})

    async def health(self) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(self) -> Response:
        return JSONResponse({"ready": self.is_ready()}, 200 if self.is_ready() else 503)

    async def metrics(self) -> Response:
        content, content_type = exposition(self)
        return Response(content, media_type=content_type)

    # The way of a request

    def is_ready(self) -> bool:
        """Registered and taking requests; the model is loaded before the server exists."""
        return self.is_registered() and not self.slots.is_closed

    def status(self) -> dict[str, Any]:
        return {"model_names": list(self.names), "speed": 1, "queue_length": self.slots.queue_length}

    async def encoded_frames(self, body: object, request_id: str) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.frames(body, request_id)) as frames:
            async for payload in frames:
                frame = encode_frame(payload)
                self.tally.frames += 1
                self.tally.frame_bytes += len(frame)
                yield frame

    async def frames(self, body: object, request_id: str) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the frames of one request; an error is the last of them."""
        record = RequestRecord(request_id)
        try:
            request = GenerateRequest.parse(body)
            self._check_model(request.model)
            if self._log_prompts:
                logger.info("request %s prompt %r", request_id, request.prompt)
            async with self.slots.take(), aclosing(self._transcripts(request, record)) as payloads:
                async for payload in payloads:
                    yield payload
            self.tally.finished[record.outcome] += 1
        except WorkerError as error:
            record.outcome = f"error {error.error_code}"
            self.tally.errors[error.error_code] += 1
            yield error.payload()
        except Exception:
            logger.exception("request %s failed on a bug of this worker", request_id)
            record.outcome = f"error {InternalError.error_code}"
            self.tally.errors[InternalError.error_code] += 1
            yield InternalError("The worker failed on this request; its log says how.").payload()
        except BaseException:  # cancelled or closed: the client is gone
            record.outcome = "disconnect"
            self.tally.disconnects += 1
            raise
        finally:
            self.tally.prompt_tokens += record.prompt_tokens
            self.tally.completion_tokens += record.completion_tokens
            logger.info("%s", record)

    async def _transcripts(
        self, request: GenerateRequest, record: RequestRecord
    ) -> AsyncGenerator[dict[str, Any], None]:
        transcript = Transcript(request)
        next_frame_at = 0.0
        async with aclosing(self.engine.stream(request_for_engine(request, self.chat_format), record.id)) as deltas:
            async for delta in deltas:
                transcript.add(delta)
                record.update(transcript)
                now = time.monotonic()
                if now < next_frame_at or transcript.is_finished:
                    continue
                payload = transcript.payload()
                next_frame_at = now + max(MIN_FRAME_INTERVAL_S, _size(payload) / FRAME_BYTES_PER_S)
                yield payload
        last = transcript.payload()
        record.outcome = last["finish_reason"]
        # FastChat's clients take the text from a frame without a reason and the reason from one without new text.
        yield {**last, "finish_reason": None}
        yield last

    # Helpers

    def _check_model(self, model: str | None) -> None:
        if model is not None and model not in self.names:
            raise InvalidModel(f"This worker serves {', '.join(self.names)}, not {model!r}.")

    async def _on_worker_error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, WorkerError)
        self.tally.errors[error.error_code] += 1
        return JSONResponse(error.payload())

    async def _on_bug(self, request: Request, error: Exception) -> Response:
        logger.error("%s failed on a bug of this worker", request.url.path, exc_info=error)
        return JSONResponse(InternalError("The worker failed on this request; its log says how.").payload())


@dataclass
class RequestRecord:
    """One request's log line."""

    id: str
    outcome: str = "unfinished"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None

    def update(self, transcript: Transcript) -> None:
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.prompt_tokens = transcript.prompt_tokens
        self.completion_tokens = transcript.completion_tokens

    def __str__(self) -> str:
        ttft = "-" if self.first_token_at is None else f"{self.first_token_at - self.started_at:.3f}s"
        return (
            f"request {self.id} {self.outcome} prompt_tokens={self.prompt_tokens} "
            f"completion_tokens={self.completion_tokens} ttft={ttft} duration={time.monotonic() - self.started_at:.3f}s"
        )


class BearerToken:
    """Refuses every request without the right `Authorization: Bearer` header."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = Unauthorized("This worker asks for its API token: send `Authorization: Bearer TOKEN`.")
                await JSONResponse(error.payload(), 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def request_for_engine(request: GenerateRequest, chat_format: ChatFormat) -> GenerateRequest:
    """The request with the prompt that the model's own template would give."""
    return replace(request, prompt=chat_format.normalize(request.prompt))


def request_id(request: Request) -> str:
    """The client's own id of a request, or a new one."""
    return request.headers.get("x-request-id", "")[:128] or uuid.uuid4().hex


async def read_json(request: Request) -> Any:
    """Return the body as JSON. Raises InvalidParameter."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise InvalidParameter(f"The request body is larger than {MAX_BODY_BYTES >> 20} MiB.")
    try:
        return json.loads(body)
    except ValueError as error:
        raise InvalidParameter(f"The request body is not JSON: {error}.") from error


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns; cancel it when the client goes away first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Task[Any], ...] = (asyncio.create_task(work), asyncio.create_task(disconnected()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            tasks[0].cancel()
        result: Result = await tasks[0]
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _size(payload: dict[str, Any]) -> int:
    """About how many bytes a frame has, without encoding it."""
    choices = payload.get("choices", [payload])
    return 128 + sum(len(choice["text"]) + 64 * len(choice.get("logprobs", {}).get("tokens", ())) for choice in choices)


def _as_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
