"""What Transformers tells of a model before any of its weights is read."""

from __future__ import annotations

from dataclasses import dataclass
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

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    folder = Path(snapshot_download(model_path, allow_patterns=patterns))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(model_path, allow_patterns=[*patterns, "*.bin"]))
    return folder


@dataclass(frozen=True)
class Linears:
    """A model's linear layers.

    Attributes:
        shapes: (out_features, in_features) of those whose weights a checkpoint has, by name.
        head: the output head's name, None without one.
        is_tied: whether the head shares the embedding's weight; it is not among the shapes then.
        others: the shapes of all other parameters, the linear layers' biases among them, by name.
    """

    shapes: dict[str, tuple[int, int]]
    head: str | None
    is_tied: bool
    others: dict[str, tuple[int, ...]]


def linear_layers(source: Path) -> Linears:
    """The linear layers of the model whose checkpoint is in the directory `source`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    output, is_tied = model.get_output_embeddings(), bool(model.config.tie_word_embeddings)
    head = next((name for name, linear in linears.items() if linear is output), None)
    shapes = {
        name: (linear.out_features, linear.in_features)
        for name, linear in linears.items()
        if not (is_tied and name == head)
    }
    weights = {f"{name}.weight" for name in linears}
    others = {name: tuple(each.shape) for name, each in model.named_parameters() if name not in weights}
    return Linears(shapes, head, is_tied and head is not None, others)
