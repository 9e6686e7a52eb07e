"""From tokens to the text that a client may see: whole characters, and nothing of a stop string. No model library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode a part of a character to
CONTEXT_TOKENS = 8  # the text of a token depends on those just before it: a space, the rest of a character
MAX_TOKENS_BEFORE_IN_CHARACTER = 3  # of UTF-8's at most four bytes


class Detokenizer:
    """Turns tokens into text as they come.

    Args:
        decode: token ids to text, special tokens left out.
        prompt: the token ids before the first.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._shown = list(prompt[-CONTEXT_TOKENS:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the new text; "" while a character is incomplete."""
        self._pending.append(token_id)
        before = self._decode(self._shown)
        text = self._decode(self._shown + self._pending)
        if text.endswith(INCOMPLETE) or len(text) <= len(before):
            return ""
        self._shown, self._pending = self._pending, []
        return text[len(before) :]


class StopStrings:
    """Ends a text before the first of some strings, and holds back what may turn out to be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that can be shown now, and whether a stop string has come up."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start = min(found, key=lambda end_and_start: end_and_start[0])
            self._held = ""
            return text[:start], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """Return what was held back: the text is over and it was no stop string."""
        held, self._held = self._held, ""
        return held


def token_text(decode: Decode, before: Sequence[int], token_id: int) -> str:
    """One token on its own, for log probabilities.

    A token that ends a character begun by those `before` it stands for all of it; one that leaves it open, for "".
    """
    text = decode([token_id])
    for start in range(len(before) - 1, max(len(before) - MAX_TOKENS_BEFORE_IN_CHARACTER, 0) - 1, -1):
        if not text.endswith(INCOMPLETE):
            break
        text = decode([*before[start:], token_id])
    return "" if text.endswith(INCOMPLETE) else text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a start of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
