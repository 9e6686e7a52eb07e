"""The work that is sent: prompts of exact token counts and the number of tokens to generate for each.

A workload is a list of sessions; a session is one or more turns, sent one after the other, each on top of the text so
far. Everything random comes from one seed, so the same specification is the same work, byte for byte.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.options import BenchmarkError

NUM_WORDS = 1024


@dataclass(frozen=True)
class Turn:
    """New text for the model (`num_tokens` of the model's tokens) and how many tokens it is to answer with."""

    text: str
    num_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Session:
    """Turns of one conversation, and for a recorded trace the second at which it began."""

    turns: tuple[Turn, ...]
    timestamp: float | None = None


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: `128`, `uniform:64:256`, `normal:128:32` or `lognormal:128:0.5`.

    The numbers are low and high (both included), mean and standard deviation, or median and the standard deviation
    of the logarithm. Samples are rounded and at least 1.
    """

    kind: str
    parameters: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Lengths:
        kind, *rest = text.split(":") if ":" in text else ("fixed", text)
        counts = {"fixed": 1, "uniform": 2, "normal": 2, "lognormal": 2}
        try:
            parameters = tuple(float(part) for part in rest)
        except ValueError:
            parameters = ()
        if len(parameters) != counts.get(kind) or parameters[0] < 1 or parameters[-1] < 0:
            raise BenchmarkError(
                f"length {text!r} is none of N, uniform:LOW:HIGH, normal:MEAN:STD, lognormal:MEDIAN:SIGMA (N >= 1)"
            )
        if kind == "uniform" and parameters[0] > parameters[1]:
            raise BenchmarkError(f"length {text!r}: LOW is above HIGH")
        return cls(kind, parameters)

    def sample(self, count: int, rng: np.random.Generator) -> list[int]:
        if self.kind == "fixed":
            values = np.full(count, self.parameters[0])
        elif self.kind == "uniform":
            low, high = self.parameters
            values = rng.integers(int(low), int(high), endpoint=True, size=count).astype(float)
        elif self.kind == "normal":
            mean, deviation = self.parameters
            values = rng.normal(mean, deviation, size=count)
        else:
            median, sigma = self.parameters
            values = rng.lognormal(np.log(median), sigma, size=count)
        return [max(1, round(value)) for value in values]


class PromptWriter:
    """Writes text of an exact number of a model's tokens, out of words that are one token each."""

    def __init__(self, model: Path) -> None:
        """Read `tokenizer.json` of the model directory `model`; a BenchmarkError says when there is none."""
        path = model / "tokenizer.json"
        if not path.is_file():
            raise BenchmarkError(f"{path} not found: name the model's local directory with --model-path")
        self.tokenizer = Tokenizer.from_file(str(path))
        self.words = self._single_token_words()
        if not self.words:
            raise BenchmarkError(f"{path} has no words of a single token to write prompts with")

    def count(self, text: str, special_tokens: bool = True) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def _single_token_words(self) -> list[str]:
        """Words that add one token each wherever they stand, in the vocabulary's order."""
        words = []
        for token, _ in sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1]):
            # Byte-level BPE writes a leading space as Ġ, SentencePiece as ▁.
            if token[:1] in ("Ġ", "▁") and len(token) > 2 and token[1:].isascii() and token[1:].isalpha():
                word = " " + token[1:]
                if self.count(word * 3) == self.count(word * 2) + 1 == self.count(word) + 2:
                    words.append(word)
            if len(words) == NUM_WORDS:
                break
        return words

    def write(self, num_tokens: int, rng: np.random.Generator, before: str = "", special_tokens: bool = True) -> str:
        """Return text that, after `before`, brings the whole to exactly `num_tokens` tokens.

        With `special_tokens` the count includes those that the tokenizer puts around every prompt, such as BOS.
        """
        words: list[str] = []
        for _ in range(8):
            missing = num_tokens - self.count(before + "".join(words), special_tokens)
            if missing == 0:
                return "".join(words)
            words = words[:missing] if missing < 0 else [*words, *rng.choice(self.words, size=missing)]
        raise BenchmarkError(f"cannot write a prompt of exactly {num_tokens} tokens with this tokenizer")


