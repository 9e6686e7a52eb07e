"""The part of the matrix that guards what is mended and what is most easily wrong; docs/models.md has all of it."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.models import report
from benchmarks.models.zoo import ARCHITECTURES

# Rotary of heads apart, correction biases, latent attention, an activation's numbers, heads without a configuration or
# that are the embedding; a picture; a vector; a score.
GUARDS = (
    "lfm2",
    "ernie4.5-moe",
    "minimax-m2",
    "glm4.7-flash",
    "apertus",
    "gpt-oss",
    "gemma2",
    "qwen3-next",
    "qwen3.5-text",
)
GUARDS += ("qwen3-vl-picture", "qwen3-embed", "bert-score")
FORMATS = (report.FLOAT, "sym_int4")


def test_architectures_answer_as_transformers_does() -> None:
    command = [sys.executable, "-m", "benchmarks.models", "--formats", *FORMATS, "--", *GUARDS]
    done = subprocess.run(command, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(GUARDS) * len(FORMATS), done.stderr[-3000:]
    assert not [result for result in results if not report.holds(result)]
    assert done.returncode == 0
    quantized = {result["name"]: result["quantized"] for result in results if result["format"] == "sym_int4"}
    assert quantized["gemma2"] == 9, "four of each layer, and the embedding as the head"
    assert quantized["gpt-oss"] == 21, "qkv, o and two of each of four experts of both layers, and the head"


def test_the_table_has_a_row_for_each_architecture() -> None:
    text = (Path(report.__file__).parents[2] / "docs" / "models.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.partition(report.HEAD)[2].splitlines()[2:]]
    assert rows == list(ARCHITECTURES)


def test_what_does_not_hold_is_told_unless_it_is_known() -> None:
    good = {"name": "llama", "format": "float", "largest": 1e-6, "mean": 1e-7, "is_choice_same": True}
    assert report.is_expected(good)
    for wrong in ({"largest": 2e-3}, {"is_choice_same": False}, {"error": "no"}, {"format": "sym_int4", "mean": 0.03}):
        assert not report.is_expected({**good, **wrong})
    assert report.cell({**good, "largest": 2e-3}, "largest") == "**2.0e-03**"
