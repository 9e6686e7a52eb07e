"""How far a model's next tokens are from the float32 model's: the reference, and what is counted against it."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WINDOW = 512
# Pages of Python's own reference, English and technical, that are on every machine with Python; each gives its first
# tokens. They are no part of what a weight's rounding sees.
TOPICS = (
    "assignment",
    "calls",
    "class",
    "compound",
    "customization",
    "debugger",
    "execmodel",
    "import",
    "naming",
    "objects",
    "typesseq",
    "with",
)


@dataclass
class Score:
    """What was counted over `num_tokens` next tokens. Divergence in nats, summed."""

    num_tokens: int = 0
    divergence: float = 0.0
    agreed: float = 0
    nll: float = 0.0
    reference_nll: float = 0.0

    def add(self, logits: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> None:
        """Count [tokens, vocabulary] logits against the reference's log probabilities and the tokens that followed."""
        found = logits.float().log_softmax(dim=-1)
        reference = reference.float()
        self.num_tokens += len(targets)
        self.divergence += (reference.exp() * (reference - found)).sum().item()
        self.agreed += int((found.argmax(dim=-1) == reference.argmax(dim=-1)).sum())
        self.nll -= found.gather(1, targets[:, None]).sum().item()
        self.reference_nll -= reference.gather(1, targets[:, None]).sum().item()

    def row(self) -> dict[str, float]:
        return {
            "perplexity_ratio": math.exp((self.nll - self.reference_nll) / self.num_tokens),
            "kl": self.divergence / self.num_tokens,
            "same_top_token": self.agreed / self.num_tokens,
        }


class Reference:
    """Windows of token ids [windows, tokens], and the float32 model's log probabilities after all tokens but the last.

    They are kept in a file as float16 (their differences of 2^-11 are a thousandth of the smallest divergence that is
    told apart here), so that another process can count against them.
    """

    def __init__(self, folder: Path) -> None:
        self.windows = torch.from_numpy(np.load(folder / "windows.npy"))
        self._logprobs = np.load(folder / "logprobs.npy", mmap_mode="r")

    @classmethod
    def write(cls, folder: Path, model: Any, windows: torch.Tensor) -> Reference:
        np.save(folder / "windows.npy", windows.numpy())
        shape = (len(windows), windows.shape[1] - 1, model.config.vocab_size)
        logprobs: np.memmap[Any, Any] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            folder / "logprobs.npy", mode="w+", dtype=np.float16, shape=shape
        )
        for index, logits in enumerate(transformers_logits(model, windows)):
            logprobs[index] = logits.log_softmax(dim=-1).half().numpy()
        logprobs.flush()
        return cls(folder)

    def perplexity(self) -> float:
        score = Score()
        for index in range(len(self.windows)):
            self.count(score, index, torch.from_numpy(np.array(self._logprobs[index])))
        return math.exp(score.reference_nll / score.num_tokens)

    def count(self, score: Score, index: int, logits: torch.Tensor) -> None:
        """Count the logits [tokens - 1, vocabulary] of window `index`."""
        score.add(logits, torch.from_numpy(np.array(self._logprobs[index])), self.windows[index, 1:])


def text_windows(tokenizer: Any, num_windows: int, length: int = WINDOW) -> torch.Tensor:
    """Token ids [windows, length], one window a topic."""
    ids = [tokenizer(pydoc_data.topics.topics[topic])["input_ids"][:length] for topic in TOPICS]
    return torch.tensor([window for window in ids if len(window) == length][:num_windows])


def transformers_logits(model: Any, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits [tokens - 1, vocabulary] of each window."""
    for window in windows:
        with torch.inference_mode():
            yield model(input_ids=window[None, :]).logits[0, :-1].float()


def score_transformers(model: Any, reference: Reference) -> Score:
    score = Score()
    for index, logits in enumerate(transformers_logits(model, reference.windows)):
        reference.count(score, index, logits)
    return score


def question_windows(questions: Sequence[Sequence[int]], num_windows: int, length: int = 64) -> torch.Tensor:
    """Token ids [windows, length] of questions one after the other: where the demo model is unsure."""
    ids = [token for question in questions for token in question]
    num_windows = min(num_windows, len(ids) // length)
    return torch.tensor(ids[: num_windows * length]).view(num_windows, length)
