"""How many draft tokens pay in a step of speculative decoding. Standard library only.

A step on a CPU reads all weights and computes a row for each token, so its time is about (FREE_ROWS + rows): a draft
token is nearly free beside one stream and costs as much as a stream's own token where many fill the arithmetic. To
check drafts at all makes a step longer by CHECK_ROWS, however few they are. They go into the step where they raise
the tokens that it is expected to yield for its time. What a stream's drafts came to before tells how likely the next
one is.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

FREE_ROWS = 10.0  # rows whose arithmetic takes as long as reading the weights
CHECK_ROWS = 3.0  # rows whose arithmetic takes as long as vLLM's check, for a small model; a large one has it cheaper
MEMORY = 0.9  # what a tested token still counts for when the next one is learned from
FORGOTTEN = 0.99  # the same for each token without a draft, so that a stream is tried again

# Of a draft token to be accepted, before the stream had one: a model's; a looked-up one's by its match, the number of
# tokens before it that are the same where it was found, one, two, and so on.
MODELS_CHANCE = (0.5,)
LOOKUPS_CHANCES = (0.2, 0.5, 0.6, 0.75, 0.8, 0.85, 0.85, 0.9)


class Acceptance:
    """How likely a stream's next draft tokens are to be accepted, after its newest ones.

    Args:
        first_chances: before there were any, by the match of the draft token. One that follows another in its draft
            has a match that is longer by one.
    """

    __slots__ = ("_accepted", "_first", "_last", "_tested")

    def __init__(self, first_chances: Sequence[float] = MODELS_CHANCE) -> None:
        self._first = first_chances
        self._accepted, self._tested = [0.0] * len(first_chances), [0.0] * len(first_chances)
        self._last = 0

    def learn(self, drafted: int, accepted: int, position: int, match: int = 1) -> None:
        """Learn from a draft of `drafted` tokens, `accepted` of them; the stream had `position` tokens before it.

        The first one that was refused was tested as well, those behind it were not.
        """
        kept = self._kept(position)
        self._accepted = [kept * each for each in self._accepted]
        self._tested = [kept * each for each in self._tested]
        for index in range(min(accepted + 1, drafted)):
            at = min(match + index, len(self._first)) - 1
            self._accepted[at] = MEMORY * self._accepted[at] + (index < accepted)
            self._tested[at] = MEMORY * self._tested[at] + 1
        self._last = position + accepted + 1

    def chances(self, position: int, most: int, match: int = 1) -> list[float]:
        """For each of `most` tokens of a draft at `position` the chance that it and all before it are accepted."""
        kept, chance, chances = self._kept(position), 1.0, []
        for index in range(most):
            at = min(match + index, len(self._first)) - 1
            chance *= (kept * self._accepted[at] + self._first[at]) / (kept * self._tested[at] + 1)
            chances.append(chance)
        return chances

    def _kept(self, position: int) -> float:
        return float(FORGOTTEN ** max(position - self._last, 0))


def lengths(chances: Sequence[Sequence[float]]) -> list[int]:
    """Draft tokens for each stream of a step, given the chances of those that it can have, falling."""
    granted = [0] * len(chances)
    tokens = rows = float(len(chances))
    waiting = [(-each[0], stream) for stream, each in enumerate(chances) if each]
    heapq.heapify(waiting)
    while waiting:
        chance, stream = -waiting[0][0], waiting[0][1]
        if chance * (FREE_ROWS + CHECK_ROWS + rows) <= tokens:  # less than the step's tokens for the time of a row
            break
        granted[stream] += 1
        tokens += chance
        rows += 1
        if granted[stream] < len(chances[stream]):
            heapq.heapreplace(waiting, (-chances[stream][granted[stream]], stream))
        else:
            heapq.heappop(waiting)
    pays = tokens * (FREE_ROWS + len(chances)) > len(chances) * (FREE_ROWS + CHECK_ROWS + rows)
    return granted if pays else [0] * len(chances)


def proposal(chances: Sequence[Sequence[float]], step_cost: float) -> int:
    """How many tokens a model is to draft for each stream, before it is known what the drafts will be.

    Args:
        chances: each stream's, see `Acceptance.chances`.
        step_cost: of drafting one token for all streams, as a share of a step of one token each.
    """
    plain = FREE_ROWS + len(chances)
    best, best_rate = 0, len(chances) / plain
    for length in range(1, max(map(len, chances), default=0) + 1):
        granted = lengths([each[:length] for each in chances])
        if not any(granted):
            continue
        tokens = len(chances) + sum(sum(each[:count]) for each, count in zip(chances, granted, strict=True))
        rate = tokens / (plain * (1 + step_cost * length) + CHECK_ROWS + sum(granted))
        if rate > best_rate:
            best, best_rate = length, rate
    return best
