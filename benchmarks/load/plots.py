"""Plots of results, each written as PNG and SVG. Times in seconds unless an axis says otherwise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from benchmarks.load.metrics import Timeline, tpot, ttft

LEAST_DIVERGENCE = 5e-4  # nats; less is a float's rounding
PHASE_COLOURS = {"warmup": "0.75", "measured": "tab:blue", "cooldown": "0.75"}
FAILED_COLOUR = "tab:red"


def _save(figure: Figure, path: Path) -> None:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
    plt.close(figure)


def latency_distributions(timelines: Sequence[Timeline], path: Path) -> None:
    """Cumulative distributions of TTFT and TPOT over the measured requests that went well."""
    good = [t for t in timelines if t.status == "ok" and t.phase == "measured"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, name, metric in zip(axes, ("TTFT", "TPOT"), (ttft, tpot), strict=True):
        values = [value * 1000 for t in good if (value := metric(t)) is not None]
        if values:
            axis.ecdf(values)
        axis.set(xlabel=f"{name} (ms)", ylabel="share of requests", ylim=(0, 1.02))
        axis.set_title(f"{name} of {len(values)} requests")
        axis.grid(alpha=0.3)
    _save(figure, path)


def request_timeline(timelines: Sequence[Timeline], path: Path) -> None:
    """One line per request: waiting for the first token (thin), streaming (thick), red where it went wrong."""
    figure, axis = plt.subplots(figsize=(9, max(2.5, min(9.0, 0.12 * len(timelines) + 1))), layout="constrained")
    for row, t in enumerate(sorted(timelines, key=lambda t: t.scheduled)):
        if math.isnan(t.ended):
            continue
        colour = PHASE_COLOURS[t.phase] if t.status == "ok" else FAILED_COLOUR
        first = t.chunks[0][0] if t.chunks else t.ended
        axis.hlines(row, t.scheduled, first, color=colour, linewidth=1)
        axis.hlines(row, first, t.ended, color=colour, linewidth=3)
    axis.set(
        xlabel="seconds", ylabel="request", title="requests: waiting (thin), streaming (thick), not measured (grey)"
    )
    axis.invert_yaxis()
    _save(figure, path)


def throughput_against_load(
    loads: Sequence[float], throughput: Sequence[float], latency: Sequence[float], knee: int, load_name: str, path: Path
) -> None:
    """Output tokens/s against load, and against end-to-end latency, with the knee marked."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(loads, throughput, "o-")
    left.set(xlabel=load_name, ylabel="output tokens/s", xscale="log", title="throughput against load")
    left.set_xticks(loads, [f"{load:g}" for load in loads])
    left.minorticks_off()
    right.plot(latency, throughput, "o-")
    for load, x, y in zip(loads, latency, throughput, strict=True):
        right.annotate(f"{load:g}", (x, y), textcoords="offset points", xytext=(4, -12))
    right.set(xlabel="mean end-to-end latency (s)", ylabel="output tokens/s", title="throughput against latency")
    for axis, x in ((left, loads[knee]), (right, latency[knee])):
        axis.plot(x, throughput[knee], "o", markersize=13, fillstyle="none", color="tab:red", label="knee")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    _save(figure, path)


