"""What a model directory tells before it is loaded."""

from __future__ import annotations

import pytest

from ipex_vllm.machine.kv_cache import KvCache
from ipex_vllm.machine.model import ModelFacts
from tests.machines import LLAMA_1B, write_model


def test_a_model_directory_tells_its_sizes(tmp_path):
    # Some repositories hold the same weights twice.
    files = {"model-1.safetensors": 300, "model-2.safetensors": 200, "consolidated.safetensors": 500}
    assert ModelFacts.read(write_model(tmp_path, LLAMA_1B, files)) == ModelFacts(
        500, 2 * 32_000 * 2048, False, KvCache(2 * 22 * 4 * 64 * 2), 2048
    )


def test_a_model_may_state_its_head_size_and_share_no_heads(tmp_path):
    config = {**LLAMA_1B, "head_dim": 128, "num_key_value_heads": None, "quantization_config": {}}
    facts = ModelFacts.read(write_model(tmp_path, config, {"pytorch_model.bin": 10}))
    assert facts.kv_cache == KvCache(2 * 22 * 32 * 128 * 2)
    assert facts.weight_bytes == 10
    assert facts.is_quantized


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_model_tells_its_dtype_by_the_name_of_its_transformers(tmp_path, name):
    parts = {"text_config": {**LLAMA_1B, name: "float16"}, name: "bfloat16"}
    assert ModelFacts.read(write_model(tmp_path, parts)).dtype == "float16"


def test_a_quantization_of_nothing_is_none(tmp_path):
    assert not ModelFacts.read(write_model(tmp_path, {**LLAMA_1B, "quantization_config": None})).is_quantized


@pytest.mark.parametrize(
    "config", [{}, [], {"num_attention_heads": 8}, {"num_hidden_layers": 2}, {**LLAMA_1B, "hidden_size": "2048"}]
)
def test_an_unusual_model_is_no_error(tmp_path, config):
    assert ModelFacts.read(write_model(tmp_path, config)).kv_cache is None


def test_a_model_that_is_not_here_is_unknown(tmp_path):
    assert ModelFacts.read("someone/model") == ModelFacts()
    (tmp_path / "config.json").write_text("{")
    assert ModelFacts.read(str(tmp_path)) == ModelFacts()


def test_a_model_of_several_parts_is_read_by_the_one_that_writes_text(tmp_path):
    parts = {"vision_config": {"hidden_size": 64, "num_hidden_layers": 1}, "tie_word_embeddings": True}
    nested = ModelFacts.read(write_model(tmp_path, {**parts, "text_config": LLAMA_1B}))
    assert nested == ModelFacts.read(write_model(tmp_path, {**LLAMA_1B, "tie_word_embeddings": True}))
    assert (nested.max_position, nested.is_tied) == (2048, True)
    assert ModelFacts.read(write_model(tmp_path, {"thinker_config": {"text_config": LLAMA_1B}})).max_position == 2048
