"""What a program and all that it started hold while they run, memory and file descriptors, and whether that grows."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import psutil

MIB = 1 << 20
BLOCKS = 12
WARM_UP = 1 / 3  # of the time, which is left out: imports on first use, pools and caches that fill


class Point(NamedTuple):
    minutes: float
    mib: float
    num_files: int


class Watch:
    """The tree of the process `pid`, whenever `look` is called."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._started_at = time.monotonic()
        self._names: dict[int, str] = {}
        self._points: dict[str, list[Point]] = defaultdict(list)

    def look(self) -> None:
        minutes = (time.monotonic() - self._started_at) / 60
        for process in (self._root, *self._root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                name = self._names.setdefault(process.pid, f"{name_of(process)} {process.pid}")
                self._points[name].append(Point(minutes, process.memory_info().rss / MIB, process.num_fds()))

    @property
    def settled(self) -> dict[str, list[Point]]:
        """Of each process that lived long enough, what was seen after it warmed up."""
        end = max((points[-1].minutes for points in self._points.values()), default=0.0)
        late = {
            name: [point for point in points if point.minutes >= WARM_UP * end] for name, points in self._points.items()
        }
        return {name: points for name, points in late.items() if len(points) >= 3}

    def report(self) -> list[str]:
        """A line for each process: memory, its slope with the standard error, descriptors."""
        lines = []
        for name, points in self.settled.items():
            per_hour, error = slope(points)
            files = [point.num_files for point in points]
            lines.append(
                f"{name}: {points[0].mib:.1f} to {points[-1].mib:.1f} MiB, {per_hour:+.2f} +- {error:.2f} MiB/h, "
                f"{files[0]} to {files[-1]} files (at most {max(files)})"
            )
        return lines

    def plot(self, path: Path) -> None:
        """Memory and descriptors over time; each process' memory relative to where it settled."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (memory, files) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
        for name, settled in self.settled.items():
            points, (per_hour, error) = self._points[name], slope(settled)
            minutes = [point.minutes for point in points]
            base = statistics.median(point.mib for point in settled)
            label = f"{name.rpartition(' ')[0]}: {base:.0f} MiB, {per_hour:+.1f} ± {error:.1f} MiB/h"
            memory.plot(minutes, [point.mib - base for point in points], label=label, linewidth=1)
            files.plot(minutes, [point.num_files for point in points], label=name.rpartition(" ")[0], linewidth=1)
        for axes in (memory, files):
            axes.axvspan(0, WARM_UP * axes.dataLim.x1, color="0.93")
            axes.grid(color="0.9")
            axes.legend(fontsize="small")
        memory.set(ylabel="resident memory less its median, MiB", title="Grey: warming up, left out of the fit")
        files.set(xlabel="minutes", ylabel="file descriptors", ylim=(0, None))
        figure.savefig(path, dpi=100)


def name_of(process: psutil.Process) -> str:
    """The module that a Python program runs, or the name that it gave itself."""
    words = process.cmdline()
    if "-m" in words:
        return words[words.index("-m") + 1]
    return Path(words[0]).name.strip() if words else process.name()


def slope(points: list[Point]) -> tuple[float, float]:
    """Least squares of memory over time, MiB an hour, and its standard error.

    What is above the line at one look is so at the next: the means of `BLOCKS` parts are fitted, far from each other.
    """
    size = -(-len(points) // BLOCKS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    hours = [statistics.mean(point.minutes for point in part) / 60 for part in parts]
    sizes = [statistics.mean(point.mib for point in part) for part in parts]
    fitted = statistics.linear_regression(hours, sizes)
    residuals = sum((y - fitted.slope * x - fitted.intercept) ** 2 for x, y in zip(hours, sizes, strict=True))
    mean = statistics.mean(hours)
    spread = sum((x - mean) ** 2 for x in hours)
    return fitted.slope, float((residuals / (len(parts) - 2) / spread) ** 0.5)
