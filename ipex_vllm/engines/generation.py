"""What an engine is asked for and what it answers, in no protocol's words. Standard library only.

    RequestError
    ├── InvalidParameter  a parameter is missing, of the wrong type or out of range
    ├── ContextOverflow   the prompt does not fit the context
    └── InternalError     the engine failed

Those that are about serving rather than generating are in serving/core.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHARACTERS_PER_TOKEN = 4  # of English, about
IMAGE = "$$<image>$$"  # in a prompt, the place of a picture; FastChat's mark
FinishReason = Literal["stop", "length"]


class RequestError(Exception):
    """An error that a client can see: a sentence that says what to do."""


class InvalidParameter(RequestError):
    pass


class ContextOverflow(RequestError):
    """`prompt_tokens` is the least that the prompt has, where it was not counted to its end (`is_least`)."""

    def __init__(self, prompt_tokens: int, context_length: int, is_least: bool = False) -> None:
        self.prompt_tokens = prompt_tokens
        super().__init__(
            f"The prompt has {'at least ' if is_least else ''}{prompt_tokens} tokens; the context holds "
            f"{context_length} with room for at least one new token. Shorten the prompt."
        )


class InternalError(RequestError):
    pass


def tokens_of(text: str) -> int:
    """About how many tokens a text is, without a tokenizer."""
    return len(text) // CHARACTERS_PER_TOKEN


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt and how to go on from it. The sampling fields have vLLM's meaning.

    Attributes:
        max_new_tokens: the most that a choice may have; the context may leave room for fewer.
        stop: strings before which a text ends.
        stop_token_ids: tokens that end a text, beside the model's own.
        ignore_eos: the model's own do not end it.
        logprobs: how many of the likeliest tokens to report in each place, beside the one taken; None for no report.
        prompt_logprobs: report on the prompt's tokens too.
        n: how many choices.
        model: one of the engine's adapters; any other name, and none, is the model as it is.
        images: pictures as files have them (PNG, JPEG, ...), one for each IMAGE in the prompt.
    """

    prompt: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    n: int = 1
    seed: int | None = None
    model: str | None = None
    images: tuple[bytes, ...] = ()

    @property
    def size(self) -> int:
        """About how many tokens it is, the prompt's and the most that may come."""
        return tokens_of(self.prompt) + self.n * self.max_new_tokens


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
        logprobs: one entry per new token, when asked for; the prompt's, when asked for, come first.
        index: which of the request's `n` choices.
        drafted, accepted: draft tokens of the whole choice, and those that were right; in its last delta only.
    """

    text: str
    num_tokens: int
    prompt_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    drafted: int = 0
    accepted: int = 0
