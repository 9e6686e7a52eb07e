"""Prompt text to token ids, the same for every engine, and no prompt holds up another one's."""

from __future__ import annotations

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ipex_vllm.engines.bounds import check_logprobs
from ipex_vllm.engines.generation import ContextOverflow, Generation
from ipex_vllm.engines.token_bound import longest_token
from ipex_vllm.machine.memory import give_memory_back

LARGE = 1 << 16  # characters; a tokenizer takes some 50 ms for so many
PIECE = 1 << 16  # characters that are counted at a time
CHARACTERS_PER_TOKEN = 4  # of usual text: what is shorter than a context of it is likely to fit
# By this much the pieces of a prompt must have more tokens than the context: where they are cut, a word counts twice.
PIECES_MARGIN = 2


class PromptEncoder:
    """Encodes prompts on threads, large ones on one of their own, so that they block neither small ones nor the loop.

    Fast tokenizers release Python's lock while they work, but are not safe to share between threads: hence one for
    each. A prompt that cannot fit the context is refused before it is encoded: a tokenizer takes seconds and 350 bytes
    of memory for each byte of it, and cannot be stopped.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self._context_length = context_length
        self._longest_token = longest_token(tokenizer)
        self._small = _Lane(tokenizer, "tokenizer")
        self._large = _Lane(copy.deepcopy(tokenizer), "tokenizer-large")

    async def encode(self, prompt: str) -> list[int]:
        """Token ids of `prompt`, with one BOS token where the model uses one, whether or not the text spells it.

        Raises ContextOverflow where they cannot fit the context, which is told without encoding all of it. Cancelled,
        it stops before the next piece of the prompt.
        """
        self._check_size(prompt)
        if len(prompt) <= LARGE:
            return await asyncio.get_running_loop().run_in_executor(self._small.thread, self._small.encode, prompt)
        is_given_up = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._large.thread, self._encode_large, prompt, is_given_up
            )
        finally:
            is_given_up.set()

    async def encode_fitting(self, prompt: str) -> list[int]:
        """Like `encode`. Raises ContextOverflow when no new token would fit behind the prompt."""
        token_ids = await self.encode(prompt)
        if len(token_ids) >= self._context_length:
            raise ContextOverflow(len(token_ids), self._context_length)
        return token_ids

    async def encode_for_generation(self, generation: Generation) -> list[int]:
        """The prompt's token ids. Raises ContextOverflow as `encode_fitting`, InvalidParameter as `check_logprobs`."""
        token_ids = await self.encode_fitting(generation.prompt)
        num_new = min(generation.max_new_tokens, self._context_length - len(token_ids))
        num_reported = num_new + (len(token_ids) if generation.prompt_logprobs else 0)
        check_logprobs(generation.n, generation.logprobs, num_reported)
        return token_ids

    def _check_size(self, prompt: str) -> None:
        """Raise ContextOverflow where even the longest tokens were too many."""
        if self._longest_token is not None:
            least_tokens = len(prompt) // self._longest_token
            if least_tokens > self._context_length:
                raise ContextOverflow(least_tokens, self._context_length, is_least=True)

    def _encode_large(self, prompt: str, is_given_up: threading.Event) -> list[int]:
        try:
            if len(prompt) > CHARACTERS_PER_TOKEN * self._context_length:
                self._check_pieces(prompt, is_given_up)
            return [] if is_given_up.is_set() else self._large.encode(prompt)
        finally:
            give_memory_back()

    def _check_pieces(self, prompt: str, is_given_up: threading.Event) -> None:
        """Raise ContextOverflow as soon as the first pieces of the prompt have far too many tokens."""
        num_tokens = 0
        for start in range(0, len(prompt), PIECE):
            if is_given_up.is_set():
                return
            num_tokens += len(self._large.encode(prompt[start : start + PIECE]))
            if num_tokens > PIECES_MARGIN * self._context_length + 1:
                raise ContextOverflow(num_tokens // PIECES_MARGIN, self._context_length, is_least=True)


class _Lane:
    """A thread and its tokenizer."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def encode(self, prompt: str) -> list[int]:
        bos = self._tokenizer.bos_token
        spells_bos = bool(bos) and prompt.startswith(bos)
        token_ids: list[int] = self._tokenizer(prompt, add_special_tokens=not spells_bos, verbose=False)["input_ids"]
        return token_ids
