"""What a comparison's measurements come to: values, ratios, verdicts, tables and files. Nothing here runs a system."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.compare.spec import METRICS, Spec
from benchmarks.compare.statistics import Ratio, noise_floor, paired_ratio, verdict
from benchmarks.load import plots
from benchmarks.load.measure import Run
from benchmarks.load.metrics import common_prefix_share
from benchmarks.load.output import markdown_table, number, write_json, write_requests

Stage = Literal["noise", "main"]
TWIN = "baseline again"
HEADER = (
    "system", "output tok/s", "of roofline", "ratio (95 % interval)", "verdict",
    "TTFT ms", "TPOT ms", "agree", "PSS GiB",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One run of one workload on one system in one round; the `noise` stage has the baseline and its TWIN."""

    stage: Stage
    round: int
    system: str
    workload: str
    run: Run

    def value(self, metric: str) -> float | None:
        """The metric's value; None when the run has none or any of its requests went wrong."""
        requests = self.run.summary["requests"]
        if requests["ok"] != requests["sent"]:
            return None
        value: Any = self.run.summary
        for key in metric.split("."):
            value = value and value[key]
        return None if value is None else float(value)


class Findings:
    """Figures of the measurements made so far; a comparison that was interrupted has fewer of them."""

    def __init__(self, spec: Spec, measurements: Sequence[Measurement]) -> None:
        self._spec = spec
        self._measurements = measurements

    def of(self, stage: Stage, system: str, workload: str) -> list[Measurement]:
        return [m for m in self._measurements if (m.stage, m.system, m.workload) == (stage, system, workload)]

    def rounds(self, workload: str) -> list[int]:
        """The rounds of the main stage in which anything was measured."""
        return sorted({m.round for m in self._measurements if (m.stage, m.workload) == ("main", workload)})

    def values(self, stage: Stage, system: str, workload: str, metric: str) -> dict[int, float]:
        """Value by round, of the rounds that went well."""
        found = {m.round: m.value(metric) for m in self.of(stage, system, workload)}
        return {round: value for round, value in found.items() if value is not None}

    def ratio(self, stage: Stage, system: str, workload: str, metric: str) -> Ratio | None:
        """Ratio to the baseline from the rounds that both have; None for fewer than two.

        A round in which one of them is 0, as goodput is where no request is in time, has no ratio.
        """
        mine = self.values(stage, system, workload, metric)
        baseline = self.values(stage, self._spec.baseline, workload, metric)
        rounds = [round for round in sorted(mine.keys() & baseline.keys()) if mine[round] > 0 and baseline[round] > 0]
        if len(rounds) < 2:
            return None
        return paired_ratio([mine[round] for round in rounds], [baseline[round] for round in rounds])

    def widest(self, names: Iterable[str]) -> float:
        """How far the end of a ratio's interval is from it, at most, of these systems' main metric (0.05: 5 %)."""
        metric = self._spec.metrics[0]
        others = [name for name in names if name != self._spec.baseline]
        ratios = [self.ratio("main", name, workload, metric) for name in others for workload in self._spec.workloads]
        return max((ratio.high / ratio.ratio - 1 for ratio in ratios if ratio is not None), default=0.0)

    def noise(self, workload: str) -> dict[str, float | None]:
        """Noise floor of each metric (0.03: three percent), None where too little was measured."""
        same = {metric: self.ratio("noise", TWIN, workload, metric) for metric in self._spec.metrics}
        return {metric: noise_floor(ratio) if ratio else None for metric, ratio in same.items()}

    def agreement(self, system: str, workload: str) -> float | None:
        """Mean share of the text that a system and the baseline begin with in common, over first turns."""
        expected = {
            (m.round, t.prompt): t.text for m in self.of("main", self._spec.baseline, workload) for t in m.run.timelines
        }
        shares = [
            common_prefix_share(t.text, expected[m.round, t.prompt])
            for m in self.of("main", system, workload)
            for t in m.run.timelines
            if (m.round, t.prompt) in expected
        ]
        return float(np.mean(shares)) if shares else None

    def system(self, name: str, workload: str, bound: float | None) -> dict[str, Any]:
        """Everything about one system under one workload; `bound` is its roofline in output tokens/s."""
        noise = self.noise(workload)
        metrics = {}
        for metric in self._spec.metrics:
            values = list(self.values("main", name, workload, metric).values())
            ratio = None if name == self._spec.baseline else self.ratio("main", name, workload, metric)
            floor = noise[metric]
            if name == self._spec.baseline:
                says = "baseline"
            elif ratio is None or floor is None:
                says = "not enough rounds"  # with a ratio
            else:
                says = verdict(ratio, floor, METRICS[metric])
            metrics[metric] = {
                "values": values,
                "median": float(np.median(values)) if values else None,
                "ratio_to_baseline": asdict(ratio) if ratio else None,
                "verdict": says,
            }
        runs = [m.run for m in self.of("main", name, workload)]
        servers = [run.resources["server"] for run in runs]
        throughput = list(self.values("main", name, workload, "output_tps").values())
        return {
            "format": self._spec.systems[name].format,
            "metrics": metrics,
            "bound_output_tps": bound,
            "share_of_bound": float(np.median(throughput)) / bound if bound and throughput else None,
            "greedy_agreement_with_baseline": self.agreement(name, workload),
            "requests_not_ok": sum(run.summary["requests"]["sent"] - run.summary["requests"]["ok"] for run in runs),
            "errors": sorted({error for run in runs for error in run.summary["errors"]}),
            "rss_peak_bytes": max((server["rss_peak_bytes"] for server in servers), default=None),
            "pss_bytes": max((server["pss_bytes"] for server in servers), default=None),
            "cpu_cores": float(np.mean([server["cpu_cores"] for server in servers])) if servers else None,
            "front_cpu_s_per_1000_tokens": _front_cpu_s(runs),
            "client_is_busy": any(run.resources["client_is_busy"] for run in runs),
        }

    def workload(self, workload: str, bounds: Mapping[str, float | None]) -> dict[str, Any]:
        """Noise floor and, for each system that was measured, its figures; `bounds` are the rooflines by system."""
        measured = [name for name in self._spec.systems if self.of("main", name, workload)]
        return {
            "noise_floor": self.noise(workload),
            "systems": {name: self.system(name, workload, bounds.get(name)) for name in measured},
        }


