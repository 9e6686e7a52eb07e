"""What Transformers answers for a model, and how far a worker's answer is from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.models import questions, tiny
from benchmarks.models.architecture import Architecture
from benchmarks.models.served import Answer

# How far what a model says is off, and how far what was chosen by it is from the best.
Errors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """Of the log probabilities of a prompt's tokens, which are computed at once, and of greedy ones, one by one; or of
    vectors, or of scores.

    Attributes:
        largest, mean: absolute, in nats; of vectors, one minus the cosine.
        is_choice_same: whether each of the worker's greedy tokens, or its best score, is Transformers' best, or so near
            to it that the difference decides.
        quantized: how many matrices vLLM has quantized.
    """

    largest: float
    mean: float
    is_choice_same: bool
    quantized: int


def difference(architecture: Architecture, folder: Path, answer: Answer, quantized: Path) -> Difference:
    """How far an answer is from what Transformers gives with the dequantized weights in the file `quantized`."""
    model = tiny.load(architecture, folder)
    weights = list(arrays(quantized))
    if weights:
        dequantized(model, weights)
    with torch.inference_mode():
        errors, gaps = DIFFERENCES[architecture.task](model, architecture, folder, answer)
    largest = errors.max().item()
    return Difference(largest, errors.mean().item(), bool((gaps <= 2 * largest).all()), len(weights))


def of_tokens(model: Any, architecture: Architecture, folder: Path, answer: Answer) -> Errors:
    """How far log probabilities differ, and how far each greedy token is from the likeliest."""
    assert answer.prompt is not None
    assert answer.greedy is not None
    num_greedy = len(answer.greedy)
    inputs = question(architecture, folder)
    assert inputs["input_ids"].tolist() == [answer.prompt], "the worker made other tokens of the prompt"
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            new = {"input_ids": answer.greedy, "attention_mask": [1] * num_greedy}.get(name, [0] * num_greedy)
            inputs[name] = torch.cat([inputs[name], torch.tensor([new])], 1)
    logprobs = model(**inputs).logits[0, :-1].float().log_softmax(-1)
    expected = logprobs.gather(1, inputs["input_ids"][0, 1:, None]).squeeze(1)
    gaps = (logprobs.max(-1).values - expected)[-num_greedy:]
    return (expected - torch.tensor(answer.values)).abs(), gaps


def question(architecture: Architecture, folder: Path) -> dict[str, torch.Tensor]:
    """What Transformers' model takes for what the worker was asked."""
    if architecture.picture is None:
        return {"input_ids": torch.tensor([questions.token_ids()])}
    from transformers import AutoProcessor

    text = f"{architecture.picture.mark} {questions.text(questions.token_ids())}"
    processor = AutoProcessor.from_pretrained(folder)
    return dict(processor(images=[questions.picture()], text=[text], return_tensors="pt"))


def of_vectors(model: Any, architecture: Architecture, folder: Path, answer: Answer) -> Errors:
    """One minus the cosines of vectors: of the last token, or of an encoder's first."""
    place = -1 if "num_key_value_heads" in architecture.settings else 0
    rows = [model(**read(folder, text)).last_hidden_state[0, place] for text in questions.texts()]
    cosines = torch.cosine_similarity(torch.stack(rows), torch.tensor(answer.values), -1)
    return (1 - cosines).abs(), torch.zeros(1)


def of_scores(model: Any, architecture: Architecture, folder: Path, answer: Answer) -> Errors:
    """How far scores differ, and how far the best of them is from the best."""
    query, *documents = questions.texts()
    expected = torch.stack([model(**read(folder, query, document)).logits[0, 0] for document in documents])
    given = torch.tensor(answer.values)
    return (expected - given).abs(), (expected.max() - expected[given.argmax()])[None]


def read(folder: Path, *texts: str) -> dict[str, torch.Tensor]:
    """A text, or a pair, as the model's tokenizer has it."""
    from transformers import AutoTokenizer

    return dict(AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt"))


DIFFERENCES = {"generate": of_tokens, "embed": of_vectors, "score": of_scores}


def arrays(path: Path) -> Iterator[torch.Tensor]:
    """What `np.save` has added to a file, one after the other."""
    if path.exists():
        with path.open("rb") as file:
            while file.peek(1):
                yield torch.from_numpy(np.load(file))


def dequantized(model: Any, quantized: list[torch.Tensor]) -> None:
    """Give `model` the weights that vLLM has, which may have put rows of several layers together, in its own order.

    Each row is written over the one of `model` that it came from: the nearest, as rounding moves it much less than
    random rows are apart.
    """
    untie(model)
    embeddings = model.get_input_embeddings().weight
    matrices = []
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() > 1 and parameter is not embeddings:
                # GPT-2's, and some experts', are stored the other way around.
                matrices += [parameter.data, parameter.data.transpose(-1, -2)]
    for inputs in {weight.shape[1] for weight in quantized}:
        # Views, so that what is written shows in the model.
        views = [matrix for matrix in matrices if matrix.shape[-1] == inputs]
        places = [(view, index) for view in views for index in product(*map(range, view.shape[:-1]))]
        rows = torch.cat([view.reshape(-1, inputs).float() for view in views])
        for weight in (weight for weight in quantized if weight.shape[1] == inputs):
            real = weight[weight.abs().sum(1) > 0]  # the vocabulary may be padded
            distances, nearest = torch.cdist(real, rows).min(1)
            assert (distances < 0.4 * real.norm(dim=1)).all(), "a quantized row that is no row of the checkpoint"
            for row, place in zip(real, nearest.tolist(), strict=True):
                view, index = places[place]
                view[index] = row


def untie(model: Any) -> None:
    """A quantized head is a tensor of its own, beside the embedding."""
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.data.clone())
