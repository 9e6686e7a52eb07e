"""What a model keeps of a sequence: the layers' kinds in published configurations, and vLLM's own figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ipex_vllm.machine.facts import GIB
from ipex_vllm.machine.kv_cache import BLOCK_TOKENS, STEP_TOKENS, KvCache, read_kv_cache, text_part

# The fields of published config.json files that tell the cache.
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163_840,
    },
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite",
        "hidden_size": 2048,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "max_position_embeddings": 202_752,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131_072,
    },
    "Qwen3-Next-80B-A3B": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "use_sliding_window": False,
        "max_position_embeddings": 262_144,
    },
    "Falcon-H1-0.5B": {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "hidden_size": 1024,
        "num_hidden_layers": 36,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_d_conv": 4,
        "mamba_d_head": 64,
        "mamba_d_ssm": 1536,
        "mamba_d_state": 128,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 24,
        "max_position_embeddings": 16_384,
    },
    "LFM2-1.2B": {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "conv_L_cache": 3,
        "conv_dim": 2048,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "max_position_embeddings": 128_000,
    },
    "Mistral-Small-3.2": {
        "model_type": "mistral3",
        "text_config": {
            "model_type": "mistral",
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "sliding_window": None,
            "max_position_embeddings": 131_072,
        },
        "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "head_dim": 64},
    },
    "Qwen3-VL-4B": {
        "model_type": "qwen3_vl",
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
        },
        "vision_config": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    },
    "Gemma-2-2B": {
        "model_type": "gemma2",
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "sliding_window": 131_072,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "max_position_embeddings": 32_768,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 32_768,
    },
    "Nemotron-H": {
        "model_type": "nemotron_h",
        "hidden_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hybrid_override_pattern": "M-M*-M-E",
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
    },
    "GPT-2": {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024},
}


def kept(name: str) -> KvCache:
    kv_cache = read_kv_cache(text_part(PUBLISHED[name]))
    assert kv_cache is not None
    return kv_cache


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DeepSeek-V2-Lite", KvCache(27 * 2 * (512 + 64))),
        ("GLM-4.7-Flash", KvCache(47 * 2 * (512 + 64))),
        ("gpt-oss-20b", KvCache(12 * 4 * 8 * 64, ((128, 12 * 4 * 8 * 64),))),
        (
            "Qwen3-Next-80B-A3B",
            KvCache(12 * 4 * 2 * 256, (), 36 * (2 * 3 * (2 * 16 + 32) * 128 + 4 * 32 * 128 * 128)),
        ),
        ("Falcon-H1-0.5B", KvCache(36 * 4 * 2 * 64, (), 36 * (2 * 3 * (1536 + 2 * 128) + 4 * 24 * 64 * 128))),
        ("LFM2-1.2B", KvCache(6 * 4 * 8 * 64, (), 10 * 2 * 2 * 2048)),
        ("Mistral-Small-3.2", KvCache(40 * 4 * 8 * 128)),
        ("Qwen3-VL-4B", KvCache(36 * 4 * 8 * 128)),
        ("Gemma-2-2B", KvCache(13 * 4 * 4 * 256, ((4096, 13 * 4 * 4 * 256),))),
        ("Qwen2.5-7B", KvCache(28 * 4 * 4 * 128)),
        ("Mistral-7B-v0.1", KvCache(0, ((4096, 32 * 4 * 8 * 128),))),
        ("Nemotron-H", KvCache(4 * 8 * 128, (), 3 * (2 * 3 * (128 * 64 + 2 * 8 * 128) + 4 * 128 * 64 * 128))),
        ("GPT-2", KvCache(12 * 4 * 768)),
    ],
)
def test_each_kind_of_layer_keeps_its_own(name, expected):
    assert kept(name) == expected


@pytest.mark.parametrize(("name", "gib"), [("DeepSeek-V2-Lite", 4.75), ("GLM-4.7-Flash", 10.2), ("gpt-oss-20b", 3.05)])
def test_a_whole_context(name, gib):
    assert kept(name).sequence_bytes(PUBLISHED[name]["max_position_embeddings"]) / GIB == pytest.approx(gib, abs=0.03)


def test_a_window_keeps_itself_and_a_step():
    kv_cache = KvCache(1000, ((128, 10),), 7)
    assert kv_cache.sequence_bytes(1) == 1010 * BLOCK_TOKENS + 7
    filled = 128 + STEP_TOKENS + BLOCK_TOKENS
    assert kv_cache.sequence_bytes(128_000) == 1000 * 128_000 + 10 * filled + 7


def test_the_longest_sequence_is_the_last_that_fits():
    kv_cache = KvCache(1000, ((128, 10),), 7)
    size = kv_cache.sequence_bytes(6400)
    assert kv_cache.longest(size, 100_000) == 6400
    assert kv_cache.longest(size - 1, 100_000) == 6400 - BLOCK_TOKENS
    assert kv_cache.longest(size, 5000) == 5000
    assert kv_cache.longest(6, 5000) == -1
    assert KvCache(0, (), 7).longest(7, 5000) == 5000


@pytest.mark.parametrize("kind", ["sliding_attention", "something new"])
def test_a_layer_of_unknown_kind_counts_in_full(kind):
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64, "layer_types": [kind, "full_attention"]}
    assert read_kv_cache(config) == KvCache(2 * 4 * 4 * 64)


@pytest.mark.parametrize("name", ["DeepSeek-V2-Lite", "Qwen3-Next-80B-A3B", "Falcon-H1-0.5B"])
def test_vllm_allocates_what_is_counted(name: str, tmp_path: Path):
    """The pages that vLLM gives each kind of layer in these architectures, by its own classes."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import get_model_architecture
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, MLAAttentionSpec

    sizes = {"vocab_size": 1000, "intermediate_size": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **PUBLISHED[name], "torch_dtype": "bfloat16"}))
    arguments = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, max_model_len=4096)
    config = arguments.create_engine_config()
    model, parallel = config.model_config, config.parallel_config
    attention_spec = MLAAttentionSpec if model.use_mla else FullAttentionSpec
    page = attention_spec(
        block_size=BLOCK_TOKENS,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=torch.bfloat16,
    ).page_size_bytes
    counts = {kind: model.get_num_layers_by_block_type(parallel, kind) for kind in ("attention", "linear_attention")}
    num_states = counts["linear_attention"]
    if name == "Falcon-H1-0.5B":  # both in each layer, which vLLM counts as one
        counts["attention"] = num_states = model.get_num_layers(parallel)
    state = 0
    if num_states:
        architecture, _ = get_model_architecture(model)
        shapes = architecture.get_mamba_state_shape_from_config(config)
        state = MambaSpec(block_size=4096, shapes=tuple(shapes), dtypes=(torch.bfloat16, torch.float32)).page_size_bytes
    assert kept(name).sequence_bytes(BLOCK_TOKENS) == counts["attention"] * page + num_states * state
