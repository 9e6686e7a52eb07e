"""A model directory without weights, and a fake server that speaks both protocols."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.load.workload import PromptWriter
from tests.benchmarks.fake_server import Behaviour, create_app


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level BPE tokenizer and the config of a small Llama."""
    directory = tmp_path_factory.mktemp("model")
    words = [first + second + third for first in "bdfgk" for second in "aeiou" for third in ("n", "rt", "s")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([" " + " ".join(words)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 512,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def writer(model: Path) -> PromptWriter:
    return PromptWriter(model)


@pytest.fixture
def behaviour() -> Behaviour:
    return Behaviour()


@pytest.fixture
async def server(behaviour: Behaviour) -> AsyncIterator[str]:
    """The URL of a fake server that does what `behaviour` says at the time of each request."""
    async with TestServer(create_app(behaviour)) as running:
        yield str(running.make_url("")).rstrip("/")
