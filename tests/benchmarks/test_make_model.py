"""A model whose later layers add nothing, and the draft that is made of its first ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import make_model


def test_first_layers_write_what_a_model_does_whose_others_add_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_model, "training_text", lambda: iter(["a short text for a tokenizer"]))
    model = make_model.make_model("tiny", tmp_path / "model", live_layers=1)
    draft = make_model.first_layers(model, tmp_path / "draft", 1)
    whole = make_model.make_model("tiny", tmp_path / "whole")
    tokens = torch.arange(3, 20)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (model, draft, whole)
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=0.1)
