"""Tiny models as GGUF files, written with the `gguf` package, and what Transformers makes of the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCABULARY = 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": VOCABULARY - 1,
}
# By GGUF's names of architectures: a model that uses what is particular about each.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": (
        "Qwen2Config",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 6,  # of which the sixth attends to everything
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 32,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + index / 16 for index in range(16)],
                "long_factor": [1.0 + index for index in range(16)],
                "original_max_position_embeddings": 32,
            },
        },
    ),
}


def make_model(architecture: str, **changes: Any) -> Any:
    """The tiny model of an architecture, in float32, with norms and biases that are not what they begin with."""
    name, particular = MODELS[architecture]
    config = getattr(transformers, name)(**{**SHAPE, **particular, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for each, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn(parameter.shape) * 0.1
        elif ".experts." in each:
            parameter.data = (torch.randn(parameter.shape) * 0.1).bfloat16().float()  # as they are served
    return model


def write(path: Path, architecture: str, model: Any, kind_of: Callable[[str], Kind] = lambda _: Kind.F32) -> None:
    """Write `model` as llama.cpp would, each matrix in the type that `kind_of` says for its GGUF name.

    What the blocks stand for is put back into `model`.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, architecture, config)
    for name, parameter in tensors_of(architecture, model):
        weight = parameter.data
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        interleaves = architecture == "llama" and heads is not None
        stored = interleaved(weight, heads) if interleaves else weight
        if weight.dim() == 1 or "ffn_gate_inp" in name:
            # Gemma's norms multiply by one more than their weight.
            is_gemmas = architecture.startswith("gemma") and "norm" in name
            writer.add_tensor(name, (stored + is_gemmas).numpy())
            continue
        kind = kind_of(name)
        blocks = to_blocks(np.ascontiguousarray(stored.numpy()), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        values = torch.from_numpy(quants.dequantize(blocks, kind).astype(np.float32)).view(stored.shape)
        parameter.data.copy_(halved(values, heads) if interleaves else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.float32(rope[f"{length}_factor"]))
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    if getattr(config, "sliding_window", None) and architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    letters = sorted(bytes_to_unicode().values())
    letters.append("ab")
    tokens = [*letters, *(f"<{index}>" for index in range(len(letters), config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(letters) + [3] * (len(tokens) - len(letters)))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)


def tensors_of(architecture: str, model: Any) -> list[tuple[str, Any]]:
    """The parameters by GGUF's names."""
    (number,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tensors: list[tuple[str, Any]] = []
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            for part, piece in zip(("gate", "up"), parameter.data.chunk(2, dim=1), strict=True):
                tensors.append((f"blk.{layer}.ffn_{part}_exps.weight", torch.nn.Parameter(piece)))
        elif name.endswith("experts.down_proj"):
            tensors.append((f"blk.{layer}.ffn_down_exps.weight", parameter))
        else:
            tensors.append((names.get_name(name, try_suffixes=(".weight", ".bias")), parameter))
    return tensors


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key projection as llama.cpp's converter lays it: the two halves of a head take turns."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def halved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def to_blocks(weight: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
    """The weight in blocks; of a type that the package only reads, random ones of about the same spread."""
    try:
        return quants.quantize(weight, kind)
    except NotImplementedError:
        return random_blocks(weight.shape, kind)


def random_blocks(shape: tuple[int, ...], kind: Kind) -> np.ndarray[Any, Any]:
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(sum(shape))
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // size, num_bytes), dtype=np.uint8)
    # Where a block has its float16 scale, and that of its minima, as ggml's structures have them.
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind.name, (0,))
    scale = 1.0
    for _ in range(2):
        for place, ratio in zip(places, (1, 8), strict=False):
            number = np.float16(scale * ratio)
            blocks[..., place : place + 2] = np.frombuffer(number.tobytes(), dtype=np.uint8)
        packed = blocks.reshape(*shape[:-1], -1)
        scale = 0.1 / quants.dequantize(packed, kind).std()
    return packed
