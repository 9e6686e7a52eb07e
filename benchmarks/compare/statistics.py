"""What can be concluded from paired measurements on a noisy machine: pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.load.metrics import NORMAL_95

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (any statistics table); normal beyond.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """A ratio of two systems with its 95 % confidence interval, from `pairs` pairs."""

    ratio: float
    low: float
    high: float
    pairs: int


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """Ratio first/second of measurements made in pairs (one per round).

    The geometric mean of the pairs' ratios, with Student's t interval on their logarithms: what slows a whole round
    down is in both halves of its pair and cancels. Raises ValueError for fewer than two pairs or unequal counts.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"needs two or more pairs, got {len(first)} and {len(second)} measurements")
    logs = np.log(np.asarray(first) / np.asarray(second))
    degrees = len(logs) - 1
    quantile = T_95[degrees - 1] if degrees <= len(T_95) else NORMAL_95
    centre, half = float(logs.mean()), float(quantile * logs.std(ddof=1) / math.sqrt(len(logs)))
    return Ratio(math.exp(centre), math.exp(centre - half), math.exp(centre + half), len(logs))


def noise_floor(same: Ratio) -> float:
    """How far from 1 a system's ratio to itself could be (0.03: three percent), from an A/A measurement.

    The end of the A/A interval that is farther from 1, on the logarithmic scale, so that it reads both ways.
    """
    return max(abs(math.log(same.low)), abs(math.log(same.high)), abs(math.log(same.ratio)))


def verdict(ratio: Ratio, noise: float, higher_is_better: bool) -> str:
    """`better` or `worse`, or `inside the noise` unless the interval lies wholly beyond the noise floor."""
    low, high = math.log(ratio.low), math.log(ratio.high)
    if low > noise:
        return "better" if higher_is_better else "worse"
    if high < -noise:
        return "worse" if higher_is_better else "better"
    return "inside the noise"