def throughput_by_streams(
    streams: Sequence[int], figures: Mapping[str, Sequence[float | None]], title: str, path: Path
) -> None:
    """Output tokens/s of each system (a line) at each number of concurrent streams."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    # There are ten colours: the eleventh line is dashed.
    styles = itertools.product(("-", "--", ":"), range(10))
    for (line, colour), marker, (system, values) in zip(
        styles, itertools.cycle("osv^Dx*"), figures.items(), strict=False
    ):
        known = [math.nan if value is None else value for value in values]
        axis.plot(streams, known, f"{marker}{line}C{colour}", label=system)
    axis.set(xscale="log", yscale="log", xlabel="concurrent streams", ylabel="output tokens/s", title=title)
    axis.set_xticks(streams, list(map(str, streams)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def throughput_against_divergence(
    panels: Mapping[str, Mapping[str, tuple[float, float]]], title: str, path: Path
) -> None:
    """Under each workload, each system's divergence from float32 (nats) and output tokens/s: better is up and left.

    The axis is logarithmic, and float32 itself has 0: what is below `LEAST_DIVERGENCE` stands there.
    """
    width = 5.5 * len(panels) + 2.5
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.5), squeeze=False, layout="constrained")
    systems = list(dict.fromkeys(system for points in panels.values() for system in points))
    styles = dict(zip(systems, zip(itertools.cycle("osv^Dx*"), itertools.cycle(range(10)), strict=False), strict=False))
    for axis, (workload, points) in zip(axes[0], panels.items(), strict=True):
        for system, (divergence, tokens_per_s) in points.items():
            marker, colour = styles[system]
            axis.plot(max(divergence, LEAST_DIVERGENCE), tokens_per_s, f"{marker}C{colour}", markersize=9, label=system)
        xlabel = "divergence from float32, nats a token"
        if any(divergence < LEAST_DIVERGENCE for divergence, _ in points.values()):
            xlabel += f" ({LEAST_DIVERGENCE:g}: that or less)"
        axis.set(xscale="log", xlabel=xlabel, ylabel="output tokens/s", title=workload)
        axis.margins(x=0.1)
        axis.set_ylim(0, 1.08 * max(tokens_per_s for _, tokens_per_s in points.values()))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        low, high = axis.get_xlim()
        if high < 10 * low:  # else powers of ten are enough
            axis.xaxis.set_minor_formatter(lambda value, _: f"{value:.1g}")
        else:
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ratios(
    entries: Sequence[tuple[str, float, float, float]], noise: float, baseline: str, metric: str, path: Path
) -> None:
    """Ratios to the baseline with their 95 % intervals (label, ratio, low, high) over the noise floor's band."""
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(entries) + 1.6), layout="constrained")
    for row, (_, ratio, low, high) in enumerate(entries):
        is_clear = not 1 / (1 + noise) <= ratio <= 1 + noise and not low <= 1 <= high
        colour = "tab:blue" if is_clear else "0.5"
        axis.errorbar(ratio, row, xerr=[[ratio - low], [high - ratio]], fmt="o", capsize=3, color=colour)
    axis.axvspan(1 / (1 + noise), 1 + noise, color="0.9", label=f"noise floor ±{noise:.1%}")
    axis.axvline(1, color="0.4", linewidth=1)
    axis.set_yticks(range(len(entries)), [entry[0] for entry in entries])
    axis.set(xscale="log", xlabel=f"{metric} relative to {baseline}, 95 % interval")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axis.tick_params(axis="x", which="both", labelsize=8)
    axis.invert_yaxis()
    axis.legend(loc="best")
    _save(figure, path)


def throughput_bars(
    figures: Mapping[str, Mapping[str, float | None]], bounds: Mapping[str, Mapping[str, float]], path: Path
) -> None:
    """Output tokens/s by system (rows of `figures`) and workload, with the roofline of each as a tick."""
    workloads = list(next(iter(figures.values())))
    figure, axes = plt.subplots(
        1, len(workloads), figsize=(3.4 * len(workloads) + 1.5, 0.35 * len(figures) + 1.5), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, workload in zip(axes[0], workloads, strict=True):
        for row, (system, values) in enumerate(figures.items()):
            axis.barh(row, values[workload] or 0.0, color="tab:blue")
            if bound := bounds.get(system, {}).get(workload):
                axis.plot(bound, row, "|", color="black", markersize=12)
        axis.set(title=workload, xlabel="output tokens/s")
        axis.grid(alpha=0.3, axis="x")
    axes[0][0].set_yticks(range(len(figures)), list(figures))
    axes[0][0].invert_yaxis()
    figure.suptitle("output tokens/s (bar) and the roofline (tick)", fontsize=10)
    _save(figure, path)


def gain_by_acceptance(curves: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Speed with drafts to without against the share of accepted ones: a curve for each length of drafts."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
    axis.axhline(1, color="0.6", linewidth=1)
    axis.set(xlabel="share of draft tokens that were accepted", ylabel="tokens per second, to those without drafts")
    axis.set(xlim=(0, 1.02), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(title="draft length", fontsize="small")
    _save(figure, path)
