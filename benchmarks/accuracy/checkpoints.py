"""Checkpoints in other tools' layouts: what computing them costs, against the same codes in float32 on Transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.score import Reference, Score
from benchmarks.accuracy.vllm_logits import score_vllm
from benchmarks.checkpoints import LAYOUTS, write
from ipex_vllm.low_bit import UPSTREAM_KERNELS

# The widest that divides SmolLM2's rows of 576.
GROUP_SIZE = 64
# vLLM's own kernels take 8-bit activations, a scale a token, in bfloat16 on a CPU with AMX, unless told otherwise.
UPSTREAM = {"additional_config": {UPSTREAM_KERNELS: True}}
WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "ours": ({}, {}),
    "upstream": (UPSTREAM, {}),
    "upstream W4A16": (UPSTREAM, {"VLLM_CPU_INT4_W4A8": "0"}),
}


def scores(path: str, layout: str, windows: torch.Tensor) -> Iterator[tuple[str, Score]]:
    """Each way of computing the checkpoint, in bfloat16, and its score; the model at `path` is in full precision."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint, values = folder / "checkpoint", folder / "values"
        write(Path(path), checkpoint, LAYOUTS[layout], GROUP_SIZE, values)
        meant: Any = AutoModelForCausalLM.from_pretrained(values, dtype=torch.float32)
        Reference.write(folder, meant.eval(), windows)
        del meant
        for way, (arguments, environ) in WAYS.items():
            arguments = {"model": str(checkpoint), "dtype": "bfloat16", **arguments}
            yield way, score_vllm(folder, arguments, environ=environ)
