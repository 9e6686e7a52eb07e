import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from ipex_vllm.low_bit import importance


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_importance_is_the_mean_square_of_each_input() -> None:
    model = llama()
    tokens = torch.arange(24).view(2, 12)
    inputs = {}
    handle = model.lm_head.register_forward_pre_hook(lambda _, given: inputs.setdefault("lm_head", given[0]))
    found = importance.measure(model, tokens)
    handle.remove()
    assert set(found) == {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert torch.allclose(found["lm_head"], inputs["lm_head"].detach().square().mean((0, 1)))
    assert not model.lm_head._forward_pre_hooks


def test_a_checkpoint_read_layer_by_layer_gives_what_the_loaded_model_does(checkpoint: Path) -> None:
    found, expected = importance.read(importance.of_checkpoint(str(checkpoint))), importance.measure(llama())
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=1e-4), name


def test_experts_that_have_a_tensor_each_are_read_without_a_copy_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=96,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    # What Transformers would write there first.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("read by Transformers"))
    found, expected = importance.read(importance.of_checkpoint(str(tmp_path / "model"))), importance.measure(model)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert torch.allclose(found[name], values, rtol=1e-4), name


def test_it_is_kept_until_the_files_change(checkpoint: Path) -> None:
    first = importance.of_checkpoint(str(checkpoint))
    assert first is not None
    written = first.stat().st_mtime_ns
    assert importance.of_checkpoint(str(checkpoint)) == first
    assert first.stat().st_mtime_ns == written
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert importance.of_checkpoint(str(checkpoint)) != first
    assert not [path for path in first.parent.iterdir() if path.suffix != ".safetensors"]


def test_a_model_that_transformers_cannot_run_is_rounded_without_it_and_one_line_says_so(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "ipex_vllm"):
        assert importance.of_checkpoint(str(checkpoint)) is None
    lines = [record.message for record in caplog.records if record.name.startswith("ipex_vllm")]
    assert len(lines) == 1
    assert lines[0].startswith("weights are rounded without knowing which inputs matter: ")
    assert importance.read(None) == {}


def test_vllms_merged_layers_and_other_prefixes_find_theirs() -> None:
    kept = {
        "model.layers.1.self_attn.q_proj": torch.ones(4),
        "model.layers.11.self_attn.q_proj": torch.zeros(4),
        "model.language_model.layers.1.mlp.down_proj": torch.ones(8),
        "lm_head": torch.ones(2),
    }
    merged = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert importance.find(kept, "model.layers.1.self_attn.qkv_proj", merged) is kept["model.layers.1.self_attn.q_proj"]
    prefixed = importance.find(kept, "language_model.model.layers.1.mlp.down_proj", merged)
    assert prefixed is kept["model.language_model.layers.1.mlp.down_proj"]
    assert importance.find(kept, "lm_head", merged) is kept["lm_head"]
    assert importance.find(kept, "model.layers.1.mlp.up_proj", merged) is None
