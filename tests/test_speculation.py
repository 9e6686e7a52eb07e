"""Speculative decoding inside vLLM: with drafts a client gets what it gets without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ipex_vllm.demo import MODEL_DIR
from tests.speculative_texts import CASES, NUM_SAMPLES

WAYS = ["lookup", "model"]


def first_layers(folder: Path, count: int) -> Path:
    """The demo model without its later layers: a draft that is often right."""
    shutil.copytree(MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": count}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < count}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    draft = first_layers(tmp_path_factory.mktemp("models") / "draft", 4)
    command = [sys.executable, "-m", "tests.speculative_texts", str(draft)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = {}
    for line in lines:
        found |= json.loads(line)
    assert found.keys() == {"off", *WAYS}, (done.stdout + done.stderr)[-4000:]
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_what_has_one_right_answer_has_the_same_with_drafts(results: dict[str, Any], way: str, case: str) -> None:
    expected, found = results["off"]["cases"][case], results[way]["cases"][case]
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
