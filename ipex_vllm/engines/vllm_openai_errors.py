"""What vLLM's application says of a request that it does not take, in the form of the API that the request is of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ipex_vllm.engines import anthropic_errors
from ipex_vllm.engines.anthropic_errors import anthropic_error
from ipex_vllm.engines.bounds import MAX_SHOWN, shown

KINDS = {400: "BadRequestError", 404: "NotFoundError", 405: "NotFoundError"}  # in vLLM's words
POOLING_PATHS = (
    *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"),
    *("/rerank", "/v1/rerank", "/v2/rerank"),
)
MAX_FIELDS = 3  # of which a refusal tells
MAX_REASON = 2 * MAX_SHOWN  # characters


def tell_errors(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, not_found)
    app.add_exception_handler(RequestValidationError, invalid)
    logging.getLogger("vllm.entrypoints.anthropic.api_router").addFilter(is_no_clients_mistake)


def is_no_clients_mistake(record: logging.LogRecord) -> bool:
    """Whether a record is worth a traceback: for Anthropic's API vLLM 0.32 logs every request that it refuses."""
    from vllm.exceptions import VLLMClientError

    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    return not isinstance(error, (ValueError, VLLMClientError))


async def not_found(request: Request, error: Exception) -> Response:
    """What the router has no endpoint for."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {shown(request.url.path)[1:-1]}: {error.detail}"
    if error.status_code == 404 and request.url.path in POOLING_PATHS:
        message = (
            "This worker's model generates text. Embeddings and scores come from a model that is started with "
            "--runner pooling."
        )
    return refusal(request, error.status_code, message, headers=error.headers)


async def invalid(request: Request, error: Exception) -> Response:
    """A body whose fields are other than they can be. vLLM 0.32 repeats up to 10 000 characters of pydantic's words."""
    assert isinstance(error, RequestValidationError)
    fields = [told(each) for each in error.errors()]
    lines = [f"{name}: {reason}" if name else reason for name, reason in fields[:MAX_FIELDS]]
    if len(fields) > MAX_FIELDS:
        lines.append(f"and {len(fields) - MAX_FIELDS} more")
    return refusal(request, 400, "; ".join(lines), fields[0][0] if fields else None)


def told(error: Mapping[str, Any] | str) -> tuple[str | None, str]:
    """The field that one of pydantic's errors is about, as `messages.0.content`, and what is wrong with it."""
    from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param

    if isinstance(error, str):  # of vLLM's own, about the whole request
        return None, error
    reason = " ".join(str(error["msg"]).removeprefix("Value error, ").split())
    reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}..."
    return clean_loc_for_param(error["loc"]).removeprefix("body.")[:MAX_SHOWN], reason


def refusal(
    request: Request, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    if request.url.path.startswith(anthropic_errors.PATH):
        return JSONResponse(anthropic_error(status, message), status, headers)
    error = {"message": message, "type": KINDS.get(status, "InternalServerError"), "param": param, "code": status}
    return JSONResponse({"error": error}, status, headers)
