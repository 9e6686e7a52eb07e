"""What a model keeps of a sequence while it generates, from its configuration. Standard library only.

Each kind of layer keeps something else: full attention the keys and values of every token, a sliding window those of
the last ones, multi-head latent attention (MLA) one compressed vector a token, state-space and linear attention a state
of one size. What vLLM allocates is the measure; tests/machine/test_kv_cache.py asks it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

BLOCK_TOKENS = 128  # vLLM's blocks on CPUs; a sequence takes whole ones
STEP_TOKENS = 2048  # of a prompt that vLLM computes at once: a window's layer holds them beside the window

# Where a model of several parts keeps the configuration of the one that writes text.
TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")

# Configurations' names of layers. What has no row counts as full attention, which keeps the most.
LAYER_KINDS = {
    "sliding_attention": "window",
    "chunked_attention": "window",
    "linear_attention": "linear",
    "mamba": "mamba",
    "mamba2": "mamba",
    "conv": "conv",
    "mlp": "nothing",
    "moe": "nothing",
}
PATTERN_KINDS = {"M": "mamba", "*": "full", "-": "nothing", "E": "nothing"}  # of Nemotron-H

# Every n-th layer is a full one and the others have a window, for configurations that do not say.
WINDOW_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}

MAMBA_HEADS = (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"), ("num_heads", "head_dim"))


@dataclass(frozen=True)
class KvCache:
    """What all layers together keep of one sequence, in bytes, with elements of 16 bits.

    Attributes:
        token_bytes: of each token, in the layers that see all tokens.
        windows: of the layers that see the last tokens only: how many of them, and the bytes of each.
        state_bytes: of the sequence, whatever its length.
    """

    token_bytes: int
    windows: tuple[tuple[int, int], ...] = ()
    state_bytes: int = 0

    def sequence_bytes(self, tokens: int) -> int:
        """Of a sequence of `tokens`, in whole blocks."""
        kept = self.token_bytes * _in_blocks(tokens)
        for window, token_bytes in self.windows:
            # vLLM keeps a block more than window and step fill: they need not begin with one.
            kept += token_bytes * min(_in_blocks(window + STEP_TOKENS) + BLOCK_TOKENS, _in_blocks(tokens))
        return kept + self.state_bytes

    @property
    def block_bytes(self) -> int:
        """Of one block, of which vLLM keeps one for itself."""
        return BLOCK_TOKENS * (self.token_bytes + sum(token_bytes for _, token_bytes in self.windows))

    def longest(self, size: int, limit: int) -> int:
        """The tokens of the longest sequence that `size` bytes hold, at most `limit`; below 0 if they hold none."""
        return bisect_right(range(limit + 1), size, key=self.sequence_bytes) - 1

    def plus(self, other: KvCache) -> KvCache:
        """Of two models that read the same sequence."""
        return KvCache(
            self.token_bytes + other.token_bytes,
            self.windows + other.windows,
            self.state_bytes + other.state_bytes,
        )

    def times(self, factor: float) -> KvCache:
        """With elements, or a share of the layers, of so many times the size."""
        windows = tuple((window, int(token_bytes * factor)) for window, token_bytes in self.windows)
        return KvCache(int(self.token_bytes * factor), windows, int(self.state_bytes * factor))


def text_part(config: Config) -> dict[str, Any]:
    """The configuration of the part that writes text; what it does not say, the whole may."""
    for name in TEXT_PARTS:
        if isinstance(part := config.get(name), dict):
            return {**{key: value for key, value in config.items() if key != name}, **text_part(part)}
    return dict(config)


def read_kv_cache(config: Config) -> KvCache | None:
    """What a model with this `text_part` keeps; None where it does not tell enough."""
    num_layers = number(config, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    if num_layers is None:
        return None
    kinds = _layer_kinds(config, num_layers)
    # The last of Gemma's small models read what earlier layers keep.
    kinds = kinds[: num_layers - (number(config, "num_kv_shared_layers") or 0)]
    window = number(config, "attention_chunk_size" if "chunked_attention" in _named(config) else "sliding_window")
    state_bytes, token_bytes, window_bytes = 0, 0, 0
    for kind, count in Counter(kinds).items():
        if kind in ("full", "window", "full and mamba"):
            layer_bytes = _attention_bytes(config, is_window=kind == "window")
            if layer_bytes is None:
                return None
            token_bytes += 0 if kind == "window" else layer_bytes * count
            window_bytes += layer_bytes * count if kind == "window" else 0
        if kind in ("linear", "mamba", "full and mamba", "conv"):
            layer_bytes = _state_bytes(config, kind)
            if layer_bytes is None:
                return None
            state_bytes += layer_bytes * count
    windows = ((window or 0, window_bytes),) if window_bytes else ()
    return KvCache(token_bytes, windows, state_bytes)


def _named(config: Config) -> list[str]:
    return config.get("layer_types") or config.get("layers_block_type") or []


def _layer_kinds(config: Config, num_layers: int) -> list[str]:
    """Of each layer: full, window, linear, mamba, "full and mamba", conv, or nothing."""
    layers, model_type = range(num_layers), config.get("model_type")
    window = number(config, "sliding_window") if config.get("use_sliding_window", True) else None
    if model_type == "falcon_h1":
        return ["full and mamba"] * num_layers
    if model_type in ("mamba", "mamba2", "falcon_mamba"):
        return ["mamba"] * num_layers
    if names := _named(config):
        kinds = [LAYER_KINDS.get(name, "full") for name in names]
        has_window = window is not None or "chunked_attention" in names
        return [kind if kind != "window" or has_window else "full" for kind in kinds]
    if pattern := config.get("hybrid_override_pattern"):
        return [PATTERN_KINDS.get(letter, "full") for letter in pattern]
    if (interval := number(config, "full_attention_interval")) is not None:  # Qwen3-Next
        return ["full" if (layer + 1) % interval == 0 else "linear" for layer in layers]
    if "full_attn_idxs" in config:  # the first LFM2
        return ["full" if layer in config["full_attn_idxs"] else "conv" for layer in layers]
    if "attn_layer_indices" in config:  # Bamba
        return ["full" if layer in (config["attn_layer_indices"] or ()) else "mamba" for layer in layers]
    if (period := number(config, "attn_layer_period")) is not None:  # Jamba
        return ["full" if layer % period == config.get("attn_layer_offset") else "mamba" for layer in layers]
    if window is None:
        return ["full"] * num_layers
    if pattern := number(config, "sliding_window_pattern") or WINDOW_PATTERNS.get(str(model_type)):
        return ["full" if (layer + 1) % pattern == 0 else "window" for layer in layers]
    first = number(config, "max_window_layers") or 0 if config.get("use_sliding_window") else 0  # Qwen2
    return ["full" if layer < first else "window" for layer in layers]


def _attention_bytes(config: Config, is_window: bool) -> int | None:
    """Of one token in one layer of attention."""
    latent = number(config, "kv_lora_rank")
    if latent is not None and config.get("model_type") != "minicpm3":  # whose latent vLLM expands
        return 2 * (latent + (number(config, "qk_rope_head_dim") or 0))
    hidden = number(config, "hidden_size", "n_embd", "d_model")
    heads = number(config, "num_attention_heads", "n_head", "n_heads")
    kv_heads = number(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
    if config.get("multi_query") is True and kv_heads is None:
        kv_heads = 1
    head_dim = number(config, "head_dim", "attention_head_dim", "kv_channels")
    if not is_window and (global_dim := number(config, "global_head_dim")) is not None:  # Gemma 4
        head_dim = global_dim
        kv_heads = number(config, "num_global_key_value_heads") or kv_heads
    if head_dim is None and hidden is not None and heads:
        head_dim = hidden // heads
    kv_heads = kv_heads or heads
    if head_dim is None or kv_heads is None:
        return None
    return 2 * kv_heads * (head_dim + (number(config, "v_head_dim") or head_dim))


def _state_bytes(config: Config, kind: str) -> int | None:
    """Of one sequence in one layer: what a convolution looks back at in 16 bits, a recurrent state in 32."""
    hidden = number(config, "hidden_size", "d_model") or 0
    if kind == "conv":  # LFM2
        kernel = number(config, "conv_L_cache")
        return None if kernel is None else 2 * (kernel - 1) * (number(config, "conv_dim") or hidden)
    if kind == "linear":  # the gated delta net of Qwen3-Next and Qwen3.5
        sizes = [number(config, f"linear_{name}") for name in ("num_key_heads", "key_head_dim")]
        sizes += [number(config, f"linear_{name}") for name in ("num_value_heads", "value_head_dim", "conv_kernel_dim")]
        if None in sizes:
            return None
        key_heads, key_dim, value_heads, value_dim, kernel = (size or 0 for size in sizes)
        convolved = 2 * key_heads * key_dim + value_heads * value_dim
        return 2 * (kernel - 1) * convolved + 4 * value_heads * value_dim * key_dim
    state = number(config, "mamba_d_state", "ssm_state_size", "state_size")
    if state is None:
        return None
    kernel = number(config, "mamba_d_conv", "conv_kernel", "conv_kernel_size") or 4
    heads = number(config, "mamba_n_heads", "mamba_num_heads", "num_heads")  # of Mamba 2
    pairs = ((number(config, count), number(config, size)) for count, size in MAMBA_HEADS)
    inner = next((count * size for count, size in pairs if count is not None and size is not None), None)
    if inner is None:
        inner = number(config, "mamba_d_ssm") or (number(config, "mamba_expand", "expand") or 2) * hidden
    groups = number(config, "mamba_n_groups", "n_groups") or 1
    convolved = inner if heads is None else inner + 2 * groups * state
    return 2 * (kernel - 1) * convolved + 4 * inner * state


def number(config: Config, *names: str) -> int | None:
    """The first of these fields that is a whole number."""
    return next((config[name] for name in names if type(config.get(name)) is int), None)


def _in_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
