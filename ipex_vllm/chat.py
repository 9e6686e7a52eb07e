"""Chat in a terminal with a worker, a controller or an OpenAI server: `python -m ipex_vllm.chat --url http://...`.

What the URL is, the program finds out. Ctrl-C stops an answer, Ctrl-D ends the program, `/help` lists the commands.
"""

from __future__ import annotations

import contextlib
import json
import readline  # noqa: F401  gives input() line editing and a history
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx
from rich.console import Console

from ipex_vllm.errors import OneLine, run_main
from ipex_vllm.options import Parser, add_options, from_namespace, layered_arguments, option
from ipex_vllm.serving.conversation import render_conversation

Message = dict[str, str]

CONNECT_TIMEOUT_S = 10.0
COMMANDS = {
    "/model [NAME]": "list the models, or take another; the chat goes on",
    "/set [NAME VALUE]": "show the settings, or change one, e.g. /set temperature 0.2",
    "/system [TEXT]": "start again with this system message",
    "/clear": "start again",
    "/help": "this list",
    "/quit": "leave, like Ctrl-D; Ctrl-C only stops an answer",
}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Whom to chat with."""

    url: str = option("URL of a worker, of FastChat's controller or of an OpenAI server", "http://127.0.0.1:21001")
    model: str | None = option("model to begin with; default: the first in the list", None)
    system: str = option("system message", "")
    api_token: str | None = option("sent as `Authorization: Bearer TOKEN`", None, secret=True)


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


class Chat:
    """One conversation, and the commands that change it."""

    def __init__(self, backend: Backend, options: ChatOptions, sampling: Sampling, console: Console) -> None:
        self._backend, self._sampling, self._console = backend, sampling, console
        self._restart(options.system)
        models = backend.models()
        if not models:
            raise ChatError(f"The {backend.kind} has no models yet: start a worker and try again")
        self._model = models[0]
        if options.model is not None:
            self._choose_model(options.model)

    def run(self) -> None:
        """Read questions and commands until the end of the input."""
        self._say(f"{self._model} on {self._backend.kind} {self._backend.client.base_url}. /help lists the commands.")
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /quit leaves.")
                continue
            except EOFError:
                self._console.print()
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line:
                    self._answer(line)
            except KeyboardInterrupt:
                self._say("(stopped)")
            except (ChatError, httpx.HTTPError) as error:
                self._console.print(f"error: {one_line(error)}", style="red", markup=False, highlight=False)

    def _answer(self, question: str) -> None:
        """Show the answer as it comes. An answer that was stopped stays in the conversation as far as it was seen."""
        self._messages.append({"role": "user", "content": question})
        pieces: list[str] = []
        try:
            with contextlib.closing(self._backend.stream(self._model, self._messages, self._sampling)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    self._console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                    self._console.file.flush()
        except KeyboardInterrupt:
            self._say(" (stopped)")
        except (ChatError, httpx.HTTPError):
            self._messages.pop()
            if any(pieces):
                self._console.print()
            raise
        else:
            self._console.print()
        self._messages.append({"role": "assistant", "content": "".join(pieces)})

    def _command(self, name: str, argument: str = "") -> None:
        if name == "/model":
            if argument:
                self._choose_model(argument)
            for model in self._backend.models():
                self._say(f"{'*' if model == self._model else ' '} {model}")
        elif name == "/set":
            if argument:
                self._set(*argument.split(maxsplit=1))
            for setting, value in asdict(self._sampling).items():
                self._say(f"  {setting} {value}")
        elif name in ("/clear", "/system"):
            self._restart(argument if name == "/system" else self._system)
            self._say("A new conversation.")
        elif name == "/help":
            for usage, meaning in COMMANDS.items():
                self._say(f"  {usage:18} {meaning}")
        else:
            raise ChatError(f"there is no command {name}: /help lists them")

    def _choose_model(self, name: str) -> None:
        models = self._backend.models()
        if name not in models:
            raise ChatError(f"there is no model {name!r}: choose from {', '.join(models)}")
        self._model = name

    def _set(self, name: str, value: str = "") -> None:
        kinds = typing.get_type_hints(Sampling)
        if name not in kinds:
            raise ChatError(f"there is no setting {name!r}: choose from {', '.join(kinds)}")
        try:
            self._sampling = replace(self._sampling, **{name: kinds[name](value)})
        except ValueError as error:
            raise ChatError(f"{name} takes {'a whole number' if kinds[name] is int else 'a number'}") from error

    def _restart(self, system: str) -> None:
        self._system = system
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def run(arguments: Sequence[str]) -> None:
    """Chat until the input ends. Raises OptionError, and ChatError when there is nobody to chat with."""
    parser = Parser(prog="python -m ipex_vllm.chat", allow_abbrev=False)
    add_options(parser, ChatOptions)
    add_options(parser, Sampling)
    args = parser.parse_args(layered_arguments(parser, arguments))
    options: ChatOptions = from_namespace(ChatOptions, args)
    headers = {"Authorization": f"Bearer {options.api_token}"} if options.api_token else {}
    url = options.url.rstrip("/").removesuffix("/v1")
    # An answer may take as long as it takes: Ctrl-C is at hand. Workers are near: no proxy.
    timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=None)
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False) as client:
            Chat(connect(client), options, from_namespace(Sampling, args), Console()).run()
    except (ChatError, httpx.HTTPError) as error:
        raise ChatError(one_line(error)) from error


def main(arguments: Sequence[str] | None = None) -> None:
    run_main(lambda: run(sys.argv[1:] if arguments is None else arguments))


def one_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


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
    """Yield what stands before each separator."""
    rest = b""
    for part in parts:
        *complete, rest = (rest + part).split(separator)
        yield from complete


if __name__ == "__main__":
    main()
