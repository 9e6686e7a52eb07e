"""Drafts without a model: what followed the last tokens of a text where they stood before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# Tokens. What followed one token is right one time in five, which does not pay; of two places that share more than the
# longest match with the end of the text, neither is the better one.
SHORTEST_MATCH, LONGEST_MATCH = 2, 8


class TextLookup:
    """The tokens of one stream, prompt and answer."""

    __slots__ = ("_pairs", "_tokens", "length")

    def __init__(self) -> None:
        self._pairs: set[tuple[int, int]] = set()  # that something follows: most texts have no other match to look for
        self._tokens = np.empty(0, dtype=np.int32)
        self.length = 0

    def extend(self, tokens: Sequence[int]) -> None:
        before = self._tokens[max(self.length - 2, 0) : self.length].tolist()
        self._pairs.update(pairwise([*before, *tokens][:-1]))
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
        if most < 1 or tuple(text[-SHORTEST_MATCH:].tolist()) not in self._pairs:
            return [], 0
        ends = np.flatnonzero(text[:-1] == text[-1])
        match = 0
        while len(ends):
            match, newest = match + 1, int(ends[-1])
            if match == LONGEST_MATCH:
                break
            ends = ends[ends >= match]
            ends = ends[text[ends - match] == text[-1 - match]]
        follow = text[newest + 1 : newest + 1 + most].tolist()
        return [follow[i % len(follow)] for i in range(most)], match
