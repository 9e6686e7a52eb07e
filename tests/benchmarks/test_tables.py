from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.load import plots

MACHINE = {"cores": 2, "cpu": "Some CPU", "isa": ["avx2", "amx_tile"], "date": "2026-11-26T11:00:00", "commit": "abc"}


def system(tps: float, ratio: float | None) -> dict[str, Any]:
    interval = None if ratio is None else {"ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    metric = {"median": tps, "ratio_to_baseline": interval}
    return {"metrics": {"output_tps": metric}, "share_of_bound": 0.5, "pss_bytes": 2**31}


RESULT = {
    "kind": "compare",
    "title": "T",
    "spec": {
        "systems": {"a": {}, "b": {"accuracy": "sym_int4/vllm"}, "absent": {}},
        "workloads": {"c1": {"slo": ""}, "c4": {"slo": ""}},
        "baseline": "a",
    },
    "workloads": {
        "c1": {"noise_floor": {"output_tps": 0.034}, "systems": {"a": system(10.0, None), "b": system(25.0, 2.5)}},
        "c4": {"noise_floor": {"output_tps": None}, "systems": {"a": system(30.0, None)}},
    },
    "peaks": {"read": 1},
    "machine": MACHINE,
}


@pytest.fixture
def accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"model": "smollm2-dithered", "format": "sym_int4", "what": "vllm", "perplexity_ratio": 1.1215, "kl": 0.1126}
    for machine, kl in (("xeon-amx", 0.1126), ("epyc-zen3", 0.1)):
        rows = [{**row, "model": "demo", "kl": 0.5}, {**row, "kl": kl}]
        (tmp_path / machine).mkdir()
        (tmp_path / machine / "accuracy.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)


def test_a_comparison_s_table_has_each_system_s_figures_and_says_where_they_are_from(accuracy: None) -> None:
    lines = tables.compared("xeon-amx", RESULT).splitlines()
    assert lines[0].count("|") == lines[2].count("|") == 11
    assert lines[2:] == [
        "| `a` | 10.0 |  | 50% | 30.0 |  | 50% | 2.00 |  |  |",
        "| `b` | 25.0 | 2.50 (2.40 to 2.60) | 50% | - |  |  | 2.00 | 1.121 | 0.113 |",
    ]
    assert tables.where(RESULT).endswith(
        "noise floor 3%, unknown. Accuracy: smollm2-dithered. "
        "2 cores of Some CPU (avx2, amx_tile), 2026-11-26, commit abc."
    )


def test_a_comparison_without_accuracy_names_no_model_of_one() -> None:
    spec = {**RESULT["spec"], "systems": {"a": {"accuracy": ""}}}  # as a spec that says nothing is recorded
    assert "Accuracy" not in tables.where({**RESULT, "spec": spec})


def test_machines_stand_side_by_side_each_with_its_own_accuracy(accuracy: None) -> None:
    other = {**RESULT, "workloads": {"c1": RESULT["workloads"]["c1"]}}
    header, _, *rows = tables.speeds({"xeon-amx": RESULT, "epyc-zen3": other}).splitlines()
    assert header == (
        "| output tokens/s | Xeon with AMX: 1 stream | 4 streams | perplexity ÷ float32's | KL, nats "
        "| EPYC, Zen 3: 1 stream | perplexity ÷ float32's | KL, nats |"
    )
    assert rows == [
        "| `a` | 10.0 | 30.0 |  |  | 10.0 |  |  |",
        "| `b` | 25.0 | - | 1.121 | 0.113 | 25.0 | 1.121 | 0.100 |",
    ]


def test_a_machine_without_accuracy_has_the_first_s(accuracy: None, tmp_path: Path) -> None:
    (tmp_path / "epyc-zen3" / "accuracy.json").unlink()
    assert tables.accuracy_of("epyc-zen3", RESULT)["b"]["kl"] == 0.1126
    header = tables.speeds({"xeon-amx": RESULT, "epyc-zen3": RESULT}).splitlines()[0]
    assert header.count("KL, nats") == 1


def test_what_a_machine_has_not_measured_is_the_first_s(accuracy: None, tmp_path: Path) -> None:
    file = tmp_path / "epyc-zen3" / "accuracy.json"
    file.write_text(file.read_text().replace("sym_int4", "sym_int8"))
    assert tables.accuracy_of("epyc-zen3", RESULT)["b"]["kl"] == 0.1126
    header = tables.speeds({"xeon-amx": RESULT, "epyc-zen3": RESULT}).splitlines()[0]
    assert header.count("KL, nats") == 1


def test_an_accuracy_s_table() -> None:
    row = {"model": "m", "format": "f", "what": "vllm", "perplexity_ratio": 1.0, "kl": 0.5, "same_top_token": 0.81}
    assert tables.accuracies({"rows": [row]}).splitlines()[2] == "| `f`, ours on vLLM | m | 1.000 | 0.500 | 81.0% |"


def test_the_pages_have_the_tables_that_their_results_give() -> None:
    found = 0
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.rewritten(text) == text, f"{page}: run `python -m benchmarks.tables`"
        found += len(tables.BLOCK.findall(text))
    assert found > 0
    used = {match["name"] for page in tables.pages() for match in tables.BLOCK.finditer(page.read_text())}
    files = list(tables.RESULTS.glob("*/*.json"))
    assert {path.parent.name for path in files} <= set(tables.MACHINES)
    assert used <= {path.stem for path in files}


def test_a_system_that_answers_as_float32_does_is_in_the_plot_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots.plt, "close", lambda figure: None)
    plots.throughput_against_divergence({"1 stream": {"a": (0.0, 10.0), "b": (0.1, 20.0)}}, "T", tmp_path / "plot.png")
    (axis,) = plots.plt.gcf().axes
    assert [line.get_xdata()[0] for line in axis.lines] == [plots.LEAST_DIVERGENCE, 0.1]
    assert axis.get_xlim()[0] < plots.LEAST_DIVERGENCE
    assert axis.get_xlabel().endswith("(0.0005: that or less)")
    monkeypatch.undo()
    plots.plt.close("all")
