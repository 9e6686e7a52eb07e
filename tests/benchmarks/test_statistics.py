from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.compare.statistics import Ratio, noise_floor, paired_ratio, verdict


def test_ratio_and_interval_by_hand() -> None:
    """Ratios 2 and 8: logarithms ln 2 and 3 ln 2, mean 2 ln 2, standard error ln 2, t(1) = 12.706."""
    ratio = paired_ratio([2.0, 8.0], [1.0, 1.0])
    assert ratio.ratio == pytest.approx(4.0)
    assert ratio.low == pytest.approx(4 * 2**-12.706)
    assert ratio.high == pytest.approx(4 * 2**12.706)


def test_what_slows_a_round_down_cancels() -> None:
    slow_rounds = np.array([1.0, 0.3, 2.0, 0.7])
    ratio = paired_ratio((3 * slow_rounds).tolist(), slow_rounds.tolist())
    assert (ratio.ratio, ratio.low, ratio.high) == pytest.approx((3, 3, 3))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        first, second = np.exp(rng.normal(0.1, 0.05, 5)), np.exp(rng.normal(0.0, 0.05, 5))
        ratio = paired_ratio(first.tolist(), second.tolist())
        covered += ratio.low <= math.exp(0.1) <= ratio.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_pair_is_none() -> None:
    with pytest.raises(ValueError, match="two or more pairs"):
        paired_ratio([1.0], [1.0])
    with pytest.raises(ValueError, match="two or more pairs"):
        paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0])


def test_noise_floor_is_the_far_end_either_way() -> None:
    assert noise_floor(Ratio(1.0, 0.9, 1.05, 4)) == pytest.approx(-math.log(0.9))
    assert noise_floor(Ratio(1.0, 0.99, 1.2, 4)) == pytest.approx(math.log(1.2))


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (1.2, 1.3, "better"),
        (0.7, 0.8, "worse"),
        (0.95, 1.3, "inside the noise"),  # the interval holds 1
        (1.02, 1.3, "inside the noise"),  # it does not, but it reaches into the noise floor
    ],
)
def test_no_winner_inside_the_noise(low: float, high: float, says: str) -> None:
    ratio = Ratio(math.sqrt(low * high), low, high, 4)
    assert verdict(ratio, 0.05, higher_is_better=True) == says
    opposite = {"better": "worse", "worse": "better"}
    assert verdict(ratio, 0.05, higher_is_better=False) == opposite.get(says, says)
