"""A tokenizer's added tokens, as far as they end a text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ipex_vllm.engines.generation import Generation


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that a tokenizer never splits, and their ids."""
    return {str(token): token_id for token_id, token in _decoder(tokenizer).items()}


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Those of them that are left out of a decoded text, and their ids."""
    return {str(token): token_id for token_id, token in _decoder(tokenizer).items() if token.special}


def stop_at_special_tokens(generation: Generation, tokenizer: Any) -> Generation:
    """The generation, which also stops at the token that a stop string is the name of.

    Special tokens are left out of the text that stop strings are looked for in.
    """
    if not generation.stop:
        return generation
    special = special_tokens(tokenizer)
    token_ids = (special[string] for string in generation.stop if string in special)
    return replace(generation, stop_token_ids=tuple(dict.fromkeys((*generation.stop_token_ids, *token_ids))))


def _decoder(tokenizer: Any) -> dict[int, Any]:
    decoder: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return decoder
