"""From what happened (timelines) to figures: pure functions, no clock, no input or output.

All times are seconds on one monotonic clock that starts with the run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from benchmarks.options import BenchmarkError

Phase = Literal["warmup", "measured", "cooldown"]
PERCENTILES = (50, 90, 99)
NORMAL_95 = 1.960  # the two-sided 95 % quantile of a normal distribution, in standard deviations
SLO_METRICS = ("ttft", "tpot", "e2e")


@dataclass
class Timeline:
    """What one request did, filled in while it runs.

    `scheduled` is when the arrival plan wanted it sent, `started` when it was. `chunks` are the moments at which new
    output tokens arrived, with the output tokens so far where the server said (its usage), else None.
    """

    session: int
    turn: int
    phase: Phase
    prompt: str
    prompt_tokens: int
    max_tokens: int
    must_reach_max: bool
    scheduled: float
    started: float = math.nan
    chunks: list[tuple[float, int | None]] = field(default_factory=list)
    ended: float = math.nan
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    usage_prompt_tokens: int | None = None
    usage_output_tokens: int | None = None

    @property
    def output_tokens(self) -> int | None:
        """Output tokens by the server's usage; without one, the limit, if that is why the server stopped."""
        if self.usage_output_tokens is not None:
            return self.usage_output_tokens
        return self.max_tokens if self.finish_reason == "length" else None

    @property
    def status(self) -> Literal["ok", "failed", "incomplete"]:
        """`failed`: refused or broken. `incomplete`: ended without a reason, or short of the tokens it owed."""
        if self.error is not None:
            return "failed"
        if self.finish_reason not in ("stop", "length"):
            return "incomplete"
        if self.must_reach_max and self.output_tokens != self.max_tokens:
            return "incomplete"
        return "ok"

    def check_order(self) -> None:
        """Raise ValueError when the recorded times run backwards: the figures would be nonsense."""
        times = [self.scheduled, self.started, *(time for time, _ in self.chunks), self.ended]
        times = [time for time in times if not math.isnan(time)]
        if any(later < earlier for earlier, later in itertools.pairwise(times)):
            raise ValueError(f"session {self.session} turn {self.turn}: times run backwards: {times}")


def ttft(timeline: Timeline) -> float | None:
    """Time to first token, from when the request was *due*: a late generator or a full socket is not forgiven."""
    return timeline.chunks[0][0] - timeline.scheduled if timeline.chunks else None


def tpot(timeline: Timeline) -> float | None:
    """Time per output token after the first chunk; None where nothing came after it.

    (t_last - t_first) / (tokens - tokens in the first chunk). With one token in the first chunk this is the usual
    definition; a server that sends several tokens at once is not credited for those of the first chunk.
    """
    if len(timeline.chunks) < 2 or timeline.output_tokens is None:
        return None
    (first, first_tokens), (last, _) = timeline.chunks[0], timeline.chunks[-1]
    tokens_after = timeline.output_tokens - (first_tokens or 1)
    return (last - first) / tokens_after if tokens_after > 0 else None


def itl(timeline: Timeline) -> list[float]:
    """Gaps between successive chunks, which is what a reader of the stream sees; a chunk may hold several tokens."""
    return [later - earlier for (earlier, _), (later, _) in itertools.pairwise(timeline.chunks)]


def e2e(timeline: Timeline) -> float:
    """From when the request was due to the end of its response."""
    return timeline.ended - timeline.scheduled


