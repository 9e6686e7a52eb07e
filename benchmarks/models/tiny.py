"""Tiny models with random weights, in directories as Transformers saves them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.models.zoo import VOCAB_SIZE, Architecture, Pictures
from ipex_vllm.low_bit.recipe import ROUTER

LOGIT_SPREAD = 1.0  # the logits' standard deviation: the two best are then seldom near each other
ROUTER_SPREAD = 4.0  # the same for experts: one that is chosen by a hair makes two answers of one model


def make(architecture: Architecture, folder: Path) -> Any:
    """Write the model of an architecture into `folder`, in bfloat16, and return it in float32."""
    import transformers

    config = getattr(transformers, architecture.config)(**settings(architecture))
    model_class = getattr(transformers, architecture.model)
    torch.manual_seed(0)
    model = model_class.from_config(config, dtype=torch.float32).eval()
    fill(model)
    if architecture.pictures is not None:  # that no picture is written: their tokens are never the likeliest
        model.get_output_embeddings().weight.data[[*architecture.pictures.tokens.values()]] = 0
    model.to(torch.bfloat16).save_pretrained(folder)
    if architecture.pictures is not None:
        name_towers(folder)
        processor(architecture.pictures).save_pretrained(folder)
    elif architecture.text is not None:  # vLLM's readers of images do not start without
        tokenizer({}, {}).save_pretrained(folder)
    # Not all of the other implementations know soft caps and sinks.
    exact = {"dtype": torch.float32, "attn_implementation": "eager"}
    return model_class.from_pretrained(folder, **{**exact, **architecture.reference}).eval()


def name_towers(folder: Path) -> None:
    """Name vision towers as published checkpoints do: this Transformers writes shorter names, unknown to vLLM."""
    path = folder / "model.safetensors"
    parts = ("vision_tower.", "vision_tower.vision_model.")
    weights = {name.replace(*parts): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def tokenizer(special: Mapping[str, int], names: Mapping[str, str]) -> Any:
    """A word for each id, but for those of the `special` tokens, of which some have `names`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE) if index not in special.values()}
    words = Tokenizer(models.WordLevel({**vocabulary, **special}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "extra_special_tokens": dict(names)}
    made = PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    made.add_tokens(list(special), special_tokens=True)
    return made


def processor(pictures: Pictures) -> Any:
    """Reads texts of such words, and pictures."""
    import transformers

    image_processor = getattr(transformers, pictures.image_processor)(**pictures.settings)
    parts = {"image_processor": image_processor, "tokenizer": tokenizer(pictures.tokens, pictures.names)}
    processor_class = getattr(transformers, pictures.processor)
    if "video_processor" in inspect.signature(processor_class).parameters:
        parts["video_processor"] = transformers.Qwen2VLVideoProcessor()
    return processor_class(**parts, **pictures.of_processor)


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
        logits = model(input_ids=token_ids(model.config).unsqueeze(0)).logits
    head.weight.data = head.weight.data * (LOGIT_SPREAD / logits.std().item())


def token_ids(config: Any, length: int = 48) -> torch.Tensor:
    """int64 [length], none of them special."""
    size = config.get_text_config().vocab_size
    return torch.randint(16, size, (length,), generator=torch.Generator().manual_seed(1))
