"""Speculative decoding inside vLLM: with drafts a client gets what it gets without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_model import first_layers
from ipex_vllm.demo import MODEL_DIR
from tests.speculative_heads import eagle3_head, model_with_mtp_head
from tests.speculative_texts import NUM_SAMPLES, ways

WAYS = ["lookup", "model"]
WITHOUT = {"lookup": "off", "model": "off", "eagle3": "off", "mtp": "mtp off"}
ASKED = [(way, case) for way, asked in ways(Path()).items() if way in WITHOUT for case in asked.cases]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    first_layers(MODEL_DIR, folder / "draft", 4)  # often right
    eagle3_head(MODEL_DIR, folder / "eagle3")
    model_with_mtp_head(folder / "mtp")
    command = [sys.executable, "-m", "tests.speculative_texts", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = {}
    for line in lines:
        found |= json.loads(line)
    assert found.keys() == {*WITHOUT, *WITHOUT.values()}, (done.stdout + done.stderr)[-4000:]
    return found


@pytest.mark.parametrize(("way", "case"), ASKED)
def test_what_has_one_right_answer_has_the_same_with_drafts(results: dict[str, Any], way: str, case: str) -> None:
    expected, found = results[WITHOUT[way]]["cases"][case], results[way]["cases"][case]
    assert found == expected
    assert results[way]["drafted"] > 30, "nothing was put to the test"


def test_each_parameter_changes_the_answer(results: dict[str, Any]) -> None:
    """Else it could be dropped and nobody would notice."""
    answers = {case: found[0][1][0] for case, found in results["off"]["cases"].items()}
    for case in ("stop", "stop_token", "penalties", "bad_words", "allowed", "bias", "json"):
        assert answers[case] != answers["plain"], case
    assert answers["min_p"] == answers["plain"], "at 1 it leaves the likeliest token alone"


def test_sampled_tokens_are_as_frequent_as_without_drafts(results: dict[str, Any]) -> None:
    """Pearson's chi-squared test of two samples of some ten triples; 36 is its 0.9999 quantile for 10 degrees."""
    first, second = results["off"]["sampled"], results["lookup"]["sampled"]
    assert sum(first.values()) == sum(second.values()) == NUM_SAMPLES
    assert 5 < len(first | second) < 12
    statistic = sum(
        (first.get(triple, 0) - second.get(triple, 0)) ** 2 / (first.get(triple, 0) + second.get(triple, 0))
        for triple in first.keys() | second.keys()
    )
    assert statistic < 36


@pytest.mark.parametrize("way", ["off", *WAYS])
def test_a_client_that_leaves_in_the_middle_of_a_draft_leaves_nothing_behind(results: dict[str, Any], way: str) -> None:
    assert results[way]["left"] == 0