@dataclass(frozen=True)
class Slo:
    """Service-level objectives: the most seconds a request may take by each metric of SLO_METRICS."""

    limits: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Parse `ttft:0.5,tpot:0.05`; the empty string is no objective. Raises BenchmarkError."""
        limits = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition(":")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = 0.0
            if name not in SLO_METRICS or limits[name] <= 0:
                raise BenchmarkError(f"slo {part!r}: expected METRIC:SECONDS, METRIC one of {', '.join(SLO_METRICS)}")
        return cls(limits)

    def met(self, timeline: Timeline) -> bool:
        """Whether a request that went well did so in time; a metric it does not have (no second chunk) is met."""
        values = {"ttft": ttft(timeline), "tpot": tpot(timeline), "e2e": e2e(timeline)}
        return all((values[name] or 0.0) <= limit for name, limit in self.limits.items())


def window(timelines: Sequence[Timeline]) -> tuple[float, float]:
    """The measured span: from the first measured arrival to the first cool-down arrival.

    Without cool-down requests it ends when the last measured request has.
    """
    measured = [timeline for timeline in timelines if timeline.phase == "measured"]
    tail = [timeline.scheduled for timeline in timelines if timeline.phase == "cooldown"]
    if not measured:
        return math.nan, math.nan
    ends = [timeline.ended for timeline in measured if not math.isnan(timeline.ended)]
    return min(timeline.scheduled for timeline in measured), min(tail, default=max(ends, default=math.nan))


def output_tokens_between(timeline: Timeline, start: float, end: float) -> float:
    """Output tokens that arrived in [start, end].

    The total is the server's count. Where the server gave no count per chunk, the total is spread evenly over chunks.
    """
    total = timeline.output_tokens
    if not total or not timeline.chunks:
        return 0.0
    tokens, before = 0.0, 0.0
    for index, (time, so_far) in enumerate(timeline.chunks, start=1):
        after = so_far if so_far is not None else total * index / len(timeline.chunks)
        if start <= time <= end:
            tokens += after - before
        before = after
    return tokens


def distribution(values: Iterable[float | None]) -> dict[str, Any] | None:
    """Mean, largest and percentiles (linear interpolation) of the values there are, or None when there are none.

    `p99` and its like are there if so many values are that one of them lies beyond: of fewer it would be the largest by
    another name. `p99_interval` has the two values between which it lies with 95 % confidence, by their ranks; None for
    an end that no value bounds.
    """
    present = np.sort([value for value in values if value is not None])
    if not len(present):
        return None
    result: dict[str, Any] = {"mean": float(present.mean()), "max": float(present[-1])}
    for percent in PERCENTILES:
        if len(present) * (100 - percent) < 100 and percent != 50:
            continue
        middle, share = len(present) * percent / 100, percent / 100
        half = NORMAL_95 * math.sqrt(middle * (1 - share))
        low, high = math.floor(middle - half), math.ceil(middle + half)
        result[f"p{percent}"] = float(np.percentile(present, percent))
        result[f"p{percent}_interval"] = [
            float(present[low - 1]) if low >= 1 else None,
            float(present[high - 1]) if high <= len(present) else None,
        ]
    return result


def summarize(timelines: Sequence[Timeline], slo: Slo) -> dict[str, Any]:
    """Figures of one run.

    Latencies are those of measured requests that went well. Rates count what happened inside the window, whichever
    request it belongs to, so that work carried over from warm-up weighs as much as work carried over to cool-down.
    Raises ValueError for a timeline whose times run backwards.
    """
    for timeline in timelines:
        timeline.check_order()
    good = [timeline for timeline in timelines if timeline.status == "ok"]
    measured = [timeline for timeline in good if timeline.phase == "measured"]
    start, end = window(timelines)
    span = end - start

    def rate(count: Callable[[Timeline], float]) -> float | None:
        return sum(count(timeline) for timeline in good) / span if span > 0 else None

    def ended_inside(timeline: Timeline) -> bool:
        return start <= timeline.ended <= end

    def prompt_tokens_inside(timeline: Timeline) -> float:
        prefilled = timeline.chunks[0][0] if timeline.chunks else timeline.ended
        tokens = timeline.usage_prompt_tokens
        return (timeline.prompt_tokens if tokens is None else tokens) if start <= prefilled <= end else 0.0

    chunks = sum(len(timeline.chunks) for timeline in measured)
    tokens = sum(timeline.output_tokens or 0 for timeline in measured)
    unknown = sum(timeline.output_tokens is None for timeline in measured)
    by_usage = all(timeline.usage_output_tokens is not None for timeline in measured)
    return {
        "requests": {
            "sent": len(timelines),
            "measured": sum(timeline.phase == "measured" for timeline in timelines),
            "warmup": sum(timeline.phase == "warmup" for timeline in timelines),
            "cooldown": sum(timeline.phase == "cooldown" for timeline in timelines),
            **{status: sum(t.status == status for t in timelines) for status in ("ok", "failed", "incomplete")},
        },
        "errors": sorted({timeline.error for timeline in timelines if timeline.error}),
        "window_s": span if span > 0 else None,
        "requests_per_s": rate(lambda timeline: float(ended_inside(timeline))),
        "prompt_tps": rate(prompt_tokens_inside),
        "output_tps": rate(lambda timeline: output_tokens_between(timeline, start, end)) if not unknown else None,
        "output_tokens_from": "usage" if by_usage else "limit" if not unknown else "unknown",
        "tokens_per_chunk": tokens / chunks if chunks else None,
        "ttft_s": distribution(map(ttft, measured)),
        "tpot_s": distribution(map(tpot, measured)),
        "itl_s": distribution(gap for timeline in measured for gap in itl(timeline)),
        "e2e_s": distribution(map(e2e, measured)),
        "slo": slo.limits or None,
        "goodput_rps": rate(lambda t: float(ended_inside(t) and slo.met(t))) if slo.limits else None,
        "sent_late_s": max((t.started - t.scheduled for t in timelines if not math.isnan(t.started)), default=None),
    }


def common_prefix_share(first: str, second: str) -> float:
    """Length of the longest common prefix over the longer of the two texts; 1.0 for two empty ones."""
    longest = max(len(first), len(second))
    if longest == 0:
        return 1.0
    unequal = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(unequal, min(len(first), len(second))) / longest
