"""How much text one token can stand for, where a tokenizer tells: then a prompt's length alone can refuse it.

It tells where no text is swallowed: every byte or character ends up in a token, because the alphabet is all bytes
(byte-level BPE, as GPT-2's, Llama 3's and Qwen's) or falls back to them (SentencePiece's, as Llama 2's), and nothing
before the model removes any. Field names are those of the tokenizers library's JSON form. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# Composing (NFC) makes at most four characters one.
SHRINKING = {"NFC": 4}
KEEPING_NORMALIZERS = ("Prepend", "ByteLevel", "Lowercase")
KEEPING_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits")
SPLITTERS = ("Split", "Punctuation")  # of which one behaviour drops what it splits at
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def longest_token(tokenizer: Any) -> int | None:
    """The most characters of text that a token of a Hugging Face tokenizer stands for; None where that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else longest_in(json.loads(backend.to_str()))


def longest_in(tokenizer: Mapping[str, Any]) -> int | None:
    """The same for a tokenizer's JSON form."""
    added = tokenizer["added_tokens"]
    normalizers = list(_steps(tokenizer["normalizer"], "normalizers"))
    pre_tokenizers = list(_steps(tokenizer["pre_tokenizer"], "pretokenizers"))
    is_byte_level = any(step["type"] == "ByteLevel" for step in normalizers + pre_tokenizers)
    is_keeping = (
        tokenizer["truncation"] is None
        and not any(token["lstrip"] or token["rstrip"] for token in added)  # which take white space of any length
        and all(_keeps(step) for step in normalizers)
        and all(_splits_only(step) for step in pre_tokenizers)
        and _has_all_bytes(tokenizer["model"], is_byte_level)
    )
    if not is_keeping:
        return None
    longest = max(map(len, (*_vocabulary(tokenizer["model"]), *(token["content"] for token in added))))
    for step in normalizers:
        longest *= SHRINKING.get(step["type"], 1)
    return longest


def _steps(step: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[name]:
            yield from _steps(part, name)
    else:
        yield step


def _keeps(normalizer: Mapping[str, Any]) -> bool:
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")  # what an expression replaces can be of any length
        return pattern is not None and len(pattern) <= len(normalizer["content"])
    return normalizer["type"] in SHRINKING or normalizer["type"] in KEEPING_NORMALIZERS


def _splits_only(pre_tokenizer: Mapping[str, Any]) -> bool:
    if pre_tokenizer["type"] in SPLITTERS:
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in KEEPING_PRE_TOKENIZERS


def _has_all_bytes(model: Mapping[str, Any], is_byte_level: bool) -> bool:
    vocabulary = set(_vocabulary(model))
    if is_byte_level:
        return model["type"] == "BPE" and _byte_alphabet() <= vocabulary
    return bool(model.get("byte_fallback")) and vocabulary.issuperset(BYTE_TOKENS)


def _vocabulary(model: Mapping[str, Any]) -> list[str]:
    return [entry if isinstance(entry, str) else entry[0] for entry in model["vocab"]]  # Unigram's have a score each


def _byte_alphabet() -> set[str]:
    """GPT-2's characters for the 256 bytes: those that can be seen stand for themselves, the others follow U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return {chr(byte) for byte in visible} | {chr(256 + n) for n in range(256 - len(visible))}
