"""FastChat's worker protocol: requests in, frames out, and every error a client can see.

Standard library only, so that it imports in any engine's environment. The protocol is FastChat 0.2.36's; see
docs/protocol.md for each field.

    WorkerError
    ├── InvalidParameter   40302  a parameter is missing, of the wrong type or out of range
    ├── ContextOverflow    40303  the prompt does not fit the context
    ├── InvalidModel       40301  another model than this worker's
    ├── Unauthorized       40101  no or wrong API token
    ├── Overloaded         42903  all slots and the queue are full, or the worker is draining
    └── InternalError      50001  the engine failed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

FinishReason = Literal["stop", "length"]
Number = TypeVar("Number", int, float)

MAX_LOGPROBS = 20
MAX_CHOICES = 64


class WorkerError(Exception):
    """An error a client can see: FastChat's code and a sentence that says what to do."""

    error_code: ClassVar[int]

    def payload(self) -> dict[str, Any]:
        return {"text": str(self), "error_code": self.error_code}


class InvalidParameter(WorkerError):
    error_code = 40302


class ContextOverflow(WorkerError):
    error_code = 40303

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens; the context holds {context_length} with room for at least one "
            "new token. Shorten the prompt."
        )


class InvalidModel(WorkerError):
    error_code = 40301


class Unauthorized(WorkerError):
    error_code = 40101


class Overloaded(WorkerError):
    error_code = 42903


class InternalError(WorkerError):
    error_code = 50001


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """The parameters of /worker_generate and /worker_generate_stream, checked. Sampling fields have vLLM's meaning."""

    prompt: str
    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    echo: bool = True
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    seed: int | None = None

    @classmethod
    def parse(cls, body: object) -> GenerateRequest:
        """Check a request body; an explicit null means the default. Raises InvalidParameter."""
        read = _Reader(body)
        best_of = read.number("best_of", int, 1, minimum=1)
        n = read.number("n", int, 1, minimum=1, maximum=MAX_CHOICES)
        if best_of > n or read.boolean("use_beam_search", False):
            raise InvalidParameter("best_of above n and use_beam_search are not supported. Leave them out.")
        temperature = read.number("temperature", float, 1.0, minimum=0.0, maximum=2.0)
        top_k = read.number("top_k", int, -1, minimum=-1)
        repetition_penalty = read.number("repetition_penalty", float, 1.0, minimum=0.0, maximum=100.0)
        if repetition_penalty == 0:
            raise InvalidParameter("repetition_penalty must be above 0; 1 leaves the probabilities as they are.")
        stop = read.strings("stop")
        return cls(
            prompt=read.text("prompt"),
            model=read.optional_text("model"),
            # FastChat's clients send tiny temperatures and a top_p of 0 and mean greedy decoding.
            temperature=temperature if temperature > 1e-5 else 0.0,
            top_p=max(read.number("top_p", float, 1.0, minimum=0.0, maximum=1.0), 1e-5),
            top_k=top_k if top_k > 0 else -1,
            min_p=read.number("min_p", float, 0.0, minimum=0.0, maximum=1.0),
            presence_penalty=read.number("presence_penalty", float, 0.0, minimum=-2.0, maximum=2.0),
            frequency_penalty=read.number("frequency_penalty", float, 0.0, minimum=-2.0, maximum=2.0),
            repetition_penalty=repetition_penalty,
            max_new_tokens=read.number("max_new_tokens", int, 256, minimum=1),
            echo=read.boolean("echo", True),
            stop=tuple(dict.fromkeys(text for text in stop if text)),
            stop_token_ids=read.token_ids("stop_token_ids"),
            ignore_eos=read.boolean("ignore_eos", False),
            logprobs=read.optional_number("logprobs", int, minimum=0, maximum=MAX_LOGPROBS),
            n=n,
            seed=read.optional_number("seed", int, minimum=-(2**63), maximum=2**63 - 1),
        )


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """The parameters of /worker_get_embeddings, checked."""

    inputs: tuple[str, ...]
    model: str | None = None
    base64: bool = False

    @classmethod
    def parse(cls, body: object) -> EmbeddingRequest:
        """Check a request body. Raises InvalidParameter."""
        read = _Reader(body)
        inputs = read.strings("input")
        if not inputs:
            raise InvalidParameter("input must be a string or a list of at least one string.")
        encoding = read.optional_text("encoding_format")
        if encoding not in (None, "float", "base64"):
            raise InvalidParameter(f'encoding_format must be "float" or "base64", not {encoding!r}.')
        return cls(inputs=inputs, model=read.optional_text("model"), base64=encoding == "base64")


def parse_prompt(body: object) -> str:
    """Return the prompt of a /count_token body. Raises InvalidParameter."""
    return _Reader(body).text("prompt")


