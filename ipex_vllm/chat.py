"""Chat in a terminal with a worker, a controller or an OpenAI server: `python -m ipex_vllm.chat --url http://...`.

What the URL is, the program finds out. Ctrl-C stops an answer, Ctrl-D ends the program, `/help` lists the commands.
"""

from __future__ import annotations

import contextlib
import readline  # noqa: F401  gives input() line editing and a history
import sys
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import httpx
from rich.console import Console

from ipex_vllm.chat_servers import Backend, ChatError, Message, Sampling, connect
from ipex_vllm.errors import run_main
from ipex_vllm.options import Parser, add_options, from_namespace, http_address, layered_arguments, option

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

    url: str = option(
        "URL of a worker, of FastChat's controller or of an OpenAI server", "http://127.0.0.1:21001", parse=http_address
    )
    model: str | None = option("model to begin with; default: the first in the list", None)
    system: str = option("system message", "")
    api_token: str | None = option("sent as `Authorization: Bearer TOKEN`", None, secret=True)


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


if __name__ == "__main__":
    main()
