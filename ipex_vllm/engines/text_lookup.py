"""Drafts without a model: what followed the last tokens of a text where they stood before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST_MATCH = 8  # tokens; of two places that share more with the end of the text, neither is the better one


class TextLookup:
    """The tokens of one stream, prompt and answer."""

    __slots__ = ("_tokens", "length")

    def __init__(self) -> None:
        self._tokens = np.empty(0, dtype=np.int32)
        self.length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        end = self.length + len(tokens)
        if end > len(self._tokens):
            grown = np.empty(max(end, 2 * len(self._tokens)), dtype=np.int32)
            grown[: self.length] = self._tokens[: self.length]
            self._tokens = grown
        self._tokens[self.length : end] = tokens
        self.length = end

    def draft(self, most: int) -> tuple[list[int], int]:
        """Up to `most` tokens that may come next, and how many tokens before them are the same in both places.

        Of the places that have as many in common the newest counts. Where it is so near that the draft runs into the
        end of the text, it goes on in itself: a text that repeats itself does so.
        """
        text = self._tokens[: self.length]
        if self.length < 2 or most < 1:
            return [], 0
        ends = np.flatnonzero(text[:-1] == text[-1])
        match = 0
        while len(ends):
            match, newest = match + 1, int(ends[-1])
            if match == LONGEST_MATCH:
                break
            ends = ends[ends >= match]
            ends = ends[text[ends - match] == text[-1 - match]]
        if not match:
            return [], 0
        follow = text[newest + 1 : newest + 1 + most].tolist()
        return [follow[i % len(follow)] for i in range(most)], match
