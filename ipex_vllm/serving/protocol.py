"""FastChat's worker protocol: requests in, frames and errors out.

The protocol is FastChat 0.2.36's; see docs/protocol.md for each field.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ipex_vllm.engines.bounds import MAX_CHOICES, MAX_INT32, MAX_LOGPROBS, check_stops, check_text, shown
from ipex_vllm.engines.generation import (
    Delta,
    FinishReason,
    Generation,
    InvalidParameter,
    RequestError,
    TokenLogprob,
)
from ipex_vllm.serving.core import error_code
from ipex_vllm.serving.json_bodies import dumps

Number = TypeVar("Number", int, float)

FRAMES_MEDIA_TYPE = "application/octet-stream"  # JSON texts with zero bytes between them have no type of their own
LOWEST_LOGPROB = -9999.0
MAX_INPUTS = 2048  # texts to embed at once, as many as OpenAI's API takes


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A body of /worker_generate or /worker_generate_stream, checked: what to generate, and FastChat's own fields."""

    generation: Generation
    echo: bool = True

    @classmethod
    def parse(cls, body: object) -> GenerateRequest:
        """Check a request body; an explicit null means the default. Raises InvalidParameter."""
        read = _Reader(body)
        best_of = read.number("best_of", int, 1, minimum=1)
        n = read.number("n", int, 1, minimum=1, maximum=MAX_CHOICES)
        if best_of > n or read.boolean("use_beam_search", False):
            raise InvalidParameter("best_of above n and use_beam_search are not supported. Leave them out.")
        temperature = read.number("temperature", float, 1.0, minimum=0.0, maximum=2.0)
        top_k = read.number("top_k", int, -1, minimum=-1, maximum=MAX_INT32)
        repetition_penalty = read.number("repetition_penalty", float, 1.0, minimum=0.0, maximum=100.0)
        if repetition_penalty == 0:
            raise InvalidParameter("repetition_penalty must be above 0; 1 leaves the probabilities as they are.")
        stop, stop_token_ids = read.strings("stop"), read.token_ids("stop_token_ids")
        check_stops(stop, stop_token_ids)
        echo = read.boolean("echo", True)
        logprobs = read.optional_number("logprobs", int, minimum=0, maximum=MAX_LOGPROBS)
        generation = Generation(
            prompt=read.text("prompt"),
            # FastChat's clients send tiny temperatures and a top_p of 0 and mean greedy decoding.
            temperature=temperature if temperature > 1e-5 else 0.0,
            top_p=max(read.number("top_p", float, 1.0, minimum=0.0, maximum=1.0), 1e-5),
            top_k=top_k if top_k > 0 else -1,
            min_p=read.number("min_p", float, 0.0, minimum=0.0, maximum=1.0),
            presence_penalty=read.number("presence_penalty", float, 0.0, minimum=-2.0, maximum=2.0),
            frequency_penalty=read.number("frequency_penalty", float, 0.0, minimum=-2.0, maximum=2.0),
            repetition_penalty=repetition_penalty,
            max_new_tokens=read.number("max_new_tokens", int, 256, minimum=1),
            stop=tuple(dict.fromkeys(text for text in stop if text)),
            stop_token_ids=stop_token_ids,
            ignore_eos=read.boolean("ignore_eos", False),
            logprobs=logprobs,
            prompt_logprobs=echo and logprobs is not None,
            n=n,
            model=read.optional_text("model"),
            images=read.images("images"),
            seed=read.optional_number("seed", int, minimum=-(2**63), maximum=2**63 - 1),
        )
        return cls(generation, echo)


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
        if len(inputs) > MAX_INPUTS:
            raise InvalidParameter(f"input has {len(inputs)} texts; at most {MAX_INPUTS} are possible.")
        encoding = read.optional_text("encoding_format")
        if encoding not in (None, "float", "base64"):
            raise InvalidParameter(f'encoding_format must be "float" or "base64", not {shown(encoding)}.')
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
        if value is not None:
            check_text(name, value)
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
            raise InvalidParameter(f"{name} must be true or false, not {shown(value)}.")
        return value

    def optional_number(
        self, name: str, kind: type[Number], minimum: Number | None = None, maximum: Number | None = None
    ) -> Number | None:
        value = self._get(name)
        if value is None:
            return None
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not is_whole):
            raise InvalidParameter(f"{name} must be {'an integer' if kind is int else 'a number'}, not {shown(value)}.")
        if (minimum is not None and not value >= minimum) or (maximum is not None and not value <= maximum):
            bounds = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
            raise InvalidParameter(f"{name} must be {bounds}, not {shown(value)}.")
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
        for item in values:
            check_text(name, item)
        return tuple(values)

    def images(self, name: str) -> tuple[bytes, ...]:
        """Pictures in base64, alone or as a data URL. None is fetched: a client could point into this network."""
        images = []
        for number, text in enumerate(self.strings(name)):
            if text.startswith(("http://", "https://")):
                raise InvalidParameter(f"{name}[{number}] is an address. Send the picture itself, in base64.")
            content = text.partition(",")[2] if text.startswith("data:") else text
            try:
                images.append(base64.b64decode(content, validate=True))
            except ValueError as error:
                raise InvalidParameter(f"{name}[{number}] is no base64: {error}.") from error
        return tuple(images)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self._get(name)
        if value is None:
            return ()
        # FastChat's HF worker tolerates null entries, and some of its registry's templates hold them.
        values = [item for item in value if item is not None] if isinstance(value, list) else None
        if values is None or not all(type(item) is int and 0 <= item <= MAX_INT32 for item in values):
            raise InvalidParameter(f"{name} must be a list of token ids (integers from 0 to {MAX_INT32}).")
        return tuple(values)