def table_rows(workload: Mapping[str, Any]) -> list[list[str]]:
    """Rows under HEADER for one workload of a result; ratio and verdict are those of the main metric."""
    rows = []
    for name, system in workload["systems"].items():
        metrics = system["metrics"]
        medians = {metric: values["median"] for metric, values in metrics.items()}
        main = next(iter(metrics.values()))
        ratio = main["ratio_to_baseline"]
        share, agree, pss = (system[key] for key in ("share_of_bound", "greedy_agreement_with_baseline", "pss_bytes"))
        problems = f", {system['requests_not_ok']} requests not ok" if system["requests_not_ok"] else ""
        rows.append(
            [
                name,
                number(medians.get("output_tps")),
                f"{share:.0%}" if share is not None else "-",
                f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "-",
                main["verdict"] + problems,
                *(_milliseconds(medians.get(metric)) for metric in ("ttft_s.p50", "tpot_s.p50")),
                f"{agree:.0%}" if agree is not None else "-",
                number(pss / 2**30) if pss else "-",
            ]
        )
    return rows


def _front_cpu_s(runs: Sequence[Run]) -> float | None:
    """CPU seconds that the process that clients talk to takes for a thousand tokens, its children's not counted."""
    tokens = sum(timeline.output_tokens or 0 for run in runs for timeline in run.timelines)
    seconds = sum(run.resources["server"]["front_cpu_s"] for run in runs)
    return seconds / tokens * 1000 if tokens else None


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1000)


def workload_title(name: str, workload: Mapping[str, Any]) -> str:
    noise = next(iter(workload["noise_floor"].values()))
    return f"{name} (noise floor {noise:.1%})" if noise is not None else f"{name} (noise floor not measured)"


def start_line(start_s: Mapping[str, Sequence[float]]) -> str:
    """One line with the seconds from start to ready, the median of each system's starts."""
    return "Seconds from start to ready: " + ", ".join(f"{name} {np.median(s):.0f}" for name, s in start_s.items())


def front_line(workload: Mapping[str, Any]) -> str:
    """One line with what each system's front end takes beside its engine."""
    per_system = {name: system["front_cpu_s_per_1000_tokens"] for name, system in workload["systems"].items()}
    return "CPU seconds of the answering process for 1000 tokens: " + ", ".join(
        f"{name} {number(seconds)}" for name, seconds in per_system.items()
    )


def write_measured(out: Path, measurements: Sequence[Measurement]) -> None:
    """Write a CSV of the requests of each system and workload."""
    for system, workload in sorted({(m.system, m.workload) for m in measurements if m.stage == "main"}):
        runs = [m.run for m in measurements if (m.stage, m.system, m.workload) == ("main", system, workload)]
        timelines = [timeline for run in runs for timeline in run.timelines]
        write_requests(out / f"requests-{system}-{workload}.csv", timelines)


def write_files(out: Path, result: Mapping[str, Any]) -> None:
    """Write JSON, Markdown and plots."""
    write_json(out / "result.json", dict(result))
    blocks = [f"# {result['title']}", f"{result['machine']['date']}, {result['machine']['cpu']}"]
    for name, workload in result["workloads"].items():
        blocks += [f"## {workload_title(name, workload)}", markdown_table(HEADER, table_rows(workload)).rstrip()]
        blocks.append(front_line(workload))
    if result["start_s"]:
        blocks.append(start_line(result["start_s"]))
    if missing := {**result["absent"], **result["failed"]}:
        blocks.append("\n".join(f"- {name}: {why}" for name, why in missing.items()))
    (out / "summary.md").write_text("\n\n".join(blocks) + "\n")
    _write_plots(out, result)


def _write_plots(out: Path, result: Mapping[str, Any]) -> None:
    throughput: dict[str, dict[str, float | None]] = {}
    bounds: dict[str, dict[str, float]] = {}
    for name, workload in result["workloads"].items():
        metric, noise = next(iter(workload["noise_floor"].items()))
        entries = []
        for system, figures in workload["systems"].items():
            throughput.setdefault(system, {})[name] = figures["metrics"].get("output_tps", {}).get("median")
            if figures["bound_output_tps"]:
                bounds.setdefault(system, {})[name] = figures["bound_output_tps"]
            if ratio := figures["metrics"][metric]["ratio_to_baseline"]:
                entries.append((system, ratio["ratio"], ratio["low"], ratio["high"]))
        if entries and noise is not None:
            plots.ratios(entries, noise, result["spec"]["baseline"], f"{metric}, {name}:", out / f"ratios-{name}")
    if throughput:
        plots.throughput_bars(throughput, bounds, out / "throughput")
    streams = {name: spec["arrivals"].partition("closed:")[2] for name, spec in result["spec"]["workloads"].items()}
    if len(streams) > 1 and all(number.isdecimal() for number in streams.values()):
        ordered = sorted(streams, key=lambda name: int(streams[name]))
        lines = {system: [values.get(name) for name in ordered] for system, values in throughput.items()}
        numbers = [int(streams[name]) for name in ordered]
        plots.throughput_by_streams(numbers, lines, result["title"], out / "throughput-by-streams")
