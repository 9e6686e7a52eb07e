"""vLLM without a server, for measuring what a model answers: its `LLM`, opened for a tiny model on few cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def open_llm(model_path: str, **kwargs: Any) -> Any:
    """A `vllm.LLM`; the keyword arguments are vLLM's own and win."""
    from vllm import LLM

    settings = {"max_model_len": 2048, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 64}
    return LLM(model=model_path, **{**settings, **kwargs})


def greedy_texts(llm: Any, prompts: Sequence[list[int]], max_tokens: int) -> list[str]:
    """The likeliest text behind each prompt, given as token ids."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def log_likelihood(llm: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """The sum, in nats, over the tokens of all continuations; each pair is a prompt and its continuation, as ids."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt + continuation} for prompt, continuation in pairs]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    terms = (
        logprobs[token].logprob
        for (_, continuation), output in zip(pairs, outputs, strict=True)
        for token, logprobs in zip(continuation, output.prompt_logprobs[-len(continuation) :], strict=True)
    )
    return float(sum(terms))
