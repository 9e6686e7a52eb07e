"""Where figures go: the terminal's table, and a directory of JSON, CSV, Markdown and plots."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.load.metrics import Timeline, e2e, tpot, ttft

Rows = Sequence[Sequence[str]]
COLUMNS = (
    "session", "turn", "phase", "status", "scheduled_s", "started_s", "first_chunk_s", "last_chunk_s", "ended_s",
    "prompt_tokens", "max_tokens", "output_tokens", "chunks", "ttft_s", "tpot_s", "e2e_s", "finish_reason", "error",
)  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """A figure of so many significant digits, or a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def milliseconds(seconds: float | None) -> str:
    return "…" if seconds is None else number(seconds * 1000)


def between(interval: Sequence[float | None] | None) -> str:
    """An interval of 95 % as it stands behind its figure; nothing for none."""
    return f" ({' to '.join(map(milliseconds, interval))})" if interval else ""


def summary_rows(summary: dict[str, Any], resources: dict[str, Any], bound: float | None) -> list[list[str]]:
    """The figures of one run as rows of name and text."""
    requests = summary["requests"]
    rows = [
        ["requests", f"{requests['ok']} ok, {requests['failed']} failed, {requests['incomplete']} incomplete"],
        [
            "measured",
            f"{requests['measured']} ({requests['warmup']} warm-up, {requests['cooldown']} cool-down left out)",
        ],
        ["window", f"{number(summary['window_s'])} s"],
        ["requests/s", number(summary["requests_per_s"])],
        ["prompt tok/s", number(summary["prompt_tps"])],
        ["output tok/s", f"{number(summary['output_tps'])} (tokens counted by: {summary['output_tokens_from']})"],
        ["tokens per chunk", number(summary["tokens_per_chunk"])],
    ]
    if bound and summary["output_tps"] is not None:
        rows.append(["share of the roofline", f"{summary['output_tps'] / bound:.0%} of {number(bound)} output tok/s"])
    if summary["slo"]:
        limits = ", ".join(f"{name} <= {limit:g} s" for name, limit in summary["slo"].items())
        rows.append(["goodput", f"{number(summary['goodput_rps'])} requests/s with {limits}"])
    for name in ("ttft", "tpot", "itl", "e2e"):
        if values := summary[f"{name}_s"]:
            parts = (
                f"{key} {milliseconds(value)}{between(values.get(f'{key}_interval'))}"
                for key, value in values.items()
                if not key.endswith("_interval")
            )
            rows.append([f"{name.upper()} ms", ", ".join(parts)])
    if server := resources["server"]:
        memory = f"peak RSS {server['rss_peak_bytes'] / 2**30:.2f} GiB, PSS {server['pss_bytes'] / 2**30:.2f} GiB"
        rows.append(["server", f"{memory}, {number(server['cpu_cores'])} cores"])
    warning = ": it may limit these figures" if resources["client_is_busy"] else ""
    late = f"at most {number((summary['sent_late_s'] or 0) * 1000)} ms late"
    rows.append(["load generator", f"{number(resources['client_cpu_cores'], 2)} cores, {late}{warning}"])
    return rows


def print_table(title: str, header: Sequence[str], rows: Rows) -> None:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def markdown_table(header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_json_line(result: dict[str, Any]) -> None:
    """The last line of every benchmark's output."""
    print(json.dumps(_finite(result)))


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(_finite(result), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_requests(path: Path, timelines: Sequence[Timeline]) -> None:
    """One CSV line per request; what a request does not have is empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for t in timelines:
            first, last = (t.chunks[0][0], t.chunks[-1][0]) if t.chunks else (None, None)
            times = [t.scheduled, t.started, first, last, t.ended]
            tokens = [t.prompt_tokens if t.usage_prompt_tokens is None else t.usage_prompt_tokens, t.max_tokens]
            latencies = [ttft(t), tpot(t), e2e(t)]
            row = [t.session, t.turn, t.phase, t.status, *times, *tokens, t.output_tokens, len(t.chunks), *latencies]
            writer.writerow([_cell(value) for value in [*row, t.finish_reason, t.error]])


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6f}" if isinstance(value, float) else str(value)
