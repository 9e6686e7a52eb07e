"""Write the tables of README.md and docs/ from what was measured: `python -m benchmarks.tables`.

`docs/results/MACHINE/` keeps what `--out` of `benchmarks.compare` and `benchmarks.accuracy` wrote, one JSON file each.
Where a page has `<!-- results NAME -->` and, below it, `<!-- end -->`, what stands between is made of each machine's
NAME.json: a table, and a line that says on which CPU, when and on which commit. `<!-- results NAME speeds -->` is one
table of all machines, side by side, without ratios, shares of the bound and memory. A test holds the pages to it. A
comparison whose spec says where its systems' accuracy is in `accuracy.json` has it in its table, and as a plot where a
page shows docs/images/NAME-accuracy-MACHINE.png. Accuracy is the same machine's; where that has not measured it,
another's.
"""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compare.systems import ROOT
from benchmarks.load import plots
from benchmarks.load.output import markdown_table, number

RESULTS = ROOT / "docs" / "results"
# The folders of docs/results, in the order of the tables, and what a column calls them.
MACHINES = {"xeon-amx": "Xeon with AMX", "epyc-zen4": "EPYC, Zen 4", "epyc-zen3": "EPYC, Zen 3"}
# The model that the systems' accuracy is of. It has the real weights, moved off the 4-bit grid of their own file.
ACCURACY_MODEL = "smollm2-dithered"
ACCURACY = ["perplexity ÷ float32's", "KL, nats"]
WHAT = {
    "vllm": "ours on vLLM",
    "transformers": "ours on Transformers",
    "upstream": "vLLM alone",
    "zentorch": "vLLM with zentorch",
    "openvino": "OpenVINO",
    "llama-cpp": "llama.cpp",
}
BLOCK = re.compile(r"(<!-- results (?P<name>[\w.-]+)(?P<speeds> speeds)? -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text: str) -> str:
    """A page with the tables that its results give."""

    def block(match: re.Match[str]) -> str:
        results = results_of(match["name"])
        if match["speeds"]:
            parts = [speeds(results), *(f"{where(result)}\n" for result in results.values())]
        else:
            parts = [f"{table(machine, result)}\n{where(result)}\n" for machine, result in results.items()]
        return match[1] + "\n".join(parts) + match[4]

    return BLOCK.sub(block, text)


def results_of(name: str) -> dict[str, Mapping[str, Any]]:
    """NAME.json of each machine that has one."""
    files = {machine: RESULTS / machine / f"{name}.json" for machine in MACHINES}
    return {machine: json.loads(file.read_text()) for machine, file in files.items() if file.exists()}


def table(machine: str, result: Mapping[str, Any]) -> str:
    return compared(machine, result) if result["kind"] == "compare" else accuracies(result)


def compared(machine: str, result: Mapping[str, Any]) -> str:
    """A row a system: its figure under each workload, its ratio and its share of the bound; memory and accuracy."""
    has_bounds = result["peaks"] is not None
    workloads, accuracy = result["workloads"], accuracy_of(machine, result)
    header = ["output tokens/s"]
    for name in workloads:
        header += [title_of(result, name), "ratio", *(["of roofline"] if has_bounds else [])]
    header += ["PSS GiB", *(ACCURACY if accuracy else [])]
    rows = []
    for system in systems_of(result):
        cells, pss = [f"`{system}`"], None
        for name, workload in workloads.items():
            figures, metric = workload["systems"].get(system), metric_of(result, name, system)
            ratio, share = metric["ratio_to_baseline"], figures and figures["share_of_bound"]
            cells.append(number(metric["median"]))
            cells.append(f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "")
            if has_bounds:
                cells.append(f"{share:.0%}" if share else "")
            pss = figures["pss_bytes"] if figures else pss
        cells.append(number(pss / 2**30) if pss else "")
        rows.append([*cells, *(accuracy_cells(accuracy.get(system)) if accuracy else [])])
    return markdown_table(header, rows)


def speeds(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a system: on each machine its figure under each workload, and accuracy if it was all measured there."""
    header = ["output tokens/s"]
    rows = {system: [f"`{system}`"] for result in results.values() for system in systems_of(result)}
    first, measured = next(iter(results)), accuracy_lines()
    for machine, result in results.items():
        has_all = set(accuracy_wanted(result).values()) <= measured.get(machine, {}).keys()
        accuracy = accuracy_of(machine, result) if machine == first or has_all else {}
        titles = [*(title_of(result, name) for name in result["workloads"]), *(ACCURACY if accuracy else [])]
        header += [f"{MACHINES[machine]}: {titles[0]}", *titles[1:]]
        for system, cells in rows.items():
            cells += [number(metric_of(result, name, system)["median"]) for name in result["workloads"]]
            cells += accuracy_cells(accuracy.get(system)) if accuracy else []
    return markdown_table(header, list(rows.values()))


def systems_of(result: Mapping[str, Any]) -> list[str]:
    """The systems that were measured, in the spec's order."""
    measured = {system for workload in result["workloads"].values() for system in workload["systems"]}
    return [system for system in result["spec"]["systems"] if system in measured]


def has_objectives(result: Mapping[str, Any], workload: str) -> bool:
    """An open loop's throughput is what arrives; where it has objectives, the requests that met them count."""
    return bool(result["spec"]["workloads"][workload]["slo"])


def metric_of(result: Mapping[str, Any], workload: str, system: str) -> Mapping[str, Any]:
    figures = result["workloads"][workload]["systems"].get(system)
    if figures is None:
        return {"median": None, "ratio_to_baseline": None}
    metric: Mapping[str, Any] = figures["metrics"]["goodput_rps" if has_objectives(result, workload) else "output_tps"]
    return metric


def title_of(result: Mapping[str, Any], workload: str) -> str:
    """`c16`, a closed loop of 16 streams, in words; any other name as it is."""
    if has_objectives(result, workload):
        return f"{workload}, requests/s in time"
    match = re.fullmatch(r"c(\d+)", workload)
    return workload if match is None else f"{match[1]} stream{'' if match[1] == '1' else 's'}"


def accuracy_of(machine: str, result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The line of accuracy.json of each system whose spec names one: the machine's, or the first's that has it."""
    measured = accuracy_lines()
    lines = ChainMap(measured.get(machine, {}), *measured.values())
    return {name: lines[line] for name, line in accuracy_wanted(result).items()}


def accuracy_lines() -> dict[str, dict[str, Mapping[str, Any]]]:
    """By machine and FORMAT/WHAT, what was measured of the one model."""
    return {
        machine: {f"{row['format']}/{row['what']}": row for row in result["rows"] if row["model"] == ACCURACY_MODEL}
        for machine, result in results_of("accuracy").items()
    }


def accuracy_wanted(result: Mapping[str, Any]) -> dict[str, str]:
    """The name of that line, FORMAT/WHAT, of each system whose spec has one."""
    return {name: row for name, system in result["spec"]["systems"].items() if (row := system.get("accuracy"))}


def accuracy_cells(row: Mapping[str, Any] | None) -> list[str]:
    return ["", ""] if row is None else [f"{row['perplexity_ratio']:.3f}", f"{row['kl']:.3f}"]


def plot_name(name: str, machine: str) -> str:
    return f"{name}-accuracy-{machine}.png"


def plot_accuracy(name: str, machine: str, result: Mapping[str, Any]) -> None:
    """Speed against divergence with few streams and with many."""
    accuracy, workloads = accuracy_of(machine, result), list(result["workloads"])
    panels = {
        title_of(result, workload): {
            system: (row["kl"], figures["metrics"]["output_tps"]["median"])
            for system, row in accuracy.items()
            if (figures := result["workloads"][workload]["systems"].get(system))
        }
        for workload in (workloads[0], workloads[-1])
    }
    title = f"{result['title']}; {MACHINES[machine]}"
    plots.throughput_against_divergence(panels, title, ROOT / "docs" / "images" / plot_name(name, machine))


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
    model = f" Accuracy: {ACCURACY_MODEL}." if accuracy_wanted(result) else ""
    ratios = f"Ratios to `{result['spec']['baseline']}`, 95 % intervals; noise floor {noise}."
    return f"{result['title']}. {ratios}{model} {told}"


def main() -> int:
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    for name in sorted({file.stem for file in RESULTS.glob("*/*.json")}):
        for machine, result in results_of(name).items():
            if any(plot_name(name, machine) in text for text in texts.values()):
                plot_accuracy(name, machine, result)
    for page, text in texts.items():
        if (new := rewritten(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    main()
