"""An error in the form of the protocol that a path belongs to, and the check of the API token."""

from __future__ import annotations

import hmac
import json

from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ipex_vllm.engines import anthropic_errors
from ipex_vllm.engines.anthropic_errors import anthropic_error
from ipex_vllm.engines.generation import ContextOverflow, InternalError, InvalidParameter, RequestError
from ipex_vllm.serving.core import InvalidModel, Unauthorized
from ipex_vllm.serving.events import error_event, error_response
from ipex_vllm.serving.protocol import FRAMES_MEDIA_TYPE, encode_frame, error_payload
from ipex_vllm.serving.slots import Overloaded

# Outside of FastChat's protocol.
STATUS: dict[type[RequestError], int] = {
    Unauthorized: 401,
    InvalidModel: 404,
    InvalidParameter: 400,
    ContextOverflow: 400,
    Overloaded: 429,
    InternalError: 500,
}
RETRY_AFTER_S = 1
FASTCHAT = ("/worker_", "/count_token", "/model_details", "/health", "/ready", "/metrics")


def refusal(path: str, error: RequestError) -> Response:
    """The answer to a request that ends with this error before it has begun."""
    if path == "/worker_generate_stream" and not isinstance(error, Unauthorized):
        return Response(encode_frame(error_payload(error)), media_type=FRAMES_MEDIA_TYPE)
    status = STATUS[type(error)]
    if path.startswith(FASTCHAT):
        return JSONResponse(error_payload(error), status if isinstance(error, Unauthorized) else 200)
    headers = {"retry-after": str(RETRY_AFTER_S)} if isinstance(error, Overloaded) else None
    if path.startswith(anthropic_errors.PATH):
        return JSONResponse(anthropic_error(status, str(error)), status, headers)
    return error_response(status, str(error), headers=headers)


def last_event(path: str, error: RequestError) -> bytes:
    """The end of a stream of server-sent events that has begun."""
    if path.startswith(anthropic_errors.PATH):
        return b"event: error\ndata: " + json.dumps(anthropic_error(STATUS[type(error)], str(error))).encode() + b"\n\n"
    if path.startswith("/v1/responses"):
        event = {"type": "error", "code": "server_error", "message": str(error), "param": None}
        return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"
    return error_event(error_response(STATUS[type(error)], str(error)))


class BearerToken:
    """Refuses every request without the right token: `Authorization: Bearer`, or `x-api-key` as Anthropic's clients."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] not in ("http", "websocket") or is_preflight(scope, headers) or self._is_right(headers):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "the API token is missing"})
        else:
            error = Unauthorized("This worker asks for its API token: send `Authorization: Bearer TOKEN`.")
            await refusal(scope["path"], error)(scope, receive, send)

    def _is_right(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given, self._token)


def is_preflight(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """A browser's question whether a page may send a request (CORS). It has no token, and the answer tells nothing."""
    return scope.get("method") == "OPTIONS" and b"access-control-request-method" in headers
