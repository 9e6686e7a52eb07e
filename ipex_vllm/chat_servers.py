"""What `ipex_vllm.chat` talks to: an OpenAI server, a worker, or a worker that FastChat's controller names."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from ipex_vllm.errors import OneLine
from ipex_vllm.options import option
from ipex_vllm.serving.conversation import render_conversation

Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What /set changes."""

    temperature: float = option("0 takes the likeliest token every time", 0.7)
    top_p: float = option("sample from the likeliest tokens that make up this much of the probability", 1.0)
    max_tokens: int = option("tokens of an answer at most", 1024)
    presence_penalty: float = option("against tokens that occurred", 0.0)
    frequency_penalty: float = option("against tokens by how often they occurred", 0.0)


class ChatError(OneLine):
    """What went wrong."""


class Backend(ABC):
    """A server that chats."""

    kind: str

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    @abstractmethod
    def models(self) -> list[str]:
        """The names that can be chatted with. Raises httpx.HTTPError, or KeyError when this is no such server."""

    @abstractmethod
    def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, None]:
        """Yield the answer piece by piece; closing it ends the request. Raises ChatError, httpx.HTTPError."""


class OpenAiServer(Backend):
    kind = "OpenAI server"

    def models(self) -> list[str]:
        return [model["id"] for model in _json(self.client.get("/v1/models"))["data"]]

    def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, None]:
        body = {"model": model, "messages": messages, "stream": True, **asdict(sampling)}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise ChatError(_error_text(_json_or_empty(response)) or f"HTTP status {response.status_code}")
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if text := _error_text(chunk):
                    raise ChatError(text)
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""


class Worker(Backend):
    kind = "worker"

    def models(self) -> list[str]:
        names: list[str] = _json(self.client.post("/worker_get_status"))["model_names"]
        return names

    def address(self, model: str) -> str:
        """URL of a worker that serves `model`, as far as it differs from the client's."""
        return ""

    def stream(self, model: str, messages: Sequence[Message], sampling: Sampling) -> Generator[str, None, None]:
        address = self.address(model)
        conversation = _json(self.client.post(f"{address}/worker_get_conv_template", json={"model": model}))["conv"]
        body = {
            **asdict(sampling),
            "model": model,
            "prompt": render_conversation(conversation, messages),
            "max_new_tokens": sampling.max_tokens,
            "stop": conversation["stop_str"],
            "stop_token_ids": conversation["stop_token_ids"],
            "echo": False,
        }
        with self.client.stream("POST", f"{address}/worker_generate_stream", json=body) as response:
            response.raise_for_status()
            length = 0
            for frame in _split(response.iter_bytes(), b"\0"):
                chunk = json.loads(frame)
                if text := _error_text(chunk):
                    raise ChatError(text)
                yield chunk["text"][length:]
                length = len(chunk["text"])


class Controller(Worker):
    kind = "controller"

    def models(self) -> list[str]:
        return sorted(_json(self.client.post("/list_models"))["models"])

    def address(self, model: str) -> str:
        address: str = _json(self.client.post("/get_worker_address", json={"model": model}))["address"]
        if not address:
            raise ChatError(f"No worker serves {model!r} now. /model lists what there is.")
        return address


def connect(client: httpx.Client) -> Backend:
    """Find out what answers at the client's URL. Raises ChatError."""
    status = None
    for backend_class in (OpenAiServer, Controller, Worker):  # a controller answers /worker_get_status as well
        backend = backend_class(client)
        try:
            backend.models()
            return backend
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status == httpx.codes.UNAUTHORIZED:
                raise ChatError(f"{client.base_url} asks for a token: give it with --api-token") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ChatError(
                f"{client.base_url} does not answer ({error}): is it running? --url names another"
            ) from error
        except (KeyError, TypeError, ValueError):
            continue
    raise ChatError(f"{client.base_url} is no worker, no controller and no OpenAI server (status {status})")


def _json(response: httpx.Response) -> Any:
    return response.raise_for_status().json()


def _json_or_empty(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {}


def _error_text(chunk: Any) -> str:
    """The error in what FastChat's worker, FastChat's API server or vLLM's server sent; empty when there is none."""
    if chunk.get("error_code"):
        return f"{chunk['text']} (error_code: {chunk['error_code']})"
    if chunk.get("object") == "error":
        return f"{chunk['message']} (code: {chunk['code']})"
    error = chunk.get("error")
    return "" if not error else str(error.get("message", error) if isinstance(error, dict) else error)


def _split(parts: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """Yield what stands before each separator; nothing there is a worker's sign of life."""
    rest = b""
    for part in parts:
        *complete, rest = (rest + part).split(separator)
        yield from filter(None, complete)
