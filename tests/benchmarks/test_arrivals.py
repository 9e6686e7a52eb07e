from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load.arrivals import ClosedLoop, OpenLoop, plan_arrivals
from benchmarks.options import BenchmarkError

COUNT = 20_000


def offsets(spec: str, count: int = COUNT, seed: int = 0) -> np.ndarray:
    plan = plan_arrivals(spec, count, np.random.default_rng(seed))
    assert isinstance(plan, OpenLoop)
    return plan.offsets


def test_closed_loop() -> None:
    assert plan_arrivals("closed:4", 10, np.random.default_rng(0)) == ClosedLoop(4)


@pytest.mark.parametrize(("spec", "variation"), [("poisson:4", 1.0), ("gamma:4:1", 1.0), ("gamma:4:2.5", 2.5)])
def test_gaps_have_the_rate_s_mean_and_the_wanted_variation(spec: str, variation: float) -> None:
    gaps = np.diff(offsets(spec))
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_burst() -> None:
    assert offsets("burst:3:2", 7).tolist() == [0, 0, 0, 2, 2, 2, 4]


def test_ramp_goes_from_one_rate_to_the_other() -> None:
    times = offsets("ramp:2:10")
    duration = 2 * COUNT / 12
    first_tenth = (times < duration / 10).sum() / (duration / 10)
    last_tenth = ((times > 0.9 * duration) & (times < duration)).sum() / (duration / 10)
    assert first_tenth == pytest.approx(2.4, rel=0.1)  # mean of the rates 2 and 2.8
    assert last_tenth == pytest.approx(9.6, rel=0.1)
    assert (np.diff(times) >= 0).all()


def test_ramp_between_equal_rates_is_poisson() -> None:
    assert np.diff(offsets("ramp:4:4")).mean() == pytest.approx(0.25, rel=0.05)


def test_trace_starts_at_zero_and_is_scaled() -> None:
    plan = plan_arrivals("trace:2", 3, np.random.default_rng(0), [100.0, 101.0, 104.0])
    assert isinstance(plan, OpenLoop)
    assert plan.offsets.tolist() == [0, 0.5, 2]


def test_the_same_seed_gives_the_same_times() -> None:
    assert offsets("poisson:3", 50, seed=5).tolist() == offsets("poisson:3", 50, seed=5).tolist()
    assert offsets("poisson:3", 50, seed=5).tolist() != offsets("poisson:3", 50, seed=6).tolist()


@pytest.mark.parametrize(
    "spec", ["closed", "closed:0", "closed:1.5", "poisson:0", "gamma:1", "burst:0:1", "ramp:1", "poisson:x", "tide:3"]
)
def test_bad_specifications_are_one_line(spec: str) -> None:
    with pytest.raises(BenchmarkError, match=f"^arrivals '{spec}': expected closed:USERS.*$"):
        plan_arrivals(spec, 3, np.random.default_rng(0))


def test_trace_needs_timestamps() -> None:
    with pytest.raises(BenchmarkError, match="timestamp"):
        plan_arrivals("trace", 2, np.random.default_rng(0), [1.0, None])
