"""What a comparison concludes from what it measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.compare.findings import TWIN, Findings, Measurement, Stage
from benchmarks.compare.spec import Spec
from benchmarks.compare.systems import ROOT

SPEC = replace(Spec.read(ROOT / "benchmarks/configs/work.yaml"), metrics=("goodput_rps",))


def measured(stage: Stage, system: str, goodput: list[float]) -> list[Measurement]:
    """A round for each value."""
    requests = {"ok": 1, "sent": 1}
    runs: list[Any] = [SimpleNamespace(summary={"requests": requests, "goodput_rps": value}) for value in goodput]
    return [Measurement(stage, round, system, "open", run) for round, run in enumerate(runs)]


def test_a_round_in_which_no_request_was_in_time_has_no_ratio() -> None:
    findings = Findings(
        SPEC, measured("main", SPEC.baseline, [2.0, 0.0, 2.0, 1.0]) + measured("main", "x", [1.0, 1.0, 1.0, 0.0])
    )
    ratio = findings.ratio("main", "x", "open", "goodput_rps")
    assert ratio is not None
    assert (ratio.ratio, ratio.pairs) == (pytest.approx(0.5), 2)


def test_where_no_request_is_ever_in_time_there_is_neither_ratio_nor_noise_floor() -> None:
    nothing = [0.0, 0.0, 0.0]
    same = measured("noise", SPEC.baseline, nothing) + measured("noise", TWIN, nothing)
    findings = Findings(SPEC, same + measured("main", SPEC.baseline, nothing) + measured("main", "x", nothing))
    assert findings.ratio("main", "x", "open", "goodput_rps") is None
    assert findings.noise("open")["goodput_rps"] is None
