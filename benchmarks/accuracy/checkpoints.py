"""Checkpoints in other tools' layouts: what computing them costs, against the same codes in float32 on Transformers.

    python -m benchmarks.accuracy.checkpoints awq gptq int8-channels bf16 gguf

`bf16` is the model rounded to that, computed in it and in float32. `gguf` is SmolLM2's own file (Q4_1, the embedding in
Q8_0) against Transformers' float32 reading of it.
Prints a line a measurement and, as the last line of its output, all of them as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.__main__ import model_path, windows_of
from benchmarks.accuracy.score import Reference, Score
from benchmarks.accuracy.vllm_logits import score_vllm
from benchmarks.checkpoints import LAYOUTS, write
from ipex_vllm.demo import resolve_model_path
from ipex_vllm.low_bit import OWN_16_BITS, UPSTREAM_KERNELS, gguf_directory, vllm_arguments

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
        ways = WAYS
        if LAYOUTS[layout].format == "fp4":  # for which vLLM has no kernel
            ways = {"ours": WAYS["ours"], "W4A16": ({"model": str(values)}, {})}
        elif LAYOUTS[layout].format == "sym_int8":
            ways = {way: WAYS[way] for way in ("ours", "upstream")}
        for way, (arguments, environ) in ways.items():
            arguments = {"model": str(checkpoint), "dtype": "bfloat16", **arguments}
            yield way, score_vllm(folder, arguments, environ=environ)


def in_16_bits(path: str, windows: torch.Tensor) -> Iterator[tuple[str, Score]]:
    """The model at `path` with its weights rounded to bfloat16: by either kernel, and in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = str(folder / "checkpoint")
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(path).save_pretrained(checkpoint)
        meant: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        Reference.write(folder, meant.eval(), windows)
        del meant
        for way, arguments in (
            ("ours", {"dtype": "bfloat16", "additional_config": {OWN_16_BITS: True}}),
            ("upstream", {"dtype": "bfloat16"}),
            ("float32", {"dtype": "float32"}),
        ):
            yield way, score_vllm(folder, {"model": checkpoint, **arguments})


def own_file(path: str, windows: torch.Tensor) -> Iterator[tuple[str, Score]]:
    """SmolLM2's own file; at `path` is what Transformers reads from it."""
    from transformers import AutoModelForCausalLM

    directory = str(gguf_directory(resolve_model_path("smollm2")))
    arguments = {"model": directory, **vllm_arguments(None, directory, "cpu")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        meant: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        Reference.write(folder, meant.eval(), windows)
        for dtype in ("float32", "bfloat16"):
            yield dtype, score_vllm(folder, {**arguments, "dtype": dtype})


OTHERS = {"bf16": in_16_bits, "gguf": own_file}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="+", choices=[*LAYOUTS, *OTHERS])
    parser.add_argument("--model", default="smollm2", help="smollm2, or a directory in full precision")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens")
    options = parser.parse_args()
    path, rows = model_path(options.model), []
    windows = windows_of(options.model, path, options.windows)
    for layout in options.layouts:
        found = OTHERS[layout](path, windows) if layout in OTHERS else scores(path, layout, windows)
        for way, score in found:
            row = {"layout": layout, "way": way, **score.row()}
            rows.append(row)
            print(*(f"{name} {value:.4f}" if isinstance(value, float) else value for name, value in row.items()))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
