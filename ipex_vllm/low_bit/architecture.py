"""What Transformers tells of a model before any of its weights is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def read_config(model_path: str) -> dict[str, Any]:
    """The config.json of a directory or a Hugging Face name; ValueError if there is none to read."""
    from transformers import PretrainedConfig

    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(model_path)[0]
    except OSError as error:
        raise ValueError(f"cannot read the configuration of {model_path}: {str(error).splitlines()[0]}") from error
    return config


def local_directory(model_path: str) -> Path:
    """The directory with the checkpoint's files; those of a Hugging Face name are downloaded."""
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model_path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
    )


def linear_shapes(source: Path) -> tuple[dict[str, tuple[int, int]], str | None]:
    """The (out_features, in_features) of the model's linear layers, by name, and the name of a tied output head.

    A tied head shares the embedding's weight, so that a checkpoint has none for it; it is not among the shapes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items() if linear is not head}
    return shapes, next((name for name, linear in linears.items() if linear is head), None)
