"""What a row of the matrix is, and what many rows have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

VOCAB_SIZE = 512

BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,  # with the rotary part the one size that vLLM takes
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
}
ALTERNATING = ["sliding_attention", "full_attention"]
LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
ALL_FORMATS = ("float", "sym_int8", "sym_int4")

# What a model is asked for: the log probabilities of tokens, a vector for a text, or a number for a pair of texts.
Task = Literal["generate", "embed", "score"]


@dataclass(frozen=True)
class Picture:
    """How a model is asked with a picture.

    Attributes:
        mark: what stands for a picture in the text of a question.
        tokens: the tokenizer's special tokens, and their ids.
        processor: makes Transformers' processor from the tokenizer.
        names: of special tokens, by the attributes under which the processor looks for them at the tokenizer.
        weights: what the beginning of a tensor's name becomes in the checkpoint.
    """

    mark: str
    tokens: dict[str, int]
    processor: Callable[[Any], Any]
    names: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        config: the name of Transformers' configuration class.
        structure: what sets it apart, in the table's words.
        settings: the configuration's fields beside or in place of `BASE`'s.
        text: those of the language model inside a model that takes images, in place of `BASE`'s; None for text alone.
        model: Transformers' class that answers for it.
        task: what it is asked for.
        picture: how it is asked with a picture; None where it is asked with text.
        dtype: what it is served in where nothing quantizes.
        reference: the arguments in which Transformers has to differ from what the model's file says, to compute what
            its makers do.
        known: of each format, "float" among them, that is known not to hold, why.
        flags: the worker's, that it needs.
    """

    config: str
    structure: str
    settings: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    model: str = "AutoModelForCausalLM"
    task: Task = "generate"
    picture: Picture | None = None
    dtype: str = "float32"
    reference: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    known: dict[str, str] = field(default_factory=dict)


def text_only(config: str, structure: str, reference: Any = (), known: Any = (), **settings: Any) -> Architecture:
    return Architecture(config, structure, {**BASE, **settings}, reference=dict(reference), known=dict(known))


def latent(config: str, structure: str, known: Any = (), **settings: Any) -> Architecture:
    # On CPUs with AMX vLLM would take an implementation that computes in 16 bits alone, also in float32.
    flags = ("--attention-backend", "CPU_MLA")
    return Architecture(config, structure, {**BASE, **MLA, **settings}, known=dict(known), flags=flags)
