"""Trains the demo model: `python -m training.train --data DIR --out DIR`, on a GPU in minutes.

--data is what training.build_dataset wrote. --out gets a checkpoint that Transformers and vLLM load, and loss.csv.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from training.build_dataset import END, FORBIDDEN_NAMES, PAD, START, read_facts, render
from training.conversations import Speaker
from training.model import Llama, Mask, Shape, in_sym_int4
from training.questions import Knowledge

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
NUM_SHARDS = 16

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Options:
    """The command line; each default is what the shipped weights were trained with."""

    data: Path
    out: Path
    device: str = "cuda"
    seed: int = 1
    steps: int = 4500
    rows_per_step: int = 64
    row_length: int = 2048
    num_rows: int = 100_000
    peak_lr: float = 2e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1


def make_rows(job: tuple[Path, int, int, int]) -> Rows:
    """Rows full of whole conversations: tokens, targets and conversation numbers, each [num_rows, row_length].

    A target is the next token where an answer or its end is due, else -100. Padding has the conversation number -1.
    """
    data, seed, num_rows, row_length = job
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    speaker = Speaker(Knowledge(read_facts(data / "facts.jsonl")), seed, FORBIDDEN_NAMES)
    texts = (render(conversation.messages()) for conversation in speaker.conversations())
    return pack(tokenizer, texts, num_rows, row_length)


def pack(tokenizer: Tokenizer, texts: Iterator[str], num_rows: int, row_length: int) -> Rows:
    pad, start, end = (tokenizer.token_to_id(token) for token in (PAD, START, END))
    assistant = tokenizer.token_to_id("assistant")
    tokens = np.full((num_rows, row_length), pad, np.int16)
    targets = np.full((num_rows, row_length), -100, np.int16)
    numbers = np.full((num_rows, row_length), -1, np.int16)
    row, column, number = 0, 0, 0
    while row < num_rows:
        batch = [text for _, text in zip(range(1000), texts, strict=False)]
        for encoding in tokenizer.encode_batch_fast(batch):
            ids = np.array(encoding.ids, np.int16)
            if len(ids) > row_length:
                continue
            if column + len(ids) > row_length:
                row, column, number = row + 1, 0, 0
                if row == num_rows:
                    return tokens, targets, numbers
            span = slice(column, column + len(ids))
            tokens[row, span], numbers[row, span] = ids, number
            targets[row, span] = answer_targets(ids, start, end, assistant)
            column, number = column + len(ids), number + 1
        if len(batch) < 1000:
            break
    return tokens, targets, numbers


def answer_targets(ids: np.ndarray, start: int, end: int, assistant: int) -> np.ndarray:
    """The next token of each position where that is part of an answer, up to and with its END, else -100."""
    targets = np.full(len(ids), -100, np.int16)
    for begin in np.flatnonzero(ids == start):
        if ids[begin + 1] == assistant:
            stop = begin + int(np.flatnonzero(ids[begin:] == end)[0])
            targets[begin + 2 : stop] = ids[begin + 3 : stop + 1]
    return targets


def training_rows(options: Options) -> list[Tensor]:
    """The training set, drawn by as many processes as there are cores; their number does not change the rows."""
    per_shard = math.ceil(options.num_rows / NUM_SHARDS)
    jobs = [(options.data, options.seed * 1000 + i, per_shard, options.row_length) for i in range(NUM_SHARDS)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(min(NUM_SHARDS, os.cpu_count() or 1)) as pool:
        parts = pool.map(make_rows, jobs, chunksize=1)
    return [torch.from_numpy(np.concatenate(arrays)).to(options.device) for arrays in zip(*parts, strict=True)]


def held_out_rows(options: Options) -> list[Tensor]:
    """The evaluation's held-out phrasings, with their answers, as one batch."""
    tokenizer = Tokenizer.from_file(str(options.data / "tokenizer.json"))
    rows = [json.loads(line) for line in (options.data / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = (
        render([*row["messages"], {"role": "assistant", "content": row["answer"]}])
        for row in rows
        if row["section"] == "held_out"
    )
    packed = pack(tokenizer, texts, options.rows_per_step, options.row_length)
    return [torch.from_numpy(array).to(options.device) for array in packed]


def conversation_mask(numbers: Tensor) -> Mask:
    """Causal attention within each conversation; numbers is [rows, row_length]."""
    rows, length = numbers.shape
    if numbers.device.type == "cpu":
        return (numbers[:, :, None] == numbers[:, None, :]).tril()[:, None]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (numbers[b, q] == numbers[b, k])

    return create_block_mask(visible, rows, None, length, length, device=numbers.device)


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < options.warmup_steps:
        return options.peak_lr * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


def train(options: Options) -> Llama:
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    began = time.monotonic()
    data = training_rows(options)
    held_out = held_out_rows(options)
    print(f"{len(data[0])} rows of {options.row_length} tokens in {time.monotonic() - began:.0f} s", flush=True)

    shape = Shape(context=options.row_length)
    model = Llama(shape).to(options.device)
    on_gpu = options.device != "cpu"
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": options.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=options.peak_lr,
        betas=(0.9, 0.95),
        fused=on_gpu,
    )
    compiled = torch.compile(model, dynamic=False, disable=not on_gpu)
    make_mask = torch.compile(conversation_mask, dynamic=False, disable=not on_gpu)

    def loss_of(batch: list[Tensor]) -> Tensor:
        tokens, targets, numbers = batch
        with torch.autocast(options.device, torch.bfloat16):
            return compiled(tokens.long(), targets.long(), make_mask(numbers))

    generator = torch.Generator().manual_seed(options.seed)
    order = torch.empty(0, dtype=torch.long)
    with (options.out / "loss.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "tokens", "learning_rate", "train_loss", "held_out_loss", "held_out_loss_sym_int4"])
        for step in range(options.steps):
            if len(order) < options.rows_per_step:
                order = torch.randperm(len(data[0]), generator=generator)
            chosen, order = order[: options.rows_per_step].to(options.device), order[options.rows_per_step :]
            lr = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of([array[chosen] for array in data])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 50 == 0 or step == options.steps - 1:
                exact = loss_of(held_out).item()
                with in_sym_int4(model):
                    four_bit = loss_of(held_out).item()
                seen = (step + 1) * options.rows_per_step * options.row_length
                log.writerow([step, seen, f"{lr:.6f}", f"{loss.item():.5f}", f"{exact:.5f}", f"{four_bit:.5f}"])
                file.flush()
                if step % 200 == 0 or step == options.steps - 1:
                    print(
                        f"step {step}, {time.monotonic() - began:.0f} s: train {loss.item():.4f}, "
                        f"held-out phrasings {exact:.4f}, the same in sym_int4 {four_bit:.4f}",
                        flush=True,
                    )
    return model


def save(model: Llama, shape: Shape, data: Path, out: Path) -> None:
    """Writes a checkpoint in Transformers' layout, with the keys that both its version 4 and 5 read."""
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    tokenizer.save(str(out / "tokenizer.json"))
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pad_token_id": pad,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    tokenizer_config = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in (PAD, START, END)
        },
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": shape.context,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {"eos_token_id": end, "pad_token_id": pad, "do_sample": False}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in fields(Options):
        required = option.name in ("data", "out")
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=option.type,  # type: ignore[arg-type]
            required=required,
            default=None if required else option.default,
        )
    options = Options(**vars(parser.parse_args()))
    options.out.mkdir(parents=True, exist_ok=True)
    save(train(options), Shape(context=options.row_length), options.data, options.out)


if __name__ == "__main__":
    main()
