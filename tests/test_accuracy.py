"""What is left of a real model's answers, through the kernels that serve: `benchmarks.accuracy` on less text."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.accuracy import peers
from benchmarks.accuracy.__main__ import main, measurements, model_path, open_float32, windows_of
from benchmarks.accuracy.score import Reference, Score, score_transformers
from ipex_vllm.low_bit.formats import resolve
from ipex_vllm.low_bit.hf import quantize_model
from ipex_vllm.low_bit.quantize import dequantize, quantize

# The tokens of four pages; they are harder on four bits than all twelve of the command are.
NUM_WINDOWS = 4

# Perplexity over float32's, and how often the most probable next token is the same.
BOUNDS = {
    "sym_int4": (1.19, 0.765),
    "asym_int4": (1.10, 0.82),
    "sym_int8": (1.012, 0.94),
    "fp8_e4m3": (1.02, 0.915),
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The float32 reference of SmolLM2."""
    with tempfile.TemporaryDirectory() as temporary:
        path = model_path("smollm2")
        Reference.write(Path(temporary), open_float32(path), windows_of("smollm2", path, NUM_WINDOWS))
        yield Path(temporary)


def check(score: Score, bounds: tuple[float, float]) -> None:
    row = score.row()
    assert row["perplexity_ratio"] <= bounds[0]
    assert row["same_top_token"] >= bounds[1]


@pytest.mark.parametrize("name", BOUNDS)
def test_on_transformers(name: str, folder: Path) -> None:
    ((_, score),) = measurements("smollm2", model_path("smollm2"), resolve(name), folder, ["transformers"], False)
    check(score, BOUNDS[name])


@pytest.mark.parametrize("name", ["sym_int4", "sym_int8", "fp8_e4m3"])
def test_on_vllm_in_the_workers_own_dtype(name: str, folder: Path) -> None:
    ((_, score),) = measurements("smollm2", model_path("smollm2"), resolve(name), folder, ["vllm"], False)
    check(score, BOUNDS[name])


def test_the_unquantized_model_scores_as_itself(folder: Path) -> None:
    row = score_transformers(open_float32(model_path("smollm2")), Reference(folder)).row()
    assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert row["kl"] < 1e-5
    assert row["same_top_token"] > 0.998


def test_a_peer_without_a_kernel_costs_neither_the_others_nor_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
        yield "before", Score(num_tokens=1)
        raise RuntimeError("Traceback\nAttributeError: no such kernel\n")

    def interrupted(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
        yield "after", Score(num_tokens=1)
        raise KeyboardInterrupt

    monkeypatch.setitem(peers.PEERS, "broken", broken)
    monkeypatch.setitem(peers.PEERS, "interrupted", interrupted)
    out = tmp_path / "accuracy.json"
    options = ["--formats", "--windows", "1", "--peers", "broken", "interrupted", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["accuracy", *options])
    with pytest.raises(KeyboardInterrupt):
        main()
    assert [row["format"] for row in json.loads(out.read_text())["rows"]] == ["before", "after"]
    assert "broken: AttributeError: no such kernel\n" in capsys.readouterr().out


def test_on_load_no_format_is_further_from_the_demo_model_than_nearest_rounding(tmp_path: Path) -> None:
    path = model_path("demo")
    reference = Reference.write(tmp_path, open_float32(path), windows_of("demo", path, 24))
    for name in ("sym_int4", "asym_int4", "sym_int5", "nf4", "fp4"):
        nearest = open_float32(path)
        for layer in nearest.model.layers.modules():
            if hasattr(layer, "in_features"):
                layer.weight.data = dequantize(quantize(layer.weight.detach(), resolve(name), search=False))
        ours = score_transformers(quantize_model(open_float32(path), name), reference)
        assert ours.row()["kl"] <= score_transformers(nearest, reference).row()["kl"], name