def synthetic_sessions(
    writer: PromptWriter,
    count: int,
    prompt: Lengths,
    output: Lengths,
    rng: np.random.Generator,
    prefix_tokens: int = 0,
    num_turns: int = 1,
) -> list[Session]:
    """Sessions of random words.

    The first turn of each has `prompt` tokens, of which the first `prefix_tokens` are the same text in all sessions;
    later turns add `prompt` tokens each. Raises BenchmarkError when a prompt would be shorter than the prefix.
    """
    length_rng, text_rng = rng.spawn(2)
    prompts = np.array(prompt.sample(count * num_turns, length_rng)).reshape(count, num_turns)
    outputs = np.array(output.sample(count * num_turns, length_rng)).reshape(count, num_turns)
    if prefix_tokens and prompts[:, 0].min() <= prefix_tokens:
        raise BenchmarkError(f"a prompt of {prompts[:, 0].min()} tokens cannot hold a prefix of {prefix_tokens}")
    prefix = writer.write(prefix_tokens, text_rng) if prefix_tokens else ""
    sessions = []
    for prompt_lengths, output_lengths in zip(prompts.tolist(), outputs.tolist(), strict=True):
        first = prefix + writer.write(prompt_lengths[0], text_rng, before=prefix)
        texts = [first, *(writer.write(length, text_rng, special_tokens=False) for length in prompt_lengths[1:])]
        turns = tuple(Turn(*turn) for turn in zip(texts, prompt_lengths, output_lengths, strict=True))
        sessions.append(Session(turns))
    return sessions


def read_sessions(path: Path, writer: PromptWriter, output: Lengths, rng: np.random.Generator) -> list[Session]:
    """Read sessions from a file.

    `.jsonl`: an object a line, `{"prompt": str, "output_tokens"?: int, "timestamp"?: seconds}`. Otherwise ShareGPT's
    format: a JSON list of `{"conversations": [{"from": "human" | "gpt", "value": str}, ...]}`, of which each human
    message is a turn, answered with as many tokens as the message after it has. What a line leaves open is sampled
    from `output`. Raises BenchmarkError, naming the entry, for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_jsonl = path.suffix == ".jsonl"
        entries = [json.loads(line) for line in text.splitlines() if line] if is_jsonl else json.loads(text)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"cannot read the workload file {path}: {error}") from None
    sessions = []
    for number, entry in enumerate(entries, start=1):
        try:
            sessions.append(
                _sharegpt_session(entry, writer)
                if "conversations" in entry
                else _jsonl_session(entry, writer, output, rng)
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BenchmarkError(f"{path}: entry {number} is not in JSONL or ShareGPT format ({error!r})") from None
    if not any(session.turns for session in sessions):
        raise BenchmarkError(f"{path} holds no prompts")
    return [session for session in sessions if session.turns]


def _jsonl_session(entry: dict[str, Any], writer: PromptWriter, output: Lengths, rng: np.random.Generator) -> Session:
    prompt = entry["prompt"]
    if not isinstance(prompt, str):
        raise ValueError("prompt is not a string")
    output_tokens = int(entry["output_tokens"]) if "output_tokens" in entry else output.sample(1, rng)[0]
    timestamp = float(entry["timestamp"]) if "timestamp" in entry else None
    return Session((Turn(prompt, writer.count(prompt), output_tokens),), timestamp)


def _sharegpt_session(entry: dict[str, list[dict[str, str]]], writer: PromptWriter) -> Session:
    messages: Sequence[dict[str, str]] = entry["conversations"]
    turns: list[Turn] = []
    for message, reply in itertools.pairwise(messages):
        if message["from"] == "human" and reply["from"] == "gpt" and reply["value"]:
            num_tokens = writer.count(message["value"], special_tokens=not turns)
            turns.append(Turn(message["value"], num_tokens, writer.count(reply["value"], special_tokens=False)))
    return Session(tuple(turns))
