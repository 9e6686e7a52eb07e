"""What each model of the matrix is asked: the same tokens, texts and picture, for the worker and for Transformers."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch

from benchmarks.models.architecture import VOCAB_SIZE
from benchmarks.models.pictures import SIZE

NUM_PROMPT = 48
NUM_GREEDY = 16
FIRST_WORD = 16  # ids below it are special
LENGTHS = (7, 20, 33)  # of the texts that embeddings and scores are asked for, in words


def token_ids(length: int = NUM_PROMPT, seed: int = 1) -> list[int]:
    """The ids of words, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(FIRST_WORD, VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


def text(ids: list[int]) -> str:
    """The text of which the models' tokenizer makes these ids."""
    return " ".join(f"w{token_id}" for token_id in ids)


def texts() -> list[str]:
    return [text(token_ids(length, seed)) for seed, length in enumerate(LENGTHS, 2)]


def picture() -> Any:
    """A PIL image whose patches differ."""
    from PIL import Image

    corners = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(corners.numpy()).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def picture_url() -> str:
    written = io.BytesIO()
    picture().save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
