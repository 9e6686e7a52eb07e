from __future__ import annotations

import pytest

from benchmarks.load.generate import LoadOptions
from benchmarks.load.sweep import SweepOptions, is_saturated, knee, load_at


@pytest.mark.parametrize(
    ("throughput", "saturated"),
    [
        ([], False),
        ([10, 19, 35], False),
        ([10, 19, 19.2], False),  # one flat level may be noise
        ([10, 19, 19.2, 30], False),
        ([10, 19, 19.2, 19.5], True),
        ([10, 19, 15, 12], True),  # overload
    ],
)
def test_two_flat_levels_are_saturation(throughput: list[float], saturated: bool) -> None:
    assert is_saturated(throughput, 0.05) is saturated


def test_knee_is_where_throughput_over_latency_is_most() -> None:
    assert knee([10, 19, 30, 31], [1.0, 1.1, 1.6, 3.2]) == 2  # 10, 17.3, 18.75, 9.7


def test_the_load_fits_the_level() -> None:
    options = LoadOptions(requests=8)
    users = load_at(4, SweepOptions(), options)
    assert (users.arrivals, users.requests, users.warmup, users.cooldown) == ("closed:4", 12, 4, 4)
    rate = load_at(2.5, SweepOptions(over="rate"), options)
    assert (rate.arrivals, rate.requests, rate.warmup, rate.cooldown) == ("poisson:2.5", 8, 1, 1)
