"""A GGUF file's metadata as the config.json that Transformers and vLLM read.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp keeps in its code instead of the file
(Gemma's scale of queries, for one) is taken from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ipex_vllm.machine.gguf import GgufHeader

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gpt-oss": ("gpt_oss", "GptOssForCausalLM"),
}
# The depth of the one model of each generation whose queries are scaled by the mean width of a head instead.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
GEMMA3_LOCAL_ROPE_THETA = 10000.0
ROPE_TOLERANCE = 1e-4


def config_of(
    header: GgufHeader, rope_freqs: Sequence[float] = (), rope_factors: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """The configuration of the model.

    Args:
        rope_freqs: what the tensor `rope_freqs.weight` holds, if there is one: Llama 3.1's divisors of frequencies.
        rope_factors: "short_factor" and "long_factor" of LongRoPE, likewise.

    Raises ValueError, in one line, for an architecture that is not read, or metadata that is missing.
    """
    architecture = header.metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"models of architecture {architecture!r} are not read; {', '.join(ARCHITECTURES)} are")
    values = _Values(header.metadata, architecture)
    if architecture == "llama" and values.get("expert_count"):
        raise ValueError("llama with experts (Mixtral) is not read")
    if "token_embd.weight" not in header.tensors:
        raise ValueError("it holds no token_embd.weight: no language model, or one without its weights")
    model_type, name = ARCHITECTURES[architecture]
    heads, hidden = values["attention.head_count"], values["embedding_length"]
    head_dim = values.get("attention.key_length") or hidden // heads
    layers = values["block_count"]
    config = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": values["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "rms_norm_eps": values["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": values["context_length"],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "bfloat16",
        "rope_parameters": _rope(values, rope_freqs, rope_factors),
    }
    for token in ("bos", "eos"):
        config[f"{token}_token_id"] = header.metadata.get(f"tokenizer.ggml.{token}_token_id")
    config["pad_token_id"] = None
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if architecture == "qwen3moe":
        config |= {
            "num_experts": values["expert_count"],
            "num_experts_per_tok": values["expert_used_count"],
            "moe_intermediate_size": values["expert_feed_forward_length"],
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if architecture == "gpt-oss":
        # What is not in the file is the same in all models of this architecture.
        rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
        config |= {
            "intermediate_size": values["expert_feed_forward_length"],
            "num_local_experts": values["expert_count"],
            "num_experts_per_tok": values["expert_used_count"],
            "sliding_window": values["attention.sliding_window"],
            "rope_parameters": config["rope_parameters"] | rope,
        }
    if architecture in GEMMA_27B_LAYERS:
        is_27b = layers == GEMMA_27B_LAYERS[architecture]
        config |= {
            "query_pre_attn_scalar": hidden // heads if is_27b else head_dim,
            "sliding_window": values["attention.sliding_window"],
            "attn_logit_softcapping": values.get("attn_logit_softcapping"),
            "final_logit_softcapping": values.get("final_logit_softcapping"),
            "hidden_activation": "gelu_pytorch_tanh",
        }
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_ROPE_THETA}
        config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    if architecture == "phi3":
        config["sliding_window"] = values.get("attention.sliding_window") or None
        original = values.get("rope.scaling.original_context_length")
        config["original_max_position_embeddings"] = original or values["context_length"]
        rotated = values.get("rope.dimension_count") or head_dim
        if rotated != head_dim:
            config["partial_rotary_factor"] = config["rope_parameters"]["partial_rotary_factor"] = rotated / head_dim
    return config


class _Values:
    """The metadata of an architecture; a missing key is told by its whole name."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.architecture = architecture

    def get(self, key: str) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, list):
            raise ValueError(f"{self.architecture}.{key} differs from layer to layer, which is not read")
        return value

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"its metadata says {value!r} for {self.architecture}.{key}")
        return value


def _rope(values: _Values, freqs: Sequence[float], factors: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": values.get("rope.freq_base") or 10000.0}
    kind, factor = values.get("rope.scaling.type"), values.get("rope.scaling.factor")
    if factors:
        original = values["rope.scaling.original_context_length"]
        return rope | {"rope_type": "longrope", "original_max_position_embeddings": original, **factors}
    if freqs:
        return rope | llama3_parameters(freqs, rope["rope_theta"])
    if kind in (None, "none") or not factor or factor == 1.0:
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = values["rope.scaling.original_context_length"]
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ValueError(f"rope scaling of type {kind} is not read")


def llama3_parameters(divisors: Sequence[float], theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling from the divisors that it gives, which is what llama.cpp keeps of it.

    A frequency keeps its value, is divided by `factor`, or by something between:
    1 / ((1 - smooth) / factor + smooth) with smooth = (original / wavelength - low) / (high - low). That is a straight
    line over 1 / wavelength, so the divisors between tell the three numbers but for a common factor: low = 1.

    Raises ValueError where no such numbers give these divisors.
    """
    factor = round(max(divisors), 4)
    inverse = [theta ** (-index / len(divisors)) / (2 * math.pi) for index in range(len(divisors))]
    between = [
        (x, (1 / divisor - 1 / factor) / (1 - 1 / factor))
        for x, divisor in zip(inverse, divisors, strict=True)
        if 1 + ROPE_TOLERANCE < divisor < factor * (1 - ROPE_TOLERANCE)
    ]
    high, original = 4.0, 8192.0  # Meta's, where fewer than two divisors tell
    if len(between) > 1:
        (x0, y0), (x1, y1) = between[0], between[-1]
        slope = (y1 - y0) / (x1 - x0)
        intercept = y0 - slope * x0
        high = 1 - 1 / intercept if intercept < 0 else math.inf
        original = slope * (high - 1)

    def divisor(x: float) -> float:
        smooth = min(max((original * x - 1) / (high - 1), 0.0), 1.0)
        return 1 / ((1 - smooth) / factor + smooth)

    if not all(abs(divisor(x) / wanted - 1) < 10 * ROPE_TOLERANCE for x, wanted in zip(inverse, divisors, strict=True)):
        raise ValueError("its rope_freqs.weight is none that Llama 3.1's scaling gives, which is not read")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": round(high, 3),
        "original_max_position_embeddings": round(original),
    }
