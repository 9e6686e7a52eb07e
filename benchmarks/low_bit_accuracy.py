"""What each low-bit format does to the demo model: `python -m benchmarks.low_bit_accuracy [--limit 60] [--answers]`.

Weights are quantized, dequantized and used in float32 by Transformers, so that only the weights' rounding counts.
"nearest" is ipex-llm's own rounding, bit for bit for sym_int4 and asym_int4; "search" is this package's. The divergence
is Kullback and Leibler's, of the rounded model's next token from the original's, over the tokens of the questions:
there the model is unsure, and small errors show that change no answer. Prints a line per format and, as the last line
of its output, the same as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div

from ipex_vllm.demo import resolve_model_path
from ipex_vllm.demo.evaluate import (
    Example,
    load_examples,
    open_transformers,
    perplexity,
    prompt_and_answer_ids,
    transformers_answers,
)
from ipex_vllm.low_bit.formats import FORMATS, Format, resolve
from ipex_vllm.low_bit.quantize import dequantize, quantize

NUM_QUESTIONS = 100  # enough to tell the formats apart, few enough to keep in memory


def round_weights(model: Any, format: Format, search: bool, keep_head: bool = False) -> float:
    """Round the weights of the linear layers in place; return the squared error relative to the squared weights."""
    kept = model.get_output_embeddings() if keep_head else None
    error = total = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not kept:
            weight = module.weight.detach()
            rounded = dequantize(quantize(weight, format, search=search))
            error += (rounded - weight).square().sum().item()
            total += weight.square().sum().item()
            module.weight = nn.Parameter(rounded, requires_grad=False)
    return error / total


def question_logprobs(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[torch.Tensor]:
    """For each example, the log probabilities [tokens, vocabulary] of the token after each of its question's tokens."""
    questions = [prompt_and_answer_ids(tokenizer, example)[0] for example in examples]
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1) for ids in questions]


def divergence(logprobs: Sequence[torch.Tensor], original: Sequence[torch.Tensor]) -> float:
    """Mean KL(original || rounded) in nats."""
    return kl_div(torch.cat(list(logprobs)), torch.cat(list(original)), reduction="batchmean", log_target=True).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="demo")
    parser.add_argument("--limit", type=int, help="examples of each section; default: all")
    parser.add_argument("--answers", action="store_true", help="also generate and compare the answers")
    parser.add_argument("--keep-head", action="store_true", help="leave the output head as it is")
    parser.add_argument("--formats", nargs="+", default=[row.name for row in FORMATS.values() if row.kind != "dtype"])
    options = parser.parse_args()
    examples = load_examples(options.limit)
    path = resolve_model_path(options.model_path)

    original, tokenizer = open_transformers(path, dtype=torch.float32)
    asked = examples[:: max(1, len(examples) // NUM_QUESTIONS)]
    original_logprobs = question_logprobs(original, tokenizer, asked)
    base = perplexity(original, tokenizer, examples)
    base_answers = transformers_answers(original, tokenizer, examples) if options.answers else []
    rows = []
    for format in map(resolve, options.formats):
        for search in (False, True) if format.kind == "integer" and format.bits < 8 else (False,):
            model, _ = open_transformers(path, dtype=torch.float32)
            error = round_weights(model, format, search, options.keep_head)
            row: dict[str, Any] = {
                "format": format.name,
                "rounding": "search" if search else "nearest",
                "relative_squared_error": error,
                "divergence": divergence(question_logprobs(model, tokenizer, asked), original_logprobs),
                "perplexity_ratio": perplexity(model, tokenizer, examples) / base,
            }
            if options.answers:
                answers = transformers_answers(model, tokenizer, examples)
                kept = sum(answer == other for answer, other in zip(answers, base_answers, strict=True))
                row["answers_kept"] = kept / len(answers)
            rows.append(row)
            print(
                "  ".join(f"{entry:.5f}" if isinstance(entry, float) else f"{entry:10}" for entry in row.values()),
                flush=True,
            )
    print(json.dumps({"examples": len(examples), "perplexity": base, "rows": rows}))


if __name__ == "__main__":
    main()
