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

from benchmarks import make_gguf
from benchmarks.make_gguf import Vocabulary

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
    "gpt-oss": (
        "GptOssConfig",
        {
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
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
        if parameter.dim() == 1 or each.endswith("_bias"):
            parameter.data += torch.randn(parameter.shape) * 0.1
        elif ".experts." in each:
            parameter.data = (torch.randn(parameter.shape) * 0.1).bfloat16().float()  # as they are served
    return model


def write(path: Path, architecture: str, model: Any, kind_of: Callable[[str], Kind] = lambda _: Kind.F32) -> None:
    """Write `model`, each matrix in the type that `kind_of` says for its GGUF name; a token for each byte, and `ab`.

    What the blocks stand for is put back into `model`.
    """
    letters = [*sorted(bytes_to_unicode().values()), "ab"]
    unused = [f"<{index}>" for index in range(len(letters), model.config.vocab_size)]
    vocabulary = Vocabulary([*letters, *unused], frozenset(unused), ["a b"], eos_id=model.config.vocab_size - 1)
    make_gguf.write(path, architecture, model, vocabulary, kind_of, to_blocks)


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
