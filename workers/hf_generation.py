"""One request on Transformers' `generate`; it runs on the engine's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ipex_vllm.engines.generation import Delta, FinishReason, Generation, TokenLogprob
from workers.hf_text import Decode, Detokenizer, StopStrings, token_text

PREFILL_CHUNK_TOKENS = 512  # between two chunks a request can be aborted; larger ones are no faster


class GenerationRun(StoppingCriteria):  # type: ignore[misc]
    """A request on its way: `generate` asks it after each step which of the request's choices are finished.

    Args:
        model: a causal language model of Transformers.
        decode: token ids to text, special tokens left out.
        decode_all: the same with special tokens, which log probabilities are about as well.
        generation: the sampling parameters.
        prompt: the prompt's token ids, at least one.
        max_new_tokens: the most that a choice may have, from the request and the context.
        stop_token_ids: tokens that end a choice and are no part of its text.
        on_step: called with each step's deltas.
        aborted: once set, `run` returns after the forward pass that it is in, or at once.
        has_own_cache: the model takes no KV cache but the one that its `generate` makes.
    """

    def __init__(
        self,
        model: Any,
        decode: Decode,
        decode_all: Decode,
        generation: Generation,
        prompt: list[int],
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
        on_step: Callable[[list[Delta]], object],
        aborted: threading.Event,
        has_own_cache: bool = False,
    ) -> None:
        self._model = model
        self._decode_all = decode_all
        self._generation = generation
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._on_step = on_step
        self._raw_logits = RawLogits()
        self._choices = [
            ChoiceState(index, decode, prompt, generation.stop, stop_token_ids, max_new_tokens)
            for index in range(generation.n)
        ]
        self._aborted = aborted
        self._has_own_cache = has_own_cache

    @torch.inference_mode()
    def run(self) -> None:
        generation = self._generation
        prompt = torch.tensor([self._prompt], device=self._model.device)
        if generation.seed is None:
            torch.seed()
        else:
            torch.manual_seed(generation.seed % 2**64)
        cache = self._prefill(prompt)
        if self._aborted.is_set():
            return
        self._model.generate(
            prompt.expand(generation.n, -1),
            attention_mask=torch.ones_like(prompt).expand(generation.n, -1),
            past_key_values=cache,
            generation_config=GenerationConfig(
                max_new_tokens=self._max_new_tokens,
                # All else about sampling is in the processors; Transformers' own default for top_k is 50.
                **({"do_sample": True, "top_k": 0} if generation.temperature > 0 else {"do_sample": False}),
            ),
            logits_processor=LogitsProcessorList([self._raw_logits, *logits_processors(generation, len(self._prompt))]),
            stopping_criteria=StoppingCriteriaList([self]),
        )

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        """Take one step's tokens, the last column of `input_ids` [n, tokens]; return which choices are finished [n]."""
        if self._aborted.is_set():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        logprobs = None
        if self._generation.logprobs is not None:
            logprobs = self._raw_logits.scores.log_softmax(dim=-1)
        deltas = []
        for choice, token_id in zip(self._choices, input_ids[:, -1].tolist(), strict=True):
            if choice.finish_reason is None:
                entries = list(choice.prompt_logprobs)
                choice.prompt_logprobs = ()
                if logprobs is not None:
                    entries.append(self._entry(logprobs[choice.index], choice.token_ids, token_id))
                deltas.append(choice.add(token_id, tuple(entries)))
        self._on_step(deltas)
        return torch.tensor([choice.finish_reason is not None for choice in self._choices], device=input_ids.device)

    def _prefill(self, prompt: torch.Tensor) -> DynamicCache | None:
        """Compute the KV cache of all but the last tokens of `prompt` [1, tokens], which are left to `generate`.

        It computes a prompt once however many choices there are, and cannot be stopped in one. When the client wants
        the prompt's log probabilities, all but one token are computed here, with their logits.

        For a model with a cache of its own there is nothing else to do here, and None to return.
        """
        wants_logprobs = self._generation.prompt_logprobs
        num_left = 1 if wants_logprobs or self._generation.n > 1 else PREFILL_CHUNK_TOKENS
        chunk_tokens = PREFILL_CHUNK_TOKENS
        cache = None if self._has_own_cache else DynamicCache(config=self._model.config)
        if cache is None:
            num_left = 1 if wants_logprobs else prompt.shape[1]
            chunk_tokens = prompt.shape[1]
        entries = (
            [TokenLogprob(token_text(self._decode_all, (), self._prompt[0]), None, None)] if wants_logprobs else []
        )
        chunks = prompt[:, :-num_left].split(chunk_tokens, dim=1)  # type: ignore[no-untyped-call]
        for chunk in chunks if prompt.shape[1] > num_left else ():
            if self._aborted.is_set():
                break
            if wants_logprobs:
                logits = self._model(chunk, past_key_values=cache, use_cache=cache is not None).logits[0]
                for rows in logits.split(PREFILL_CHUNK_TOKENS):
                    entries += self._prompt_entries(rows, len(entries))
            else:
                self._model.base_model(chunk, past_key_values=cache, use_cache=True)
        for choice in self._choices:
            choice.prompt_logprobs = tuple(entries)
        if cache is not None and self._generation.n > 1:
            cache.batch_repeat_interleave(self._generation.n)
        return cache

    def _prompt_entries(self, logits: torch.Tensor, start: int) -> Iterator[TokenLogprob]:
        """Entries of the prompt's tokens from `start` on; row i of `logits` [tokens, vocabulary] predicts start + i."""
        for position, logprobs in enumerate(logits.float().log_softmax(dim=-1), start):
            yield self._entry(logprobs, self._prompt[:position], self._prompt[position])

    def _entry(self, logprobs: torch.Tensor, before: list[int], token_id: int) -> TokenLogprob:
        """A token's entry, from the log probabilities [vocabulary] of all tokens in its place."""
        values, token_ids = logprobs.topk(self._generation.logprobs or 0)
        candidates = dict(zip(token_ids.tolist(), values.tolist(), strict=True))
        candidates.setdefault(token_id, logprobs[token_id].item())
        top = {token_text(self._decode_all, before, candidate): value for candidate, value in candidates.items()}
        return TokenLogprob(token_text(self._decode_all, before, token_id), candidates[token_id], top)


