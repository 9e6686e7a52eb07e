"""FastChat's OpenAI API server on today's pydantic, guarded: `python -m ipex_vllm.fastchat_api`, with its own flags.

FastChat 0.2.36 streams with `model.json(ensure_ascii=False)`, which pydantic 2 refuses, and vLLM needs pydantic 2. So
this gives pydantic's models that one keyword back, and then runs FastChat's own module as it is, behind a guard: a
request is checked first (fastchat_requests.py), what a dead worker failed is tried elsewhere (fastchat_retry.py), every
failure is an error in OpenAI's form, and a stream that waits shows signs of life. What clients do to a connection is
met as at a worker (serving/http_server.py), with the same --client-timeout, by IPEX_VLLM_CLIENT_TIMEOUT.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ipex_vllm.engines.bounds import MAX_SHOWN
from ipex_vllm.errors import run_main
from ipex_vllm.fastchat_requests import BadRequest, check_for, read_body, written
from ipex_vllm.fastchat_retry import LOST, Retry, WorkerFailed, innermost
from ipex_vllm.options import (
    Parser,
    WorkerOptions,
    add_options,
    from_namespace,
    host_name,
    http_address,
    layered_arguments,
    port_number,
    same_option,
)
from ipex_vllm.serving import json_bodies
from ipex_vllm.serving.core import Tally
from ipex_vllm.serving.events import Answer, error_event, error_response
from ipex_vllm.serving.http_server import ClientProtocol, is_ours
from ipex_vllm.serving.large_bodies import LargeBodies, TooLarge, whole_body

logger = logging.getLogger("ipex_vllm.fastchat_api")  # __name__ is "__main__"

MODULE = "fastchat.serve.openai_api_server"
LARGE_BODY_BYTES_PER_S = 4 << 20  # a twentieth of the time, at 14 ms for a MiB, which is read and written five times


def json_as_in_pydantic_1(self: BaseModel, *, ensure_ascii: bool = False, **options: Any) -> str:
    """Pydantic 2 never escapes characters beyond ASCII, which is what FastChat asks for."""
    return self.model_dump_json(ensure_ascii=ensure_ascii, **options)


class Client(httpx.AsyncClient):
    """An httpx client with the certificates that this process has read once.

    FastChat makes a client for each stream, and each would read them again: 20 ms in which nobody else is answered.
    """

    certificates = httpx.create_ssl_context()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"verify": self.certificates, **options})


def main() -> None:
    BaseModel.json = json_as_in_pydantic_1  # type: ignore[method-assign]
    httpx.AsyncClient = Client  # type: ignore[misc]
    aiohttp.ClientSession = partial(aiohttp.ClientSession, json_serialize_bytes=json_bodies.dumps)  # type: ignore[misc, assignment]
    json_bodies.install()
    # It calls the controller and the workers: a proxy would only lose them.
    os.environ.update(NO_PROXY="*", no_proxy="*")
    controller_url, own = read_options(sys.argv[1:])
    run_server = uvicorn.run

    def run_guarded(app: FastAPI, **options: Any) -> None:
        # The innermost: refusals have CORS headers too.
        app.user_middleware += [
            Middleware(LargeBodies, bytes_per_s=LARGE_BODY_BYTES_PER_S),
            Middleware(Guard),
            Middleware(Retry, controller_url=controller_url),
        ]
        app.add_exception_handler(RequestValidationError, on_wrong_field)
        logging.getLogger("uvicorn.error").addFilter(is_ours)
        protocol: Any = partial(ClientProtocol, tally=Tally(), timeout_s=own.client_timeout)
        run_server(app, **options, http=protocol, ws="none")

    uvicorn.run = run_guarded  # type: ignore[assignment]  # which FastChat's module calls last
    sys.argv[0] = MODULE
    runpy.run_module(MODULE, run_name="__main__")


async def on_wrong_field(_: Request, error: Exception) -> JSONResponse:
    """The first of them in OpenAI's form; FastChat sends all that it refuses back."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part != "body")[:MAX_SHOWN]
    return error_response(400, f"{name}: {first['msg'][:MAX_SHOWN]}.", name)


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """What is not among FastChat's own flags, and so in the environment alone."""

    client_timeout: float = same_option(WorkerOptions, "client_timeout")


def read_options(arguments: Sequence[str]) -> tuple[str, ApiOptions]:
    """The controller's URL, and our own options. Raises OptionError for addresses under which nothing could be."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", type=host_name)
    parser.add_argument("--port", type=port_number)
    parser.add_argument("--controller-address", type=http_address, default="http://localhost:21001")  # FastChat's
    controller_url: str = parser.parse_known_args(arguments)[0].controller_address
    own = Parser(add_help=False, allow_abbrev=False)
    add_options(own, ApiOptions)
    return controller_url, from_namespace(ApiOptions, own.parse_args(layered_arguments(own, [], ignore_unknown=True)))


class Guard:
    """Lets through what FastChat reads as it was meant, and ends what fails with an error that a client can show."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = Answer(send)
        try:
            check = check_for(scope["path"]) if scope["method"] == "POST" else None
            if check is not None:
                content = written(check(read_body(await whole_body(Request(scope, receive)))))
                scope, receive = with_body(scope, receive, content)
            async with answer.alive():
                await self._app(scope, receive, answer.send)
        except BadRequest as error:
            await error_response(400, str(error), error.param)(scope, receive, send)
        except TooLarge as error:
            await error_response(400, str(error))(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            cause = innermost(error)
            logger.error("%s failed: %.500r", scope["path"], cause)
            logger.debug("%s failed", scope["path"], exc_info=error)
            if not answer.has_begun:
                await told(cause)(scope, receive, send)
            elif answer.is_event_stream:
                await answer.end_with(error_event(told(cause)))
            else:
                raise


def with_body(scope: Scope, receive: Receive, content: bytes) -> tuple[Scope, Receive]:
    """The request with another body, told as what it is: JSON."""
    replaced = (b"content-length", b"content-type", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name not in replaced]
    headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive_content() -> Message:
        return parts.pop() if parts else await receive()

    return {**scope, "headers": headers}, receive_content


def told(error: BaseException) -> JSONResponse:
    """What a client is told of a failure. FastChat has no kinds of errors but Python's."""
    if isinstance(error, ValueError) and str(error).startswith("No available worker"):
        return error_response(503, f"{error}. Try again later.")
    if isinstance(error, WorkerFailed):
        return error_response(503, "The model's worker failed on this request. Try again later.")
    if isinstance(error, LOST):
        return error_response(503, "The model's worker or the controller does not answer. Try again later.")
    return error_response(500, "The server failed on this request; its log says how.")


if __name__ == "__main__":
    run_main(main)
