"""Figures of timelines whose figures were worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmarks.load.metrics import (
    Slo,
    Timeline,
    common_prefix_share,
    distribution,
    e2e,
    itl,
    output_tokens_between,
    summarize,
    tpot,
    ttft,
    window,
)
from benchmarks.options import BenchmarkError

NO_SLO = Slo({})


def timeline(**changes: Any) -> Timeline:
    """Due at 1 s, sent at 1.5 s; four tokens one by one at 2, 3, 4 and 6 s; ended at 6.5 s."""
    fields: dict[str, Any] = {
        "session": 0, "turn": 0, "phase": "measured", "prompt": "p", "prompt_tokens": 10, "max_tokens": 4,
        "must_reach_max": True, "scheduled": 1.0, "started": 1.5, "chunks": [(2.0, 1), (3.0, 2), (4.0, 3), (6.0, 4)],
        "ended": 6.5, "finish_reason": "length", "usage_prompt_tokens": 11, "usage_output_tokens": 4,
    }  # fmt: skip
    return Timeline(**(fields | changes))


def test_latencies_of_one_token_per_chunk() -> None:
    plain = timeline()
    assert ttft(plain) == 1.0  # from when it was due, not from when it was sent
    assert tpot(plain) == (6.0 - 2.0) / 3
    assert itl(plain) == [1.0, 1.0, 2.0]
    assert e2e(plain) == 5.5


def test_tpot_of_coalesced_chunks_leaves_out_the_first_chunk_s_tokens() -> None:
    coalesced = timeline(chunks=[(2.0, 3), (6.0, 8)], max_tokens=8, usage_output_tokens=8)
    assert tpot(coalesced) == 4.0 / 5
    assert itl(coalesced) == [4.0]


def test_one_token_outputs_have_a_ttft_but_no_tpot() -> None:
    single = timeline(chunks=[(2.0, 1)], max_tokens=1, usage_output_tokens=1)
    assert (ttft(single), tpot(single), itl(single)) == (1.0, None, [])


def test_tpot_is_none_when_the_count_does_not_exceed_the_first_chunk() -> None:
    assert tpot(timeline(chunks=[(2.0, None), (3.0, None)], max_tokens=1, usage_output_tokens=1)) is None


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"error": "HTTP 500"}, "failed"),
        ({"finish_reason": None}, "incomplete"),
        ({"finish_reason": "abort"}, "incomplete"),
        ({"usage_output_tokens": 3}, "incomplete"),
        ({"usage_output_tokens": 3, "finish_reason": "stop", "must_reach_max": False}, "ok"),
    ],
)
def test_status(changes: dict[str, Any], status: str) -> None:
    assert timeline(**changes).status == status


def test_output_tokens_come_from_usage_and_never_from_chunks() -> None:
    assert timeline(usage_output_tokens=9).output_tokens == 9
    assert timeline(usage_output_tokens=None).output_tokens == 4  # the limit is why it ended
    assert timeline(usage_output_tokens=None, finish_reason="stop").output_tokens is None


def test_tokens_in_a_window_follow_the_chunks_counts() -> None:
    coalesced = timeline(chunks=[(2.0, 3), (6.0, 8)], usage_output_tokens=8)
    assert output_tokens_between(coalesced, 0, 5) == 3
    assert output_tokens_between(coalesced, 5, 9) == 5


def test_tokens_in_a_window_are_spread_over_chunks_without_counts() -> None:
    uncounted = timeline(chunks=[(2.0, None), (6.0, None)], usage_output_tokens=8)
    assert output_tokens_between(uncounted, 0, 5) == 4


def test_rates_of_a_whole_run() -> None:
    summary = summarize([timeline(), timeline(session=1)], NO_SLO)
    assert summary["window_s"] == 5.5
    assert summary["requests_per_s"] == pytest.approx(2 / 5.5)
    assert summary["output_tps"] == pytest.approx(8 / 5.5)
    assert summary["prompt_tps"] == pytest.approx(22 / 5.5)  # 11 each by usage, though 10 were planned
    assert summary["output_tokens_from"] == "usage"
    assert summary["tokens_per_chunk"] == 1
    assert summary["sent_late_s"] == 0.5


def test_warm_up_and_cool_down_are_left_out() -> None:
    warm = timeline(phase="warmup", scheduled=0.0, started=0.0, chunks=[(0.5, 3), (1.5, 4)], ended=1.5)
    cool = timeline(phase="cooldown", scheduled=5.0, started=5.0, chunks=[(5.5, 4)], ended=7.0)
    summary = summarize([warm, timeline(), cool], NO_SLO)
    assert window([warm, timeline(), cool]) == (1.0, 5.0)
    # One token of the warm-up request and three of the measured one arrived inside [1, 5].
    assert summary["output_tps"] == 4 / 4.0
    assert summary["ttft_s"]["mean"] == 1.0
    assert summary["requests"] == {
        "sent": 3, "measured": 1, "warmup": 1, "cooldown": 1, "ok": 3, "failed": 0, "incomplete": 0,
    }  # fmt: skip


def test_failed_and_incomplete_requests_are_counted_apart_and_add_nothing() -> None:
    failed = timeline(session=1, error="HTTP 500: no", chunks=[], usage_output_tokens=None)
    cut = timeline(session=2, finish_reason=None, chunks=[(2.0, 1)], usage_output_tokens=1)
    summary = summarize([timeline(), failed, cut], NO_SLO)
    assert summary["requests"]["failed"] == 1
    assert summary["requests"]["incomplete"] == 1
    assert summary["output_tps"] == pytest.approx(4 / 5.5)
    assert summary["errors"] == ["HTTP 500: no"]


def test_no_output_rate_without_any_count() -> None:
    unknown = timeline(usage_output_tokens=None, finish_reason="stop", must_reach_max=False)
    summary = summarize([unknown], NO_SLO)
    assert summary["output_tps"] is None
    assert summary["output_tokens_from"] == "unknown"


def test_percentiles_interpolate() -> None:
    runs = [timeline(session=i, scheduled=2.0 - 0.1 * i, started=2.0) for i in range(11)]  # TTFT 0, 0.1 ... 1
    values = summarize(runs, NO_SLO)["ttft_s"]
    assert values.pop("p50_interval") == pytest.approx([0.1, 0.8]), "the second and the ninth"
    low, high = values.pop("p90_interval")
    assert (low, high) == (pytest.approx(0.6), None), "what lies above the ninth tenth may be more than any of these"
    assert values == pytest.approx({"mean": 0.5, "max": 1, "p50": 0.5, "p90": 0.9})


def test_a_percentile_that_no_value_lies_beyond_is_not_told() -> None:
    few, many = (distribution([index / 100 for index in range(count)]) for count in (99, 1000))
    assert few is not None
    assert many is not None
    assert "p99" not in few
    assert many["p99"] == pytest.approx(9.8901)
    low, high = many["p99_interval"]
    assert 9.80 < low < many["p99"] < high < 9.98


def test_the_interval_of_a_percentile_holds_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    samples = [distribution(random.exponential(size=200)) for _ in range(1000)]
    hits = [sample["p90_interval"] for sample in samples if sample is not None]
    share = sum(low < math.log(10) < high for low, high in hits) / len(hits)
    assert 0.93 < share < 0.98


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    slow_start = timeline(session=1, scheduled=0.5)
    summary = summarize([timeline(), slow_start], Slo.parse("ttft:1,tpot:1.5"))
    assert summary["goodput_rps"] == pytest.approx(1 / 6.0)
    assert summarize([timeline()], NO_SLO)["goodput_rps"] is None


@pytest.mark.parametrize("text", ["ttft", "ttft:-1", "speed:3", "ttft:fast"])
def test_bad_objectives_are_one_line(text: str) -> None:
    with pytest.raises(BenchmarkError, match="METRIC:SECONDS"):
        Slo.parse(text)


def test_times_that_run_backwards_are_refused() -> None:
    with pytest.raises(ValueError, match="times run backwards"):
        summarize([timeline(chunks=[(3.0, 1), (2.0, 2)])], NO_SLO)
    with pytest.raises(ValueError, match="times run backwards"):
        summarize([timeline(started=0.5)], NO_SLO)


def test_a_run_stopped_before_any_request_ended_has_no_rates() -> None:
    pending = timeline(chunks=[], ended=math.nan, finish_reason=None, usage_output_tokens=None)
    summary = summarize([pending], NO_SLO)
    assert summary["window_s"] is None
    assert summary["requests_per_s"] is None
    assert summary["requests"]["incomplete"] == 1


@pytest.mark.parametrize(
    ("first", "second", "share"), [("abcd", "abxd", 0.5), ("ab", "abcd", 0.5), ("", "", 1.0), ("a", "", 0.0)]
)
def test_common_prefix_share(first: str, second: str, share: float) -> None:
    assert common_prefix_share(first, second) == share
