"""Tiny models with random weights, in directories as Transformers saves them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.models.architecture import VOCAB_SIZE, Architecture
from benchmarks.models.questions import FIRST_WORD, token_ids
from ipex_vllm.low_bit.recipe import ROUTER

LOGIT_SPREAD = 1.0  # the logits' standard deviation: the two best are then seldom near each other
ROUTER_SPREAD = 4.0  # the same for experts: one that is chosen by a hair makes two answers of one model

# For a model that reads pictures: its words and a mark, as vLLM hands them on.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LINE_BREAKS = {"\n" * count: FIRST_WORD - 5 + count for count in (1, 2, 3, 4)}  # Gemma 3's processor writes some


def make(architecture: Architecture, folder: Path) -> None:
    """Write the model of an architecture into `folder`, in bfloat16, with what it needs to be asked."""
    import transformers

    config = getattr(transformers, architecture.config)(**settings(architecture))
    torch.manual_seed(0)
    model = getattr(transformers, architecture.model).from_config(config, dtype=torch.float32).eval()
    fill(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = tokenizer(architecture)
    words.save_pretrained(folder)
    if architecture.picture is not None:
        architecture.picture.processor(words).save_pretrained(folder)
        rename(folder / "model.safetensors", architecture.picture.weights)


def load(architecture: Architecture, folder: Path) -> Any:
    """What Transformers has of the model in `folder`, in float32."""
    import transformers

    # Not all of the other implementations of attention know soft caps and sinks.
    exact = {"dtype": torch.float32, "attn_implementation": "eager"}
    model_class = getattr(transformers, architecture.model)
    return model_class.from_pretrained(folder, **{**exact, **architecture.reference}).eval()


def tokenizer(architecture: Architecture) -> Any:
    """A word for each id; for another task than text, a text begins and ends with tokens of its own."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    picture = architecture.picture
    special = {"<unk>": 0, "<s>": 1, "</s>": 2} | ({} if picture is None else picture.tokens)
    taken = {**special, **LINE_BREAKS}
    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE) if index not in taken.values()} | taken
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    words.add_special_tokens([AddedToken(token, special=True) for token in special])
    has_kinds = architecture.config == "BertConfig"
    if architecture.task != "generate":
        pair = "<s> $A </s> $B:1 </s>:1" if has_kinds else "<s> $A </s> $B </s>"
        ends = [("<s>", 1), ("</s>", 2)]
        words.post_processor = processors.TemplateProcessing("<s> $A </s>", pair, special_tokens=ends)
    options: dict[str, Any] = {} if picture is None else dict(picture.names)
    if not has_kinds:
        options["model_input_names"] = ["input_ids", "attention_mask"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>", **options
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def rename(weights: Path, beginnings: dict[str, str]) -> None:
    """Begin tensors' names otherwise."""
    if not beginnings:
        return
    tensors = load_file(weights)
    for old, new in beginnings.items():
        assert any(name.startswith(old) for name in tensors), f"no tensor begins with {old}"
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: tensors[name] for name in tensors}
    save_file(tensors, weights, metadata={"format": "pt"})


def settings(architecture: Architecture) -> dict[str, Any]:
    if architecture.text is None:
        return architecture.settings
    # What is said of both, for the readers that look in either place.
    outer = {name: architecture.text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    outer["tie_word_embeddings"] = architecture.text["tie_word_embeddings"]
    return {**outer, **architecture.settings, "text_config": architecture.text}


def fill(model: Any) -> None:
    """Random weights that keep the size of what passes through, so that each part of a layer counts."""
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in ("A_log", "D", "dt_bias", "conv1d"):  # what a state space starts from is part of its design
            continue
        if "norm" in name.lower() and last == "weight":
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.dim() < 2:
            parameter.data = 0.2 * torch.randn_like(parameter)
        elif "embed" in name or "wte" in name or "wpe" in name:
            parameter.data = torch.randn_like(parameter)
        else:
            parameter.data = torch.randn_like(parameter) / math.sqrt(num_inputs(name, parameter))
            if ROUTER.search(name):
                parameter.data *= ROUTER_SPREAD
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.data = 0.2 * torch.randn_like(buffer)
    if head is not None:
        spread(model, head)


def num_inputs(name: str, parameter: torch.Tensor) -> int:
    return int(parameter[0].numel()) if parameter.dim() == 3 and "conv" in name else parameter.shape[-1]


def spread(model: Any, head: nn.Module) -> None:
    """Scale the head so that the logits differ."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([token_ids()])).logits
    head.weight.data = head.weight.data * (LOGIT_SPREAD / logits.std().item())
