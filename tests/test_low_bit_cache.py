"""`--low-bit-cache`: what a start has quantized is what the next one computes with, unless it is of something else."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen2Config

from tests.test_low_bit_vllm import SHAPE, Result, run_vllm

CONFIGS = {
    "llama": (LlamaConfig(**SHAPE), "sym_int4"),
    "qwen": (Qwen2Config(**SHAPE, tie_word_embeddings=True), "sym_int8"),  # biases, and a tied head
    "fp8": (LlamaConfig(**SHAPE), "fp8_e4m3"),
    "experts": (
        GptOssConfig(
            **{**SHAPE, "hidden_size": 64, "intermediate_size": 128},
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
            layer_types=None,
        ),
        "sym_int4",
    ),
}
Runs = dict[str, Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    torch.manual_seed(0)
    for name, (config, _) in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name:
                nn.init.normal_(parameter, std=0.2)
        model.bfloat16().save_pretrained(folder / name)
    return folder


def arguments(folder: Path, name: str) -> dict[str, object]:
    return {"model": str(folder / name), "quantization": f"ipex_{CONFIGS[name][1]}"}


def run(folder: Path, arguments: dict[str, dict[str, object]], name: str) -> Runs:
    (folder / name).mkdir()
    return run_vllm(arguments, folder / name, IPEX_VLLM_LOW_BIT_CACHE=str(folder / "kept"))


@pytest.fixture(scope="module")
def first(folder: Path) -> Runs:
    starts = {name: arguments(folder, name) for name in CONFIGS}
    ranks = {"llama on 2 ranks": {**starts["llama"], "tensor_parallel_size": 2}}
    again = {f"{name} again": entry for name, entry in (starts | ranks).items()}
    return run(folder, starts | ranks | again, "first")


@pytest.fixture(scope="module")
def second(folder: Path, first: Runs) -> Runs:
    """After: another time of `llama`, a file of `qwen` cut off, one bit of what is kept of `experts` changed."""
    os.utime(folder / "llama" / "config.json")
    (kept,) = (folder / "kept").glob("qwen-*")
    last = max(kept.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    (kept,) = (folder / "kept").glob("experts-*")
    changed = next(kept.glob("*experts.safetensors"))
    changed.write_bytes(changed.read_bytes()[:-1] + bytes([changed.read_bytes()[-1] ^ 64]))
    (folder / "kept" / f"{kept.name}.part-1234567").mkdir()
    starts = {name: arguments(folder, name) for name in ("llama", "qwen", "experts")}
    starts |= {"llama again": starts["llama"], "no folder": {**starts["llama"], "dtype": "float32"}}
    return run(folder, starts, "second")


@pytest.mark.parametrize("name", [*CONFIGS, "llama on 2 ranks"])
def test_the_next_start_computes_with_the_same_bits(first: Runs, name: str) -> None:
    made, read = first[name], first[f"{name} again"]
    assert torch.equal(made.logprobs, read.logprobs)
    assert "nothing is kept of this model in this format yet; written to" in made.log
    assert "low-bit cache: read from" in read.log
    used = [set(re.findall(r"(\d+ layers use the kernel \w+)", run.log)) for run in (made, read)]
    assert used[0]
    assert used[0] == used[1]


def test_what_is_kept_is_what_is_computed(second: Runs, first: Runs) -> None:
    assert "low-bit cache: read from" in second["experts"].log
    difference = (second["experts"].logprobs - first["experts"].logprobs).abs().max()
    assert difference > 0, "a changed bit changes answers: the checkpoint's weights were not quantized again"


def test_what_is_of_other_files_or_cut_off_is_made_anew(second: Runs, first: Runs, folder: Path) -> None:
    assert "what is kept is of other files and importance, and is made anew" in second["llama"].log
    assert "what is kept is not whole, and is made anew" in second["qwen"].log
    for name in ("llama", "qwen"):
        assert torch.equal(second[name].logprobs, first[name].logprobs)
    assert "low-bit cache: read from" in second["llama again"].log
    assert not [*(folder / "kept").glob("*.part-*")], "what a killed start left is removed"


def test_each_dtype_has_a_folder_of_its_own(second: Runs, folder: Path) -> None:
    assert "nothing is kept of this model in this format yet" in second["no folder"].log
    assert len([*(folder / "kept").glob("llama-*")]) == 4, "one, one of float32, one of each of two ranks"
