"""Models in 16 bits inside vLLM, multiplied by our kernel, against Transformers in float32 on the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ipex_vllm.low_bit import OWN_16_BITS
from tests.low_bit_logprobs import PROMPT
from tests.test_low_bit_vllm import SHAPE, Result, run_vllm

OWN = {"additional_config": {OWN_16_BITS: True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, torch.Tensor]]:
    """The directory and the prompt's log probabilities. `qwen` has biases, and a head that shares the embedding."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
    qwen = Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "intermediate_size": 161, "tie_word_embeddings": True})).half()
    for layer in qwen.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(projection.bias, std=0.3)
    found = {}
    for name, model in (("llama", llama), ("qwen", qwen)):
        path = str(folder / name)
        model.save_pretrained(path)
        whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            logprobs = whole(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
        found[name] = path, logprobs[range(len(PROMPT) - 1), PROMPT[1:]]
    return found


@pytest.fixture(scope="module")
def results(models: dict[str, tuple[str, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    llama, qwen = ({"model": path} for path, _ in models.values())
    arguments: dict[str, dict[str, object]] = {
        "llama, upstream": {**llama, "dtype": "bfloat16"},
        "llama": {**llama, "dtype": "bfloat16", **OWN},
        "llama, compiled": {**llama, "dtype": "bfloat16", "enforce_eager": False, **OWN},
        "qwen": {**qwen, "dtype": "float16", **OWN},
        "llama, 2 ranks": {**llama, "dtype": "bfloat16", "tensor_parallel_size": 2, **OWN},
    }
    return run_vllm(arguments, tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("run", ["llama", "llama, compiled", "qwen", "llama, 2 ranks"])
def test_the_answers_are_those_of_the_weights(
    run: str, models: dict[str, tuple[str, torch.Tensor]], results: dict[str, Result]
) -> None:
    """But for what activations in 16 bits cost."""
    _, wanted = models[run.partition(",")[0]]
    assert (results[run].logprobs - wanted).abs().mean() < (0.003 if run == "qwen" else 0.02)


def test_the_kernel_is_used_where_it_is_wanted(results: dict[str, Result]) -> None:
    line = "layers in 16 bits use the kernel w16a16"
    assert line not in results["llama, upstream"].log
    assert line in results["llama"].log
    assert (results["llama"].logprobs - results["llama, upstream"].logprobs).abs().mean() < 0.03
