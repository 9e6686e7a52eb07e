"""Prompt text to token ids, the same for every engine."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ipex_vllm.engines.generation import ContextOverflow


class PromptEncoder:
    """Encodes prompts on a thread of its own, so that a long one never blocks the event loop.

    Fast tokenizers release Python's lock while they work, but are not safe to share between threads: hence one thread.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, with one BOS token where the model uses one, whether or not the text spells it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt)

    async def encode_for_generation(self, prompt: str) -> list[int]:
        """Like `encode`. Raises ContextOverflow when no new token would fit behind the prompt."""
        token_ids = await self.encode(prompt)
        if len(token_ids) >= self._context_length:
            raise ContextOverflow(len(token_ids), self._context_length)
        return token_ids

    def _encode(self, prompt: str) -> list[int]:
        bos = self._tokenizer.bos_token
        spells_bos = bool(bos) and prompt.startswith(bos)
        token_ids: list[int] = self._tokenizer(prompt, add_special_tokens=not spells_bos, verbose=False)["input_ids"]
        return token_ids
