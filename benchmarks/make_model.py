"""Write a model directory with random weights, for tests and benchmarks of speed: Llama, or a mixture of experts.

    python -m benchmarks.make_model --shape tiny --out DIR
    python -m benchmarks.make_model --adapter-of DIR --out ANOTHER
    python -m benchmarks.make_model --first-layers-of DIR --live-layers 2 --out ANOTHER

The directory is what Hugging Face Transformers itself would save: config, bf16 safetensors, a byte-level BPE
tokenizer trained on this Python's standard library, a ChatML chat template and a generation config. The weights
are random (seeded), so the text is noise; the shapes, and so the cost of every step, are real. An adapter is of the
same kind, as PEFT would save it. Of a model with `--live-layers` the others cost what they cost and add nothing; its
first layers alone write the same text, which makes them the best of drafts for speculative decoding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 2048,
    },
    "llama-160m": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 32_000,
    },
    "llama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    },
}

# Mixtures of experts, by Transformers' `model_type`: real layers, so few that bf16 weights take at most 8 GiB.
MIXTURES: dict[str, dict[str, Any]] = {
    "tiny-moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 2048,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 5,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 32_000,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32_000,
    },
    "deepseek-v2": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "vocab_size": 32_000,
    },
}

# The layers that an adapter is usually made for: all but the embedding and the head.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def training_text(limit_bytes: int = 12_000_000) -> Iterator[str]:
    """Yield the standard library's source files, in a fixed order, up to `limit_bytes`."""
    total = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        total += len(text)
        yield text
        if total >= limit_bytes:
            return


def train_tokenizer(vocab_size: int, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` entries, with ChatML's special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(missing)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(shape: str, out: Path, seed: int = 0, live_layers: int | None = None) -> Path:
    """Write the model directory `out` for one of `SHAPES` or `MIXTURES` and return it; a complete one is kept.

    Of a Llama, layers behind the first `live_layers` add nothing to what passes through them.
    """
    if (out / "model.safetensors").exists():
        return out
    torch.manual_seed(seed)
    sizes = MIXTURES.get(shape) or {"model_type": "llama", **SHAPES[shape]}
    tokenizer = train_tokenizer(sizes["vocab_size"], training_text())
    config = AutoConfig.for_model(
        **sizes,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Larger than Llama's 0.02: logits far enough apart that greedy decoding has few ties.
        initializer_range=0.05,
        dtype="bfloat16",
    )
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default_dtype)
    for layer in [] if live_layers is None else model.model.layers[live_layers:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    # The weights come last: their file is what marks the directory as complete.
    model.save_pretrained(out, max_shard_size="100GB")
    return out


def first_layers(model: Path, out: Path, count: int) -> Path:
    """Write the first `count` layers of a model directory, with its embedding, norm and head; return `out`."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": count}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(model / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < count}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def make_adapter(model: Path, out: Path, rank: int = 16, targets: Collection[str] = ADAPTED, seed: int = 0) -> Path:
    """Write a random LoRA adapter of a model directory as PEFT does, large enough to change the text; return `out`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.split(".")[-2] in targets:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) * 0.05
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": [*targets], "bias": "none"}
    out.mkdir(parents=True, exist_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "adapter_model.safetensors")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model directory with random weights.")
    parser.add_argument("--shape", choices=[*SHAPES, *MIXTURES], default="tiny")
    parser.add_argument("--adapter-of", type=Path, help="write an adapter of this model directory instead")
    parser.add_argument("--first-layers-of", type=Path, help="write --live-layers of this model directory instead")
    parser.add_argument("--live-layers", type=int, help="layers that add something, of a Llama (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.adapter_of is not None:
        print(make_adapter(args.adapter_of, args.out, seed=args.seed))
    elif args.first_layers_of is not None:
        if args.live_layers is None:
            parser.error("--first-layers-of asks for --live-layers: how many")
        print(first_layers(args.first_layers_of, args.out, args.live_layers))
    else:
        print(make_model(args.shape, args.out, args.seed, args.live_layers))


if __name__ == "__main__":
    main()
