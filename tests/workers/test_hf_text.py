"""Detokenizing and stop strings, with a tokenizer of one byte a token."""

import pytest

from workers.hf_text import Detokenizer, StopStrings, token_text

TEXT = "naïve 你好 👩‍💻 end"


def decode(token_ids: list[int]) -> str:
    return bytes(token_ids).decode(errors="replace")


def decode_words(token_ids: list[int]) -> str:
    """As SentencePiece decodes: a space between two words, none before the first."""
    return " ".join(str(token_id) for token_id in token_ids)


def test_text_comes_in_whole_characters() -> None:
    detokenizer = Detokenizer(decode, prompt=b"prompt")
    parts = [detokenizer.push(byte) for byte in TEXT.encode()]
    assert "".join(parts) == TEXT
    assert [part for part in parts if part] == list(TEXT)


def test_a_character_that_is_never_complete_is_not_shown() -> None:
    detokenizer = Detokenizer(decode, prompt=b"prompt")
    assert [detokenizer.push(byte) for byte in "a你".encode()[:-1]] == ["a", "", ""]


@pytest.mark.parametrize("prompt", [[1], list(range(100))])
def test_the_prompt_decides_on_the_space_before_the_first_word(prompt: list[int]) -> None:
    detokenizer = Detokenizer(decode_words, prompt)
    assert [detokenizer.push(7), detokenizer.push(8)] == [" 7", " 8"]


def test_without_a_prompt_there_is_no_space() -> None:
    assert Detokenizer(decode_words, []).push(7) == "7"


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("Answer: 42\nUser: more", ["\nUser:"], "Answer: 42"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("one two three", ["three", "two"], "one "),
        ("nothing here", ["stop"], "nothing here"),
        ("ends like a st", ["stop"], "ends like a st"),
        ("xStop", ["St", "Stop"], "x"),
    ],
)
def test_stop_strings_cut_the_same_however_the_text_is_split(
    size: int, text: str, stops: list[str], shown: str
) -> None:
    stop_strings = StopStrings(stops)
    out, is_stopped = "", False
    for start in range(0, len(text), size):
        part, is_stopped = stop_strings.push(text[start : start + size])
        out += part
        assert shown.startswith(out)  # a client never sees a part of a stop string
        if is_stopped:
            break
    assert out + stop_strings.flush() == shown
    assert is_stopped == (shown != text)


def test_only_a_possible_start_is_held_back() -> None:
    stop_strings = StopStrings(["</s>", "<|"])
    assert [stop_strings.push(text)[0] for text in ("a <", "b </", "s", " <")] == ["a ", "<b ", "", "</s "]


def test_the_stop_string_that_ends_first_wins() -> None:
    assert StopStrings(["b long one", "c"]).push("a b c long one") == ("a b ", True)


def test_each_token_has_its_text_and_a_split_character_goes_to_its_last() -> None:
    tokens = "a你好b".encode()
    texts = [token_text(decode, tokens[:position], token) for position, token in enumerate(tokens)]
    assert texts == ["a", "", "", "你", "", "", "好", "b"]
