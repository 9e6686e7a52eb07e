"""Models from GGUF files inside upstream vLLM, against Transformers with the weights that their blocks stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from ipex_vllm.demo import smollm2_file
from ipex_vllm.low_bit import gguf_directory, vllm_arguments
from tests.gguf_files import make_model, write
from tests.low_bit_logprobs import PROMPT
from tests.test_low_bit_vllm import Result, run_vllm

TEXT = (
    "The capital of France is Paris. The capital of Germany is Berlin, and the capital of Italy is Rome. "
    "Water boils at 100 degrees Celsius at sea level."
)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


def mixed(name: str) -> Kind:
    """As llama.cpp's Q4_K_M: some layers have more bits, and the parts of one layer of vLLM's differ."""
    if name == "output.weight":
        return Kind.Q6_K
    if "attn_v" in name or "ffn_down" in name:
        return Kind.Q6_K
    return Kind.F16 if "blk.1.attn_k" in name else Kind.Q4_K


def mixed_experts(name: str) -> Kind:
    """As llama.cpp's Q4_K_M: down may have more bits than gate and up."""
    return Kind.Q6_K if "blk.1.ffn_down" in name else Kind.Q4_K


def gpt_oss(name: str) -> Kind:
    return Kind.MXFP4 if "_exps" in name else Kind.Q8_0


def of_one(kind: Kind) -> Callable[[str], Kind]:
    return lambda _: kind


FILES: dict[str, tuple[str, dict[str, Any], Callable[[str], Kind]]] = {
    "mixed": ("llama", WIDE, mixed),
    "f16": ("llama", {}, of_one(Kind.F16)),
    "qwen2": ("qwen2", {}, of_one(Kind.Q8_0)),
    "qwen3moe": ("qwen3moe", {}, of_one(Kind.F16)),
    "mixed experts": ("qwen3moe", {**WIDE, "moe_intermediate_size": 512}, mixed_experts),
    "gpt-oss": ("gpt-oss", {}, gpt_oss),
    "gemma2": ("gemma2", {}, of_one(Kind.Q8_0)),
    "gemma3": ("gemma3", {}, of_one(Kind.Q8_0)),
    "phi3": ("phi3", {}, of_one(Kind.Q4_1)),
}
EXACT = ("mixed", "f16", "qwen2", "qwen3moe", "gemma2", "gemma3", "phi3", "smollm2")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """For each file its path, and the log-probabilities of the prompt's tokens by Transformers in float32."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, (architecture, changes, kind_of) in FILES.items():
        model = make_model(architecture, **changes)
        write(folder / f"{name}.gguf", architecture, model, kind_of)
        found[name] = folder / f"{name}.gguf", logprobs_of(model, PROMPT)
    return found


def logprobs_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logprobs[range(len(ids) - 1), ids[1:]]


@pytest.fixture(scope="module")
def smollm2() -> tuple[list[int], torch.Tensor]:
    """The tokens of a text, and their log-probabilities in Transformers' own float32 reading of the file."""
    file = smollm2_file()
    ids = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(TEXT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return ids, logprobs_of(model, ids)


@pytest.fixture(scope="module")
def results(
    expected: dict[str, tuple[Path, torch.Tensor]],
    smollm2: tuple[list[int], torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("vllm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "own cache"))

        def arguments_of(file: Path, **others: object) -> dict[str, object]:
            directory = str(gguf_directory(str(file)))
            return {"model": directory, **vllm_arguments(None, directory, "cpu"), "dtype": "float32", **others}

        files = {name: path for name, (path, _) in expected.items()} | {"smollm2": smollm2_file()}
        arguments = {name: arguments_of(files[name], exact=True) for name in EXACT}
        arguments["smollm2"] |= {"prompt": smollm2[0]}
        arguments |= {
            "smollm2 served": arguments_of(files["smollm2"], prompt=smollm2[0]),
            "mixed compiled": arguments_of(files["mixed"], enforce_eager=False),
            "mixed, two ranks": arguments_of(files["mixed"], tensor_parallel_size=2),
            "mixed experts": arguments_of(files["mixed experts"]),
            "gpt-oss": arguments_of(files["gpt-oss"]),
            "gpt-oss, two ranks": arguments_of(files["gpt-oss"], tensor_parallel_size=2, dtype="bfloat16"),
        }
        return run_vllm(arguments, folder)


@pytest.mark.parametrize("name", EXACT)
def test_a_models_log_probabilities_are_transformers(
    name: str,
    expected: dict[str, tuple[Path, torch.Tensor]],
    smollm2: tuple[list[int], torch.Tensor],
    results: dict[str, Result],
) -> None:
    wanted = smollm2[1] if name == "smollm2" else expected[name][1]
    # Blocks of more than four bits in groups that our formats have not are rounded again; vLLM's attention computes
    # Gemma 2's tanh for itself.
    allowed = {"mixed": 0.1, "gemma2": 0.01}.get(name, 1e-3)
    assert (results[name].logprobs - wanted).abs().max() < allowed


@pytest.mark.parametrize(
    "run", ["mixed compiled", "mixed, two ranks", "mixed experts", "gpt-oss", "gpt-oss, two ranks"]
)
def test_with_8_bit_activations_the_rest_is_the_same(
    run: str, expected: dict[str, tuple[Path, torch.Tensor]], results: dict[str, Result]
) -> None:
    _, wanted = expected[run.removesuffix(" compiled").partition(",")[0]]
    assert (results[run].logprobs - wanted).abs().mean() < 0.06


def test_smollm2_is_served_by_the_low_bit_kernels_and_shares_its_embedding_with_its_head(
    smollm2: tuple[list[int], torch.Tensor], results: dict[str, Result]
) -> None:
    run = results["smollm2 served"]
    assert (run.logprobs - smollm2[1]).abs().mean() < 0.06
    assert "asym_int4: 120 layers use the kernel w4a8" in run.log
    assert "sym_int8: 1 layers use the kernel w8a8" in run.log
    (weight_bytes,) = re.findall(r"WEIGHT_BYTES (\d+)", run.log)
    assert 0.9 < int(weight_bytes) / smollm2_file().stat().st_size < 1.15


def test_the_log_says_what_experts_become(results: dict[str, Result]) -> None:
    assert "fp4: 2 layers use the kernel experts" in results["gpt-oss"].log
    assert "asym_int4: 2 layers use the kernel experts" in results["mixed experts"].log
    assert "not quantized: model.layers.0.mlp.experts and 1 more (experts are written out" in results["qwen3moe"].log
