"""Embeddings from vLLM's pooling models."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

from ipex_vllm.engines.generation import InvalidParameter
from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.engines.vllm_requests import request_error


async def embed(llm: Any, encoder: PromptEncoder, inputs: Sequence[str]) -> tuple[list[list[float]], int]:
    """One vector of norm 1 for each text, and the number of tokens in all. Raises RequestError."""
    context_length = llm.model_config.max_model_len
    prompts = [await encoder.encode(text) for text in inputs]
    for index, token_ids in enumerate(prompts):
        if len(token_ids) > context_length:
            raise InvalidParameter(
                f"input[{index}] has {len(token_ids)} tokens; the model reads {context_length}. Shorten it."
            )
    vectors = await asyncio.gather(*(_embedding(llm, token_ids) for token_ids in prompts))
    return vectors, sum(map(len, prompts))


async def _embedding(llm: Any, token_ids: list[int]) -> list[float]:
    from vllm import PoolingParams
    from vllm.inputs.engine import tokens_input

    params = PoolingParams(task="embed", use_activation=True)  # which makes the norm 1
    outputs = llm.encode(tokens_input(token_ids), params, uuid.uuid4().hex)
    try:
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                vector: list[float] = output.outputs.data.tolist()
    except Exception as error:
        raise request_error(error, isinstance(error, ValueError), llm.errored) from error
    return vector