class _Reader:
    """Typed access to a JSON object, in which null and a missing key both mean the default."""

    def __init__(self, body: object) -> None:
        if not isinstance(body, Mapping):
            raise InvalidParameter("The request body must be a JSON object.")
        self._body = body

    def _get(self, name: str) -> Any:
        return self._body.get(name)

    def optional_text(self, name: str) -> str | None:
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            raise InvalidParameter(f"{name} must be a string.")
        return value

    def text(self, name: str) -> str:
        value = self.optional_text(name)
        if value is None:
            raise InvalidParameter(f"{name} must be a string and cannot be left out.")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidParameter(f"{name} must be true or false, not {value!r}.")
        return value

    def optional_number(
        self, name: str, kind: type[Number], minimum: Number | None = None, maximum: Number | None = None
    ) -> Number | None:
        value = self._get(name)
        if value is None:
            return None
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not is_whole):
            raise InvalidParameter(f"{name} must be {'an integer' if kind is int else 'a number'}, not {value!r}.")
        if (minimum is not None and not value >= minimum) or (maximum is not None and not value <= maximum):
            bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
            raise InvalidParameter(f"{name} must be {bounds}, not {value!r}.")
        return kind(value)

    def number(
        self,
        name: str,
        kind: type[Number],
        default: Number,
        minimum: Number | None = None,
        maximum: Number | None = None,
    ) -> Number:
        value = self.optional_number(name, kind, minimum, maximum)
        return default if value is None else value

    def strings(self, name: str) -> tuple[str, ...]:
        value = self._get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise InvalidParameter(f"{name} must be a string or a list of strings.")
        return tuple(values)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self._get(name)
        if value is None:
            return ()
        # FastChat's HF worker tolerates null entries, and some of its registry's templates hold them.
        values = [item for item in value if item is not None] if isinstance(value, list) else None
        if values is None or not all(type(item) is int and item >= 0 for item in values):
            raise InvalidParameter(f"{name} must be a list of token ids (integers from 0).")
        return tuple(values)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log probability; `logprob` and `top` are None for the first token of a prompt."""

    token: str
    logprob: float | None
    top: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Delta:
    """What an engine step adds to one choice of a request.

    Attributes:
        text: new text, already cut before a stop string; never a part of a character.
        num_tokens: new completion tokens.
        prompt_tokens: length of the request's prompt, the same in every delta.
        finish_reason: set in the choice's last delta only.
        logprobs: one entry per new token, when asked for; with echo, the prompt's come first.
        index: which of the request's `n` choices.
    """

    text: str
    num_tokens: int
    prompt_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


@dataclass(slots=True)
class Choice:
    """One choice's text and log probabilities so far, as FastChat wants them: cumulative."""

    prefix: str
    wants_logprobs: bool
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    _texts: list[str] = field(default_factory=list)
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._logprobs.extend(delta.logprobs)
        self.num_tokens += delta.num_tokens
        self.finish_reason = delta.finish_reason

    def payload(self) -> dict[str, Any]:
        self._texts = ["".join(self._texts)]
        payload: dict[str, Any] = {"text": self.prefix + self._texts[0], "finish_reason": self.finish_reason}
        if self.wants_logprobs:
            payload["logprobs"] = logprobs_payload(self._logprobs)
        return payload


class Transcript:
    """All that a request has produced so far, and its frames."""

    def __init__(self, request: GenerateRequest) -> None:
        prefix = request.prompt if request.echo else ""
        self.choices = [Choice(prefix, request.logprobs is not None) for _ in range(request.n)]
        self.prompt_tokens = 0

    def add(self, delta: Delta) -> None:
        self.prompt_tokens = delta.prompt_tokens
        self.choices[delta.index].add(delta)

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    def payload(self) -> dict[str, Any]:
        """One frame's content: the first choice, and all of them under `choices` when there are several."""
        choices = [choice.payload() for choice in self.choices]
        payload = {
            **choices[0],
            "error_code": 0,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens,
            },
        }
        if len(choices) > 1:
            payload["choices"] = choices
            # A reason in a frame tells FastChat's clients that it is the last one.
            payload["finish_reason"] = choices[0]["finish_reason"] if self.is_finished else None
        return payload


def logprobs_payload(logprobs: Iterable[TokenLogprob]) -> dict[str, list[Any]]:
    """OpenAI's legacy completion format; `text_offset` counts characters from the first token."""
    payload: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    offset = 0
    for entry in logprobs:
        payload["text_offset"].append(offset)
        payload["token_logprobs"].append(entry.logprob)
        payload["tokens"].append(entry.token)
        payload["top_logprobs"].append(entry.top)
        offset += len(entry.token)
    return payload


def encode_frame(payload: Mapping[str, Any]) -> bytes:
    """A frame on the wire: JSON, ended by a zero byte."""
    return json.dumps(payload, separators=(",", ":")).encode() + b"\0"
