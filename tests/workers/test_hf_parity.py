"""The worker on Transformers and the one on vLLM give the same greedy answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipex_vllm.demo import MODEL_DIR
from tests.processes import Server, worker
from tests.support import generate

NUM_PROMPTS = 50
NUMERIC_TIE = 0.25  # two steps of a bfloat16 logit between 16 and 32
WEIGHTS = ("--model-path", "demo", "--low-bit", "bf16", "--no-register")


def prompts() -> list[str]:
    lines = (MODEL_DIR.parent / "evaluation.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    return [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]


def answers(start: Callable[[], Server]) -> list[dict[str, Any]]:
    with start() as server:
        params: dict[str, Any] = {"temperature": 0, "echo": False, "max_new_tokens": 24, "logprobs": 5}
        return [generate(server.url, prompt=prompt, **params) for prompt in prompts()]


def first_gap(ours: dict[str, Any], vllms: dict[str, Any]) -> float:
    """How far apart the two tokens at which two answers part are at most, in either's logits; 0 for equal answers."""
    pairs = zip(ours["logprobs"]["tokens"], vllms["logprobs"]["tokens"], strict=False)
    for position, (token, other) in enumerate(pairs):
        if token != other:
            top, vllms_top = (answer["logprobs"]["top_logprobs"][position] for answer in (ours, vllms))
            gaps = (top[token] - top[other], vllms_top[other] - vllms_top[token])
            print(f"token {position}: {token!r} here, {other!r} on vLLM; logit gaps {gaps[0]:.4f} and {gaps[1]:.4f}")
            return max(gaps)
    assert (ours["text"], ours["finish_reason"], ours["usage"]) == (
        vllms["text"],
        vllms["finish_reason"],
        vllms["usage"],
    )
    return 0.0


@pytest.mark.runs(".venv/bin/python -m pytest tests/workers/test_hf_parity.py -s")
def test_greedy_answers_are_vllms_up_to_numeric_ties(tmp_path: Path) -> None:
    """In bfloat16, where both round at every layer: they may part where two tokens are about equally likely."""
    ours = answers(lambda: Server(tmp_path / "transformers", "/ready", "workers.hf_worker", *WEIGHTS))
    vllms = answers(lambda: worker(tmp_path / "vllm", *WEIGHTS))
    gaps = [first_gap(*pair) for pair in zip(ours, vllms, strict=True)]
    num_equal = gaps.count(0.0)
    print(f"{num_equal} of {NUM_PROMPTS} answers are equal")
    assert max(gaps) <= NUMERIC_TIE
    assert num_equal > NUM_PROMPTS * 0.8
