from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ipex_vllm.low_bit.calibrate import parts_of, quantized_layers, round_with_compensation
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.layout import from_tensors
from ipex_vllm.low_bit.quantize import QuantizedWeight, dequantize, quantize
from ipex_vllm.low_bit.recipe import Storage

INT4 = Storage(FORMATS["sym_int4"], 32)


def correlated_inputs() -> torch.Tensor:
    """[rows, 128] whose columns go together, as a layer's inputs do."""
    torch.manual_seed(0)
    return torch.randn(2000, 16) @ torch.randn(16, 128) + 0.3 * torch.randn(2000, 128)


def error_of_outputs(weight: torch.Tensor, quantized: QuantizedWeight, inputs: torch.Tensor) -> float:
    return (inputs @ (dequantize(quantized) - weight).T).square().mean().item()


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4", "sym_int5"])
def test_compensation_brings_the_outputs_nearer_than_rounding_each_column_alone(name: str) -> None:
    inputs, weight = correlated_inputs(), torch.randn(64, 128) * 0.02
    products = inputs.T @ inputs / len(inputs)
    alone = quantize(weight, FORMATS[name], 32, products.diagonal())
    together = round_with_compensation(weight, Storage(FORMATS[name], 32), products)
    assert together.codes.dtype == torch.uint8
    assert together.scales.shape == alone.scales.shape
    assert error_of_outputs(weight, together, inputs) < 0.8 * error_of_outputs(weight, alone, inputs)


@pytest.mark.parametrize("storage", [Storage(FORMATS["sym_int8"], None), Storage(FORMATS["nf4"], 32)])
def test_formats_without_groups_of_integers_are_rounded_by_importance(storage: Storage) -> None:
    inputs, weight = correlated_inputs(), torch.randn(64, 128)
    products = inputs.T @ inputs / len(inputs)
    expected = quantize(weight, storage.format, storage.group_size or 0, products.diagonal())
    assert torch.equal(dequantize(round_with_compensation(weight, storage, products)), dequantize(expected))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=320
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_layer_comes_once_and_the_same_each_time(model: Path) -> None:
    stored = {"model.layers.0.mlp.down_proj": INT4, "model.layers.1.self_attn.q_proj": INT4}
    first, second = (dict(quantized_layers(str(model), stored, None)) for _ in range(2))
    assert set(first) == set(stored)
    for name, tensors in first.items():
        assert all(torch.equal(tensor, second[name][suffix]) for suffix, tensor in tensors.items())
        assert from_tensors(INT4.format, tensors).scales.isfinite().all()


def test_parts_hold_as_many_layers_as_their_products_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipex_vllm.low_bit.calibrate.PRODUCTS_BYTES", 2 * 4 * 64**2)
    modules = {str(i): torch.nn.Linear(64, 8) for i in range(5)} | {"wide": torch.nn.Linear(256, 8)}
    assert [[*part] for part in parts_of(modules)] == [["0", "1"], ["2", "3"], ["4"], ["wide"]]
