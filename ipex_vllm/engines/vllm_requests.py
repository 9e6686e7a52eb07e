"""What every vLLM, of today and of 2024, shares: a Generation becomes its sampling parameters, its outputs deltas."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ipex_vllm.engines.generation import (
    Delta,
    FinishReason,
    Generation,
    InternalError,
    InvalidParameter,
    RequestError,
    TokenLogprob,
)
from ipex_vllm.errors import root_cause

logger = logging.getLogger(__name__)

MAX_REASON = 300  # characters

# vLLM has more reasons than FastChat's protocol. "abort" and "error" are no end of a text but a failure.
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


def sampling_params(generation: Generation, max_tokens: int) -> Any:
    """vLLM's `SamplingParams`, with outputs that hold what is new."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=generation.n,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        min_p=generation.min_p,
        presence_penalty=generation.presence_penalty,
        frequency_penalty=generation.frequency_penalty,
        repetition_penalty=generation.repetition_penalty,
        seed=generation.seed,
        stop=list(generation.stop),
        stop_token_ids=list(generation.stop_token_ids),
        ignore_eos=generation.ignore_eos,
        max_tokens=min(generation.max_new_tokens, max_tokens),
        logprobs=generation.logprobs,
        prompt_logprobs=generation.logprobs if generation.prompt_logprobs else None,
        spaces_between_special_tokens=False,
        output_kind=RequestOutputKind.DELTA,
    )


class OutputReader:
    """Reads one request's outputs.

    Args:
        generation: what was asked for.
        token_ids: the prompt's.
        tokenizer: the model's.
    """

    def __init__(self, generation: Generation, token_ids: list[int], tokenizer: Any) -> None:
        self._wants_prompt = generation.prompt_logprobs
        self._token_ids = token_ids
        self._tokenizer = tokenizer
        self._started: set[int] = set()

    def deltas(self, output: Any) -> Iterator[Delta]:
        """One delta for each choice in a `RequestOutput`. Raises InternalError."""
        for completion in output.outputs:
            with_prompt = self._wants_prompt and completion.index not in self._started
            self._started.add(completion.index)
            drafted, accepted = draft_counts(completion)
            yield Delta(
                text=completion.text,
                num_tokens=len(completion.token_ids),
                prompt_tokens=len(self._token_ids),
                finish_reason=_finish_reason(completion.finish_reason),
                logprobs=(
                    *self._logprobs(self._token_ids, output.prompt_logprobs if with_prompt else None),
                    *self._logprobs(completion.token_ids, completion.logprobs),
                ),
                index=completion.index,
                drafted=drafted,
                accepted=accepted,
            )

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any] | None] | None
    ) -> Iterator[TokenLogprob]:
        for token_id, candidates in zip(token_ids, logprobs or (), strict=False):
            if candidates is None:  # the first token of a prompt follows nothing
                yield TokenLogprob(self._tokenizer.decode([token_id]), None, None)
                continue
            top = {
                candidate.decoded_token or "": candidate.logprob
                for candidate in sorted(candidates.values(), key=lambda candidate: candidate.rank)
            }
            chosen = candidates[token_id]
            yield TokenLogprob(chosen.decoded_token or "", chosen.logprob, top)


def draft_counts(completion: Any) -> tuple[int, int]:
    """Draft tokens of a choice and those that were accepted, of vLLM's last output for it; zeros in any other."""
    metrics = getattr(completion, "spec_decode_metrics", None)
    if metrics is None:
        return 0, 0
    return metrics.num_draft_tokens, sum(accepted * count for accepted, count in enumerate(metrics.histogram))


def request_error(error: Exception, is_clients: bool, has_died: bool) -> RequestError:
    """What a client is told about an error of vLLM's: its own mistake, or a failure."""
    if is_clients:
        return InvalidParameter(root_cause(error)[:MAX_REASON])  # which may repeat what it refuses
    logger.error("Generation failed: %s", root_cause(error))
    reason = "The engine has died and the worker is restarting." if has_died else root_cause(error)
    return InternalError(f"{reason} Send the request again later.")


def _finish_reason(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason not in FINISH_REASONS:
        raise InternalError(f"The engine gave the request up ({reason}). Send it again.")
    return FINISH_REASONS[reason]
