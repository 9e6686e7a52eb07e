"""A GGUF file's tokenizer, built by Transformers from the metadata, in the files that a model directory has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# How llama.cpp splits text before merging, by `tokenizer.ggml.pre`, where Transformers' table has no entry: each digit
# alone, then GPT-2's rule.
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r")
# A word that is a token is not merged from its letters, and text begins with BOS: llama.cpp knows that by these names.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and the files beside it. Raises ValueError for a tokenizer that cannot be built."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations import gguf

    given = gguf.GGUF_TOKENIZER_MAPPING["tokenizer"]
    described = {ours: metadata[f"tokenizer.{key}"] for key, ours in given.items() if f"tokenizer.{key}" in metadata}
    tokens = described.get("tokens")
    if not tokens:
        raise ValueError("its metadata has no tokenizer")
    special = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in SPECIAL.items()}
    if wrong := [f"{name} {index}" for name, index in special.items() if index is not None and index >= len(tokens)]:
        raise ValueError(f"its tokenizer has {len(tokens)} tokens, and names one behind them as {wrong[0]}")
    try:
        backend, _ = gguf.convert_gguf_tokenizer(metadata["general.architecture"], described)
    except Exception as error:  # whatever is raised over metadata that do not fit together
        raise ValueError(f"its tokenizer cannot be built: {' '.join(str(error).split())[:200]}") from error
    adjust(backend, metadata, tokens)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[index] for name, index in special.items() if index is not None},
    )
    tokenizer.save_pretrained(folder)


def adjust(backend: Any, metadata: dict[str, Any], tokens: list[str]) -> None:
    """What Transformers does not take from the metadata."""
    from tokenizers import pre_tokenizers, processors

    kind, model = metadata.get("tokenizer.ggml.pre"), metadata.get("tokenizer.ggml.model")
    if kind in DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if kind in WHOLE_WORDS:
        backend.model.ignore_merges = True
    begins = metadata.get("tokenizer.ggml.add_bos_token", model == "llama" or kind in WHOLE_WORDS)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if begins and bos is not None:
        token = tokens[bos]
        backend.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, bos)]
        )
    elif backend.post_processor is not None:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
