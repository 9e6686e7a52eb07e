"""Prompts become token ids without holding each other up, and what cannot fit is refused before it is encoded."""

from __future__ import annotations

import asyncio
import threading
import unicodedata
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines import tokenization
from ipex_vllm.engines.generation import ContextOverflow, Generation, InvalidParameter
from ipex_vllm.engines.token_bound import BYTE_TOKENS, longest_token
from ipex_vllm.engines.tokenization import PromptEncoder
from tests.support import CharacterTokenizer

MIB = 1 << 20


class Slow(CharacterTokenizer):
    """Each text takes until `release`; a copy shares it, and the list of what was encoded."""

    release = threading.Event()
    encoded: list[int] = []  # noqa: RUF012

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        assert len(text) < 1000 or self.release.wait(20)
        self.encoded.append(len(text))
        return super().__call__(text)


@pytest.fixture
def slow() -> Slow:
    Slow.release, Slow.encoded = threading.Event(), []
    return Slow()


async def test_a_small_prompt_is_not_held_up_by_large_ones(slow: Slow) -> None:
    encoder = PromptEncoder(slow, context_length=10**6)
    large = [asyncio.create_task(encoder.encode("x" * 10**5)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert len(await asyncio.wait_for(encoder.encode("small"), 10)) == 5
    assert not any(task.done() for task in large)
    slow.release.set()
    assert [len(token_ids) for token_ids in await asyncio.gather(*large)] == [10**5] * 3


async def test_the_prompt_of_a_client_that_is_gone_is_dropped(slow: Slow) -> None:
    encoder = PromptEncoder(slow, context_length=10**6)
    tasks = [asyncio.create_task(encoder.encode("x" * 10**7)) for _ in range(2)]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    slow.release.set()
    assert len(await encoder.encode("y" * 10**5)) == 10**5
    assert slow.encoded == [tokenization.PIECE, 10**5], "a piece of the first and nothing of the second"


def demo() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def word_piece() -> Any:
    """White space is swallowed, and so is what a word too long consists of."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentence_piece() -> Any:
    """As Llama 2's: characters or, failing those, bytes."""
    pieces = ["<unk>", *BYTE_TOKENS, "▁", "▁word", "wor", "d"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def composing() -> Any:
    tokenizer = demo()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


LETTERS = ("word ", " ", "\n", "a", "\0", "\u00e9", "\u1f87", "\uac01", "\u2126", "\U0001f600", "\U0001d160")
TEXTS = [unicodedata.normalize(form, letter * 500) for letter in LETTERS for form in ("NFC", "NFD")]
TEXTS += [chr(number) * 7 for number in range(0x20, 0xD800, 997)]


@pytest.mark.parametrize("make", [demo, sentence_piece, composing])
def test_the_longest_token_bounds_how_many_a_text_has(make: Any) -> None:
    tokenizer = make()
    longest = longest_token(tokenizer)
    assert longest is not None
    for text in TEXTS:
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= len(text) // longest, repr(text[:3])


def test_no_length_is_told_of_tokenizers_that_swallow_text() -> None:
    assert longest_token(word_piece()) is None
    assert longest_token(CharacterTokenizer()) is None
    removing = demo()
    removing.backend_tokenizer.normalizer = normalizers.Strip()
    assert longest_token(removing) is None


@pytest.mark.parametrize(("make", "word"), [(demo, "word "), (word_piece, "word "), (sentence_piece, "é")])
async def test_what_cannot_fit_is_refused_at_once_and_takes_no_memory(make: Any, word: str) -> None:
    encoder = PromptEncoder(make(), context_length=2048)
    prompt = word * (15 * MIB // len(word.encode()))
    process = psutil.Process()
    before = process.memory_info().rss
    for ask in (encoder.encode(prompt), encoder.encode_fitting(prompt)):
        with pytest.raises(ContextOverflow, match=r"has at least \d+ tokens; the context holds 2048") as caught:
            await ask
        assert caught.value.prompt_tokens >= 2048
    assert process.memory_info().rss < before + 100 * MIB


async def test_a_long_prompt_that_fits_is_encoded_whole() -> None:
    encoder = PromptEncoder(word_piece(), context_length=2048)
    assert await encoder.encode_fitting("word " + " " * 10**6 + "word") == [1, 1]
    encoder = PromptEncoder(demo(), context_length=60_000)
    prompt = "def chain(*iterables): yield from iterables\n" * 4000
    assert await encoder.encode(prompt) == demo()(prompt)["input_ids"]


async def test_log_probabilities_of_a_prompt_count() -> None:
    encoder = PromptEncoder(CharacterTokenizer(), context_length=10**6)
    asked = {"logprobs": 20, "max_new_tokens": 10, "prompt_logprobs": True}
    assert len(await encoder.encode_for_generation(Generation("x" * 10_000, **asked))) == 10_000
    with pytest.raises(InvalidParameter, match="n x \\(logprobs"):
        await encoder.encode_for_generation(Generation("x" * 13_000, **asked))
