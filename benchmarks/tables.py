"""Write the tables of README.md and docs/ from what was measured: `python -m benchmarks.tables`.

`docs/results/` keeps what `--out` of `benchmarks.compare` and `benchmarks.accuracy` wrote, one JSON file each. Where a
page has `<!-- results NAME -->` and, below it, `<!-- end -->`, what stands between is made of NAME.json: a table, and a
line that says on which CPU, when and on which commit; `<!-- results NAME speeds -->` leaves ratios, shares of the bound
and memory out. A test holds the pages to it. A comparison whose spec says where its systems' accuracy is in
`accuracy.json` has it in its table, and as a plot, docs/images/NAME-accuracy.png.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare.systems import ROOT
from benchmarks.load import plots
from benchmarks.load.output import markdown_table, number

RESULTS = ROOT / "docs" / "results"
# The model that the systems' accuracy is of. It has the real weights, moved off the 4-bit grid of their own file.
ACCURACY_MODEL = "smollm2-dithered"
WHAT = {"vllm": "ours on vLLM", "openvino": "OpenVINO", "llama-cpp": "llama.cpp"}
BLOCK = re.compile(r"(<!-- results (?P<name>[\w.-]+)(?P<speeds> speeds)? -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text: str) -> str:
    """A page with the tables that its results give."""

    def block(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match['name']}.json").read_text())
        table = compared(result, bool(match["speeds"])) if result["kind"] == "compare" else accuracies(result)
        return f"{match[1]}{table}\n{where(result)}\n{match[4]}"

    return BLOCK.sub(block, text)


def compared(result: Mapping[str, Any], only_speeds: bool = False) -> str:
    """A row a system: its figure under each workload, its ratio and its share of the bound; memory and accuracy."""
    has_bounds = result["peaks"] is not None and not only_speeds
    workloads, accuracy = result["workloads"], accuracy_of(result)
    # An open loop's throughput is what arrives; where it has objectives, the requests that met them count.
    has_objectives = {name: bool(load["slo"]) for name, load in result["spec"]["workloads"].items()}
    header = ["output tokens/s"]
    for name in workloads:
        title = f"{name}, requests/s in time" if has_objectives[name] else title_of(name)
        header += [title, *([] if only_speeds else ["ratio"]), *(["of roofline"] if has_bounds else [])]
    header += [*([] if only_speeds else ["PSS GiB"]), *(["perplexity ÷ float32's", "KL, nats"] if accuracy else [])]
    rows = []
    for system in result["spec"]["systems"]:
        if not any(system in workload["systems"] for workload in workloads.values()):
            continue
        cells, pss = [f"`{system}`"], None
        for name, workload in workloads.items():
            figures = workload["systems"].get(system)
            metric = {"median": None, "ratio_to_baseline": None}
            if figures:
                metric = figures["metrics"]["goodput_rps" if has_objectives[name] else "output_tps"]
            ratio, share = metric["ratio_to_baseline"], figures and figures["share_of_bound"]
            cells.append(number(metric["median"]))
            if not only_speeds:
                cells.append(f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "")
            if has_bounds:
                cells.append(f"{share:.0%}" if share else "")
            pss = figures["pss_bytes"] if figures else pss
        if not only_speeds:
            cells.append(number(pss / 2**30) if pss else "")
        rows.append([*cells, *(accuracy_cells(accuracy.get(system)) if accuracy else [])])
    return markdown_table(header, rows)


def title_of(workload: str) -> str:
    """`c16`, a closed loop of 16 streams, in words; any other name as it is."""
    match = re.fullmatch(r"c(\d+)", workload)
    return workload if match is None else f"{match[1]} stream{'' if match[1] == '1' else 's'}"


def accuracy_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The line of accuracy.json of each system whose spec names one."""
    wanted = {name: system.get("accuracy") for name, system in result["spec"]["systems"].items()}
    if not any(wanted.values()):
        return {}
    rows = json.loads((RESULTS / "accuracy.json").read_text())["rows"]
    found = {f"{row['format']}/{row['what']}": row for row in rows if row["model"] == ACCURACY_MODEL}
    return {name: found[row] for name, row in wanted.items() if row}


def accuracy_cells(row: Mapping[str, Any] | None) -> list[str]:
    return ["", ""] if row is None else [f"{row['perplexity_ratio']:.3f}", f"{row['kl']:.3f}"]


def plot_accuracy(name: str, result: Mapping[str, Any]) -> None:
    """Speed against divergence with few streams and with many."""
    accuracy, workloads = accuracy_of(result), list(result["workloads"])
    panels = {
        title_of(workload): {
            system: (row["kl"], figures["metrics"]["output_tps"]["median"])
            for system, row in accuracy.items()
            if (figures := result["workloads"][workload]["systems"].get(system))
        }
        for workload in (workloads[0], workloads[-1])
    }
    plots.throughput_against_divergence(panels, result["title"], ROOT / "docs" / "images" / f"{name}-accuracy.png")


def accuracies(result: Mapping[str, Any]) -> str:
    header = ["format", "model", "perplexity ÷ float32's", "divergence, nats", "same top token"]
    rows = [
        [
            f"`{row['format']}`, {WHAT.get(row['what'], row['what'])}",
            row["model"],
            *accuracy_cells(row),
            f"{row['same_top_token']:.1%}",
        ]
        for row in result["rows"]
    ]
    return markdown_table(header, rows)


def where(result: Mapping[str, Any]) -> str:
    """On what, when and of which commit; of a comparison also how often, and how far two of the same differ."""
    machine = result["machine"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    told = f"{cores} of {machine['cpu']} ({', '.join(machine['isa'])}), {machine['date'][:10]}, "
    told += f"commit {machine['commit']}."
    if result["kind"] != "compare":
        return told
    floors = [next(iter(workload["noise_floor"].values())) for workload in result["workloads"].values()]
    noise = ", ".join("unknown" if floor is None else f"{floor:.0%}" for floor in floors)
    model = f" Accuracy: {ACCURACY_MODEL}." if accuracy_of(result) else ""
    ratios = f"Ratios to `{result['spec']['baseline']}`, 95 % intervals; noise floor {noise}."
    return f"{result['title']}. {ratios}{model} {told}"


def main() -> int:
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        if result["kind"] == "compare" and accuracy_of(result):
            plot_accuracy(file.stem, result)
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    main()