class ChoiceState:
    """The state of one of a request's choices."""

    def __init__(
        self,
        index: int,
        decode: Decode,
        prompt: list[int],
        stops: tuple[str, ...],
        stop_token_ids: frozenset[int],
        max_new_tokens: int,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()  # still to be sent, before those of the first token
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop_strings = StopStrings(stops)
        self._prompt_tokens = len(prompt)
        self._stop_token_ids = stop_token_ids
        self._max_new_tokens = max_new_tokens

    def add(self, token_id: int, logprobs: tuple[TokenLogprob, ...]) -> Delta:
        self.token_ids.append(token_id)
        text = ""
        if token_id in self._stop_token_ids:
            self.finish_reason = "stop"
        else:
            text, is_stopped = self._stop_strings.push(self._detokenizer.push(token_id))
            if is_stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self._max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._stop_strings.flush()
        return Delta(
            text=text,
            num_tokens=1,
            prompt_tokens=self._prompt_tokens,
            finish_reason=self.finish_reason,
            logprobs=logprobs,
            index=self.index,
        )


def logits_processors(generation: Generation, prompt_tokens: int) -> Iterator[LogitsProcessor]:
    """What a request's parameters do to the logits, in vLLM's order; greedy decoding only sees the penalties."""
    if generation.repetition_penalty != 1:
        yield RepetitionPenaltyLogitsProcessor(generation.repetition_penalty)
    if generation.frequency_penalty or generation.presence_penalty:
        yield OccurrencePenalty(generation.frequency_penalty, generation.presence_penalty, prompt_tokens)
    if generation.temperature == 0:
        return
    if generation.temperature != 1:
        yield TemperatureLogitsWarper(generation.temperature)
    if generation.min_p:
        yield MinPLogitsWarper(generation.min_p)
    if generation.top_k > 0:
        yield TopKLogitsWarper(generation.top_k)
    if generation.top_p < 1:
        yield TopPLogitsWarper(generation.top_p)


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's frequency and presence penalty, which Transformers lacks: only completion tokens count.

    logit[t] -= frequency_penalty * count[t] + presence_penalty * (count[t] > 0); the formula is in OpenAI's API
    reference and the definition is vLLM's.
    """

    def __init__(self, frequency_penalty: float, presence_penalty: float, prompt_tokens: int) -> None:
        self._frequency_penalty = frequency_penalty
        self._presence_penalty = presence_penalty
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        completion = input_ids[:, self._prompt_tokens :]
        counts = torch.zeros_like(scores).scatter_add_(1, completion, torch.ones_like(completion, dtype=scores.dtype))
        return scores - self._frequency_penalty * counts - self._presence_penalty * (counts > 0)


class RawLogits(LogitsProcessor):  # type: ignore[misc]
    """Keeps the model's own logits, which log probabilities are taken from: as in vLLM, before any penalty."""

    scores: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores.float()  # as they are already, but with Intel's extension
        return self.scores
