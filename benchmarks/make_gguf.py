"""Write a model directory as the GGUF file that llama.cpp opens, so that it can be measured on the same weights.

`python -m benchmarks.make_gguf --model DIR --out FILE.gguf --type q4_0`. Llama and Qwen3-MoE are what the benchmarks
need; the tests write more architectures by the same functions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from benchmarks.options import BenchmarkError, run_main

ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}
TYPES = {kind.name.lower(): kind for kind in (Kind.F32, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1)}
NORMAL, CONTROL = 1, 3

Blocks = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE tokenizer: its tokens in the order of their ids, and which of them are none of text's."""

    tokens: list[str]
    special: frozenset[str]
    merges: list[str]
    eos_id: int
    # How text is cut into words before pairs are merged, by llama.cpp's name for it.
    pre: str = "default"
    chat_template: str | None = None


def read_vocabulary(model: Path) -> Vocabulary:
    """The tokenizer of a model directory. Raises BenchmarkError where it is no byte-level BPE."""
    wrapped = AutoTokenizer.from_pretrained(model)
    whole = json.loads(wrapped.backend_tokenizer.to_str())
    state = whole["model"]
    if state["type"] != "BPE":
        raise BenchmarkError(f"{model}: its tokenizer is {state['type']}, and only BPE is written")
    vocabulary: dict[str, int] = wrapped.get_vocab()
    return Vocabulary(
        tokens=sorted(vocabulary, key=vocabulary.__getitem__),
        special=frozenset(wrapped.get_added_vocab()),
        merges=[" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]],
        eos_id=wrapped.eos_token_id,
        # GPT-2's way; SmolLM's takes each digit by itself besides.
        pre="smollm" if '"Digits"' in json.dumps(whole["pre_tokenizer"]) else "gpt-2",
        chat_template=wrapped.chat_template,
    )


def write(
    path: Path,
    architecture: str,
    model: Any,
    vocabulary: Vocabulary,
    kind_of: Callable[[str], Kind],
    to_blocks: Callable[[Blocks, Kind], Blocks] = quants.quantize,
) -> None:
    """Write `model` as llama.cpp would, each matrix in the type that `kind_of` says for its GGUF name.

    What the blocks stand for is put back into `model`, whose weights are thereby those of the file.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    _write_metadata(writer, architecture, config)
    _write_vocabulary(writer, vocabulary)
    for name, weight in _tensors_of(architecture, model):
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        interleaves = architecture == "llama" and heads > 0
        stored = (_interleaved(weight, heads) if interleaves else weight).float()
        if weight.dim() == 1 or "ffn_gate_inp" in name or name.endswith("_exps.bias"):
            # Gemma's norms multiply by one more than their weight.
            is_gemmas = architecture.startswith("gemma") and "norm" in name
            writer.add_tensor(name, (stored + is_gemmas).numpy())
            continue
        kind = kind_of(name)
        blocks = to_blocks(np.ascontiguousarray(stored.numpy()), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        values = torch.from_numpy(quants.dequantize(blocks, kind).astype(np.float32)).view(stored.shape)
        weight.copy_(_halved(values, heads) if interleaves else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
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
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32))
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    if getattr(config, "sliding_window", None) and architecture.startswith(("gemma", "gpt-oss")):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture in ("qwen3moe", "gpt-oss"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        sizes = (getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size"))
        writer.add_expert_feed_forward_length(next(filter(None, sizes)))


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([CONTROL if token in vocabulary.special else NORMAL for token in vocabulary.tokens])
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos_id)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _tensors_of(architecture: str, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters by GGUF's names; the halves of a stacked one are views of it."""
    (number,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else ""
        stem, end = (name[: -len("_bias")], "bias") if name.endswith("_proj_bias") else (name, "weight")
        if stem.endswith("experts.gate_up_proj"):
            for part, piece in zip(("gate", "up"), _gate_and_up(architecture, parameter.data, end), strict=True):
                yield f"blk.{layer}.ffn_{part}_exps.{end}", piece
        elif stem.endswith("experts.down_proj"):
            turned = architecture == "gpt-oss" and end == "weight"
            yield f"blk.{layer}.ffn_down_exps.{end}", parameter.data.mT if turned else parameter.data
        elif name.endswith("sinks"):
            yield f"blk.{layer}.attn_sinks.weight", parameter.data
        else:
            yield str(names.get_name(name, try_suffixes=(".weight", ".bias"))), parameter.data


def _gate_and_up(architecture: str, both: torch.Tensor, end: str) -> tuple[torch.Tensor, ...]:
    """The parts [experts, features, ...] of a stacked one: halves, but in gpt-oss in turn, inputs first."""
    if architecture != "gpt-oss":
        return both.chunk(2, dim=1)
    by_features = both.mT if end == "weight" else both
    return by_features[:, 0::2], by_features[:, 1::2]


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key projection as llama.cpp's converter lays it: the two halves of a head take turns."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def _halved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a model directory as a GGUF file.")
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json and *.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--type", choices=TYPES, default="q4_0", help="of the matrices; the head's is at least q8_0")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None:
        raise BenchmarkError(f"{model.config.model_type} is none of {', '.join(ARCHITECTURES)}")
    kind = TYPES[args.type]
    head = kind if kind not in (Kind.Q4_0, Kind.Q4_1) else Kind.Q8_0
    vocabulary = read_vocabulary(args.model)
    write(args.out, architecture, model, vocabulary, lambda name: head if name == "output.weight" else kind)
    print(args.out)
    return 0


if __name__ == "__main__":
    run_main(main)
