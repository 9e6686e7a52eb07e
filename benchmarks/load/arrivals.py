"""When requests are sent: by a fixed number of users who wait for their answers, or at times fixed beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.options import BenchmarkError

USAGE = (
    "closed:USERS, poisson:RATE, gamma:RATE:CV, burst:SIZE:PERIOD, ramp:FROM_RATE:TO_RATE or trace[:SPEED] "
    "(rates per second, periods in seconds)"
)


@dataclass(frozen=True)
class ClosedLoop:
    """`concurrency` users, each of whom starts a session when the one before has ended."""

    concurrency: int


@dataclass(frozen=True)
class OpenLoop:
    """Sessions that begin at `offsets` (float64 [sessions], seconds, ascending) whatever the server does."""

    offsets: npt.NDArray[np.float64]


Arrivals = ClosedLoop | OpenLoop


def plan_arrivals(spec: str, count: int, rng: np.random.Generator, timestamps: Sequence[float | None] = ()) -> Arrivals:
    """Turn a specification (see USAGE) into the arrivals of `count` sessions.

    `poisson` has exponential gaps of mean 1/RATE. `gamma` has gamma-distributed gaps of the same mean and coefficient
    of variation CV (1 is Poisson, above 1 is burstier). `burst` sends SIZE at once every PERIOD. `ramp` is a Poisson
    process whose rate goes linearly from FROM_RATE to TO_RATE over the run; its times are those of a unit-rate process
    put through the inverse of the expected count (Cinlar's inversion method). `trace` takes the workload file's
    timestamps, divided by SPEED. Raises BenchmarkError for a specification that is none of these.
    """
    kind, *rest = spec.split(":")
    try:
        numbers = [float(part) for part in rest]
    except ValueError:
        numbers = [-1.0]
    if any(number < 0 for number in numbers):
        raise BenchmarkError(f"arrivals {spec!r}: expected {USAGE}")
    match kind, numbers:
        case "closed", [users] if users >= 1 and users == int(users):
            return ClosedLoop(int(users))
        case "poisson", [rate] if rate > 0:
            return OpenLoop(np.cumsum(rng.standard_exponential(count) / rate))
        case "gamma", [rate, variation] if rate > 0 and variation > 0:
            shape = variation**-2
            return OpenLoop(np.cumsum(rng.gamma(shape, 1 / (rate * shape), size=count)))
        case "burst", [size, period] if size >= 1:
            return OpenLoop(np.arange(count) // int(size) * np.float64(period))
        case "ramp", [first, last] if first > 0 and last > 0:
            return OpenLoop(_ramp(first, last, np.cumsum(rng.standard_exponential(count)), count))
        case "trace", [] | [_] if not numbers or numbers[0] > 0:
            if len(timestamps) < count or any(time is None for time in timestamps[:count]):
                raise BenchmarkError("arrivals 'trace' needs a workload file with a timestamp in every entry")
            recorded = np.array(timestamps[:count], dtype=np.float64)
            return OpenLoop((recorded - recorded[0]) / (numbers[0] if numbers else 1.0))
    raise BenchmarkError(f"arrivals {spec!r}: expected {USAGE}")


def _ramp(first: float, last: float, unit_times: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Times at which a process of rate `first` -> `last` has reached the expected counts `unit_times`."""
    duration = 2 * count / (first + last)
    slope = (last - first) / duration
    if slope == 0:
        return unit_times / first
    # The expected count by time t is first*t + slope*t^2/2; past the end of the ramp the rate stays at `last`.
    inside = np.minimum(unit_times, count)
    times = (np.sqrt(first**2 + 2 * slope * inside) - first) / slope
    return np.asarray(times + (unit_times - inside) / last)
