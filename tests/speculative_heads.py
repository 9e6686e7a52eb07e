"""Tiny random heads that draft, as vLLM reads them: one of EAGLE-3's, and one for several tokens at once (MTP)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.models import tiny
from benchmarks.models.zoo import ARCHITECTURES

Sizes = dict[str, tuple[int, ...]]
SPREAD = 0.02


def eagle3_head(model: Path, folder: Path) -> Path:
    """A head for a Llama-shaped `model`: one layer that reads the token and three of the model's hidden states."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    sizes: Sizes = {
        "fc.weight": (hidden, 3 * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
        **layer("midlayer", config, inputs=2 * hidden, heads=heads),
        "midlayer.hidden_norm.weight": (hidden,),
    }
    folder.mkdir(parents=True)
    changes = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "draft_vocab_size": config["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],  # vLLM's own choice asks for more layers
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(random_tensors(sizes), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def model_with_mtp_head(folder: Path) -> Path:
    """The tiny Ernie 4.5 with experts, whose checkpoints bring such a head."""
    tiny.make(ARCHITECTURES["ernie4.5-moe"], folder)
    config = json.loads((folder / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    sizes: Sizes = {
        "model.mtp_emb_norm.0.weight": (hidden,),
        "model.mtp_hidden_norm.0.weight": (hidden,),
        "model.mtp_linear_proj.0.weight": (hidden, 2 * hidden),
        **layer("model.mtp_block.0", config, inputs=hidden, heads=heads),
    }
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    weights = load_file(folder / "model.safetensors") | random_tensors(sizes)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def layer(name: str, config: dict[str, int], inputs: int, heads: int) -> Sizes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {
        f"{name}.input_layernorm.weight": (hidden,),
        f"{name}.post_attention_layernorm.weight": (hidden,),
        f"{name}.self_attn.q_proj.weight": (heads, inputs),
        f"{name}.self_attn.k_proj.weight": (keys, inputs),
        f"{name}.self_attn.v_proj.weight": (keys, inputs),
        f"{name}.self_attn.o_proj.weight": (hidden, heads),
        f"{name}.mlp.gate_proj.weight": (inner, hidden),
        f"{name}.mlp.up_proj.weight": (inner, hidden),
        f"{name}.mlp.down_proj.weight": (hidden, inner),
    }


def random_tensors(sizes: Sizes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(size) if len(size) == 1 else SPREAD * torch.randn(size, generator=generator)
        for name, size in sizes.items()
    }