@dataclass(slots=True)
class ChoiceTranscript:
    """One choice's text and log probabilities so far, as FastChat wants them: cumulative."""

    prefix: str
    logprobs: Logprobs | None  # where they are wanted
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    _texts: list[str] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        if self.logprobs is not None:
            self.logprobs.add(delta.logprobs)
        self.num_tokens += delta.num_tokens
        self.finish_reason = delta.finish_reason

    def payload(self) -> dict[str, Any]:
        self._texts = ["".join(self._texts)]
        payload: dict[str, Any] = {"text": self.prefix + self._texts[0], "finish_reason": self.finish_reason}
        if self.logprobs is not None:
            payload["logprobs"] = self.logprobs.payload
        return payload


class Transcript:
    """All that a request has produced so far, and its frames."""

    def __init__(self, request: GenerateRequest) -> None:
        generation = request.generation
        prefix = generation.prompt if request.echo else ""
        wants_logprobs = generation.logprobs is not None
        self.choices = [ChoiceTranscript(prefix, Logprobs() if wants_logprobs else None) for _ in range(generation.n)]
        self.prompt_tokens = 0

    def add(self, delta: Delta) -> None:
        self.prompt_tokens = delta.prompt_tokens
        self.choices[delta.index].add(delta)

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    def payload(self) -> dict[str, Any]:
        """One frame's content: the first choice, and all of them under `choices` when there are several.

        Its log probabilities are lists that grow with the next delta: it is to be encoded before.
        """
        choices = [choice.payload() for choice in self.choices]
        completion_tokens = sum(choice.num_tokens for choice in self.choices)
        payload = {
            **choices[0],
            "error_code": 0,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": self.prompt_tokens + completion_tokens,
            },
        }
        if len(choices) > 1:
            payload["choices"] = choices
            # A reason in a frame tells FastChat's clients that it is the last one.
            payload["finish_reason"] = choices[0]["finish_reason"] if self.is_finished else None
        return payload


class Logprobs:
    """A choice's log probabilities in OpenAI's legacy completion format.

    Attributes:
        payload: lists with an entry for each token so far; `text_offset` counts characters from the first token.
    """

    def __init__(self) -> None:
        self.payload: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        self._offset = 0

    def add(self, logprobs: Iterable[TokenLogprob]) -> None:
        for entry in logprobs:
            top = None if entry.top is None else {token: as_json_number(value) for token, value in entry.top.items()}
            self.payload["text_offset"].append(self._offset)
            self.payload["token_logprobs"].append(None if entry.logprob is None else as_json_number(entry.logprob))
            self.payload["tokens"].append(entry.token)
            self.payload["top_logprobs"].append(top)
            self._offset += len(entry.token)


def as_json_number(logprob: float) -> float | None:
    """A log probability as JSON has one: what sampling ruled out (minus infinity) as OpenAI writes it."""
    return None if math.isnan(logprob) else min(max(logprob, LOWEST_LOGPROB), -LOWEST_LOGPROB)


def error_payload(error: RequestError) -> dict[str, Any]:
    """FastChat's form of an error."""
    return {"text": str(error), "error_code": error_code(error)}


def encode_frame(payload: Mapping[str, Any]) -> bytes:
    """A frame on the wire: JSON, ended by a zero byte."""
    return dumps(payload) + b"\0"
