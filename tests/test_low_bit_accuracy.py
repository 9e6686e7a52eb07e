"""What the formats do to the demo model's answers; the table of docs/low-bit.md, on a few of its questions."""

from typing import Any

import pytest
import torch

from benchmarks.low_bit_accuracy import divergence, question_logprobs, round_weights
from ipex_vllm.demo import resolve_model_path
from ipex_vllm.demo.evaluate import load_examples, open_transformers, perplexity, transformers_answers
from ipex_vllm.low_bit.formats import FORMATS

EXAMPLES = load_examples(12)


def demo_model() -> tuple[Any, Any]:
    return open_transformers(resolve_model_path("demo"), dtype=torch.float32)


@pytest.fixture(scope="module")
def original() -> tuple[float, list[str]]:
    model, tokenizer = demo_model()
    return perplexity(model, tokenizer, EXAMPLES), transformers_answers(model, tokenizer, EXAMPLES)


@pytest.mark.parametrize(
    ("name", "kept", "ratio"),
    [("sym_int8", 0.99, 1.01), ("fp8_e4m3", 0.98, 1.01), ("sym_int4", 0.93, 1.08), ("asym_int4", 0.93, 1.08)],
)
def test_the_answers_are_kept(name: str, kept: float, ratio: float, original: tuple[float, list[str]]) -> None:
    model, tokenizer = demo_model()
    round_weights(model, FORMATS[name], search=True)
    answers = transformers_answers(model, tokenizer, EXAMPLES)
    same = [answer == other for answer, other in zip(answers, original[1], strict=True)]
    assert sum(same) >= kept * len(same)
    assert perplexity(model, tokenizer, EXAMPLES) <= ratio * original[0]


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4"])
def test_our_rounding_is_closer_than_ipex_llms_at_the_same_bits(name: str) -> None:
    model, tokenizer = demo_model()
    original = question_logprobs(model, tokenizer, EXAMPLES)
    errors, divergences = [], []
    for search in (True, False):
        model, _ = demo_model()
        errors.append(round_weights(model, FORMATS[name], search))
        divergences.append(divergence(question_logprobs(model, tokenizer, EXAMPLES), original))
    assert errors[0] < 0.92 * errors[1]
    assert divergences[0] < divergences[1]
