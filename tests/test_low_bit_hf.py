import logging

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.hf import HfLowBitExperts, HfLowBitLinear, quantize_model
from ipex_vllm.low_bit.importance import measure
from ipex_vllm.low_bit.quantize import dequantize, quantize
from ipex_vllm.low_bit.recipe import Storage, on_load


def llama(**changes: int | bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "attention_bias": True,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).to(torch.bfloat16).eval()


def with_dequantized_weights(model: LlamaForCausalLM, name: str) -> LlamaForCausalLM:
    recipe, importances = on_load(FORMATS[name]), measure(model)
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            storage = recipe.storage(layer, module.in_features, is_head=module is model.lm_head)
            assert isinstance(storage, Storage)
            quantized = quantize(
                module.weight.detach(), storage.format, storage.group_size, importances[layer], scales_inputs=True
            )
            module.weight = nn.Parameter(dequantize(quantized, torch.bfloat16))
    return model


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4", "sym_int8", "fp8_e4m3", "nf4"])
def test_a_quantized_model_computes_what_its_dequantized_weights_do(name: str) -> None:
    expected, model = with_dequantized_weights(llama(), name), quantize_model(llama(), name)
    linears = [module for module in model.modules() if isinstance(module, HfLowBitLinear)]
    assert len(linears) == 2 * 7 + 1
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        difference = model(tokens).logits.float() - expected(tokens).logits.float()
        # What is left is the rounding of the activations.
        assert difference.norm() < 0.03 * expected(tokens).logits.float().norm()


MIXTURE = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Qwen3MoeConfig(**MIXTURE), "sym_int4"),
        (MixtralConfig(**MIXTURE), "fp8_e4m3"),
        (GptOssConfig(**MIXTURE), "fp4"),
    ],
)
def test_stacked_experts_are_quantized(config: PreTrainedConfig, name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for each, parameter in model.named_parameters():
        if ".experts." in each:
            nn.init.normal_(parameter, std=0.1)
    layers = [module for module in model.modules() if hasattr(module, "is_concatenated")]
    inputs = torch.randn(60, 128), torch.randint(8, (60, 3)), torch.rand(60, 3)
    with torch.inference_mode():
        for layer in layers:
            for parameter in (layer.gate_up_proj, layer.down_proj):
                for matrix in parameter:
                    rows = matrix.T if layer.is_transposed else matrix
                    rows.copy_(dequantize(quantize(rows, FORMATS[name], 32)))
        expected = [layer(*inputs) for layer in layers]
        quantize_model(model, name)
        replaced = [module for module in model.modules() if isinstance(module, HfLowBitExperts)]
        assert len(replaced) == len(layers) == 2
        # Quantizing what is on a grid already finds it nearly; and the activations are rounded.
        for layer, wanted in zip(replaced, expected, strict=True):
            assert (layer(*inputs) - wanted).norm() < 0.03 * wanted.norm()
        assert model(torch.arange(40).view(2, 20)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("head", "expected"), [(None, "sym_int8"), ("same", "sym_int4"), ("fp8", "fp8_e4m3"), ("none", None)]
)
def test_the_head_is_stored_as_is_asked_for_and_in_eight_bits_otherwise(head: str | None, expected: str | None) -> None:
    for is_tied in (False, True):
        model = quantize_model(llama(tie_word_embeddings=is_tied), "sym_int4", head=head)
        if expected is None:
            assert type(model.lm_head) is nn.Linear
        else:
            assert model.lm_head.low_bit.format.name == expected
        assert model.model.layers[0].mlp.down_proj.low_bit.format.name == "sym_int4"


def test_the_first_and_the_last_layer_are_stored_as_is_asked_for() -> None:
    model = quantize_model(llama(num_hidden_layers=3), "sym_int4", outer="sym_int8")
    formats = [layer.self_attn.q_proj.low_bit.format.name for layer in model.model.layers]
    assert formats == ["sym_int8", "sym_int4", "sym_int8"]


def test_a_tied_head_is_quantized_and_its_embedding_is_not() -> None:
    model = quantize_model(llama(tie_word_embeddings=True), "sym_int4")
    assert isinstance(model.lm_head, HfLowBitLinear)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.embed_tokens.weight, llama(tie_word_embeddings=True).model.embed_tokens.weight)


def test_layers_whose_inputs_no_group_divides_stay_as_they_are_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        model = quantize_model(llama(intermediate_size=200), "sym_int4")
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    lines = [record.message for record in caplog.records if "not quantized" in record.message]
    reason = "200 inputs are no multiple of the group size 32"
    assert lines == [f"not quantized: model.layers.0.mlp.down_proj and 1 more ({reason})"]


def test_a_layer_whose_inputs_the_usual_group_does_not_divide_has_a_smaller_one() -> None:
    model = quantize_model(llama(intermediate_size=160), "sym_int4", group_size=64)
    mlp = model.model.layers[0].mlp
    assert (mlp.up_proj.low_bit.group_size, mlp.down_proj.low_bit.group_size) == (64, 32)


def test_the_kernels_in_use_are_logged_and_a_slow_one_says_what_it_costs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        quantize_model(llama(), "fp6")
    assert "fp6: 14 layers use the kernel dequantize, which saves memory but no time" in caplog.text


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_dtype_format_only_changes_the_dtype(name: str, dtype: torch.dtype) -> None:
    model = quantize_model(llama().float(), name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert type(model.lm_head) is nn.Linear


def test_a_format_without_a_kernel_on_the_device_is_refused() -> None:
    with pytest.raises(ValueError, match="sym_int4 on a Transformers model runs on the CPU only"):
        quantize_model(llama(), "sym_int4", "xpu")
