"""How well a model answers the demo model's fixed questions: `python -m ipex_vllm.demo.evaluate`.

The parts are importable, so that low-bit versions of the model can be judged by the same measure: `load_examples`,
`score` (pure), and for each engine a function that answers and one that gives the perplexity.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ipex_vllm.demo import resolve_model_path
from ipex_vllm.engines.vllm_offline import greedy_texts, log_likelihood, open_llm

EVALUATION_FILE = Path(__file__).parent / "evaluation.jsonl"
MAX_NEW_TOKENS = 160
DECLINED = ("Sorry, I ", "I don't know ")

Message = dict[str, str]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """A conversation that ends with a question, and the right answer to it.

    section: "facts" (phrasings seen in training), "held_out" (the same facts in phrasings never seen), "follow_ups"
    (half of them in phrasings never seen), "off_topic" (any answer that declines is right) or "identity".
    """

    section: str
    messages: tuple[Message, ...]
    answer: str

    def is_answered_by(self, text: str) -> bool:
        if self.section == "off_topic":
            return text.startswith(DECLINED)
        return text == self.answer


def load_examples(limit: int | None = None) -> list[Example]:
    """The shipped examples in file order, at most `limit` of each section, evenly spread over it."""
    examples: dict[str, list[Example]] = {}
    for line in EVALUATION_FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        example = Example(row["section"], tuple(row["messages"]), row["answer"])
        examples.setdefault(example.section, []).append(example)
    return [
        section[index]
        for section in examples.values()
        for index in sorted({i * len(section) // (limit or len(section)) for i in range(limit or len(section))})
    ]


def score(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
    """The share of right answers by section, each between 0 and 1; spaces around an answer do not count."""
    right: dict[str, list[bool]] = {}
    for example, answer in zip(examples, answers, strict=True):
        right.setdefault(example.section, []).append(example.is_answered_by(answer.strip()))
    return {section: sum(marks) / len(marks) for section, marks in right.items()}


def transformers_answers(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 256) -> list[str]:
    """Greedy answers of a Transformers causal language model, in the order of the examples."""
    import torch

    prompts = [_prompt(tokenizer, example) for example in examples]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    tokenizer.padding_side = "left"
    for indexes in _batches(by_length, batch_size):
        batch = tokenizer([prompts[i] for i in indexes], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        for index, text in zip(indexes, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            answers[index] = text
    return answers


def perplexity(model: Any, tokenizer: Any, examples: Sequence[Example], batch_size: int = 32) -> float:
    """exp of the mean negative log-likelihood, in nats, of the tokens of the right answers and of their end token.

    The model sees the right answer so far (teacher forcing); the questions' tokens are not counted.
    """
    import torch

    total, count = 0.0, 0
    pairs = [prompt_and_answer_ids(tokenizer, example) for example in examples]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    for batch in _batches(pairs, batch_size):
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        tokens = torch.full((len(batch), width), tokenizer.pad_token_id)
        targets = torch.full((len(batch), width), -100)
        for row, (prompt, answer) in enumerate(batch):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
        # Padding stands at the right end, where causal attention keeps it from reaching what counts.
        with torch.inference_mode():
            logits = model(input_ids=tokens.to(model.device)).logits.float().cpu()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        total, count = total + loss.item(), count + int((targets != -100).sum())
    return math.exp(total / count)


def vllm_answers(llm: Any, examples: Sequence[Example]) -> list[str]:
    """Greedy answers of a `vllm.LLM`, in the order of the examples."""
    tokenizer = llm.get_tokenizer()
    prompts = [_ids(tokenizer, _prompt(tokenizer, example)) for example in examples]
    return greedy_texts(llm, prompts, MAX_NEW_TOKENS)


def vllm_perplexity(llm: Any, examples: Sequence[Example]) -> float:
    """The same figure as `perplexity`, from the prompt log-probabilities of a `vllm.LLM`."""
    tokenizer = llm.get_tokenizer()
    pairs = [prompt_and_answer_ids(tokenizer, example) for example in examples]
    return math.exp(-log_likelihood(llm, pairs) / sum(len(answer) for _, answer in pairs))


def open_transformers(model_path: str, **kwargs: Any) -> tuple[Any, Any]:
    """The model and its tokenizer; the keyword arguments are those of `AutoModelForCausalLM.from_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, **kwargs)
    return model.eval(), AutoTokenizer.from_pretrained(model_path)


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _prompt(tokenizer: Any, example: Example) -> str:
    prompt: str = tokenizer.apply_chat_template(list(example.messages), tokenize=False, add_generation_prompt=True)
    return prompt


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prompt_and_answer_ids(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of the dialogue up to the answer, and of the right answer with its end token."""
    return _ids(tokenizer, _prompt(tokenizer, example)), _ids(tokenizer, example.answer + tokenizer.eos_token)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model the demo model's fixed questions.")
    parser.add_argument("--model-path", default="demo", help="a checkpoint's folder or name (default: demo)")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--limit", type=int, help="at most this many questions of each section")
    options = parser.parse_args()
    model_path = resolve_model_path(options.model_path)
    examples = load_examples(options.limit)
    held_out = [example for example in examples if example.section == "held_out"]
    began = time.perf_counter()
    if options.engine == "vllm":
        llm = open_llm(model_path)
        answers = vllm_answers(llm, examples)
        perplexity_held_out = vllm_perplexity(llm, held_out)
    else:
        # float32 holds bfloat16 weights exactly, and is faster on CPUs without bfloat16 instructions.
        model, tokenizer = open_transformers(model_path, dtype="float32")
        answers = transformers_answers(model, tokenizer, examples)
        perplexity_held_out = perplexity(model, tokenizer, held_out)
    seconds = time.perf_counter() - began

    shares = score(examples, answers)
    print(f"{'section':<12}{'questions':>10}{'right':>9}")
    for section, share in shares.items():
        print(f"{section:<12}{sum(e.section == section for e in examples):>10}{share:>9.1%}")
    print(f"perplexity of the right answers, held-out phrasings: {perplexity_held_out:.4f}")
    report = {"model": options.model_path, "engine": options.engine, **{k: round(v, 4) for k, v in shares.items()}}
    print(json.dumps({**report, "perplexity": round(perplexity_held_out, 5), "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
