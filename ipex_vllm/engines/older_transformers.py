"""Models that Transformers 5 wrote, made readable for Transformers 4, which the older environments have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def readable_model(model_path: str, folder: Path) -> str:
    """Return a directory below `folder` with links to a local model's files, and what Transformers 5 wrote rewritten.

    The original path is repeated below `folder`, because ipex-llm tells some models by theirs. A Hugging Face name is
    returned unchanged.
    """
    source = Path(model_path)
    if not source.is_dir():
        return model_path
    copy = Path(folder, *source.absolute().parts[1:])
    copy.mkdir(parents=True)
    for file in source.iterdir():
        (copy / file.name).symlink_to(file.absolute())
    template = source / "chat_template.jinja"
    for name, translate in (("config.json", older_config), ("tokenizer_config.json", older_tokenizer_config)):
        if not (source / name).is_file():
            continue
        content = json.loads((source / name).read_text(encoding="utf-8"))
        if name == "tokenizer_config.json" and template.is_file():
            content["chat_template"] = template.read_text(encoding="utf-8")
        (copy / name).unlink()
        (copy / name).write_text(json.dumps(translate(content), indent=2), encoding="utf-8")
    return str(copy)


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """Turn the config.json of Transformers 5 into that of Transformers 4."""
    config = dict(config)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.get("rope_parameters")
    if rope is not None and "rope_theta" in rope:  # else it has one entry for each kind of layer
        rope = dict(config.pop("rope_parameters"))
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                config[name] = rope.pop(name)
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = rope
    return config


def older_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """Turn the tokenizer_config.json of Transformers 5 into that of Transformers 4."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
