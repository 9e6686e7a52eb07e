"""How many draft tokens pay in a step of speculative decoding. Standard library only.

A step on a CPU reads all weights and computes a row for each token, so its time is about (FREE_ROWS + rows): a draft
token is nearly free beside one stream and costs as much as a stream's own token where many fill the arithmetic. It goes
into the step where it raises the tokens that the step is expected to yield for its time. What a stream's drafts came to
before tells how likely the next one is.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

FREE_ROWS = 10.0  # rows whose arithmetic takes as long as reading the weights
FIRST_CHANCE = 0.5  # of a draft token, before the stream had one
MEMORY = 0.8  # what a draft still counts for when the next one is learned from
FORGOTTEN = 0.995  # the same for each token without a draft, so that a stream is tried again


class Acceptance:
    """How likely a stream's next draft token is to be accepted, after its newest drafts."""

    __slots__ = ("_accepted", "_last", "_tested")

    def __init__(self) -> None:
        self._accepted = self._tested = 0.0
        self._last = 0

    def learn(self, drafted: int, accepted: int, position: int) -> None:
        """Learn from a draft of `drafted` tokens, `accepted` of them; the stream had `position` tokens before it.

        The first one that was refused was tested as well, those behind it were not.
        """
        kept = MEMORY * self._kept(position)
        self._accepted = kept * self._accepted + accepted
        self._tested = kept * self._tested + min(accepted + 1, drafted)
        self._last = position + accepted + 1

    def chance(self, position: int) -> float:
        """The chance of the first token of a draft at `position`; of the n-th, its n-th power."""
        kept = self._kept(position)
        return (kept * self._accepted + FIRST_CHANCE) / (kept * self._tested + 1)

    def _kept(self, position: int) -> float:
        return float(FORGOTTEN ** max(position - self._last, 0))


def lengths(chances: Sequence[float], limits: Sequence[int], free_rows: float = FREE_ROWS) -> list[int]:
    """Draft tokens for each stream of a step, given each one's chance and the most that it can have."""
    granted = [0] * len(chances)
    tokens = rows = float(len(chances))
    waiting = [(-chance, stream) for stream, chance in enumerate(chances) if limits[stream] > 0]
    heapq.heapify(waiting)
    while waiting:
        chance, stream = -waiting[0][0], waiting[0][1]
        if chance * (free_rows + rows) <= tokens:  # less than the step's tokens for the time of a row
            break
        granted[stream] += 1
        tokens += chance
        rows += 1
        if granted[stream] < limits[stream]:
            heapq.heapreplace(waiting, (-chance * chances[stream], stream))
        else:
            heapq.heappop(waiting)
    return granted


def proposal(chances: Sequence[float], most: int, step_cost: float, free_rows: float = FREE_ROWS) -> int:
    """How many tokens to draft for each stream, before it is known what the drafts will be.

    Args:
        chances: each stream's, see `Acceptance.chance`.
        most: the longest draft.
        step_cost: of drafting one token for all streams, as a share of a step of one token each; 0 for a lookup.
    """
    if step_cost == 0:
        return max(lengths(chances, [most] * len(chances), free_rows), default=0)
    plain = free_rows + len(chances)
    best, best_rate = 0, len(chances) / plain
    for length in range(1, most + 1):
        granted = lengths(chances, [length] * len(chances), free_rows)
        tokens = len(chances) + sum(_expected(chance, count) for chance, count in zip(chances, granted, strict=True))
        rate = tokens / (plain * (1 + step_cost * length) + sum(granted))
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def _expected(chance: float, length: int) -> float:
    """Accepted tokens of a draft: the sum of the first `length` powers of `chance`."""
    return float(length) if chance >= 1 else chance * (1 - chance**length) / (1 - chance)
