"""Drafts from the text itself."""

from __future__ import annotations

import random

import pytest

from ipex_vllm.engines.text_lookup import LONGEST_MATCH, SHORTEST_MATCH, TextLookup


def looked_up(text: list[int], most: int = 3) -> tuple[list[int], int]:
    lookup = TextLookup()
    lookup.extend(text)
    return lookup.draft(most)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([], ([], 0)),
        ([1], ([], 0)),
        ([1, 2, 3], ([], 0)),
        ([1, 2, 3, 4, 9, 1], ([], 0)),
        ([1, 2, 3, 4, 9, 1, 2], ([3, 4, 9], 2)),
        ([5, 1, 2, 8, 8, 9, 1, 2, 7, 7, 7, 5, 1, 2], ([8, 8, 9], 3)),
        ([1, 2, 8, 8, 9, 1, 2, 7, 7, 6, 1, 2], ([7, 7, 6], 2)),
    ],
    ids=["nothing", "one", "new", "one token", "two", "the longest match", "of two as long the newest"],
)
def test_what_followed_the_last_tokens_before_follows(text: list[int], expected: tuple[list[int], int]) -> None:
    assert looked_up(text) == expected


def test_a_text_that_repeats_itself_goes_on_as_it_did() -> None:
    draft, match = looked_up([9, 1, 2, 3] + [1, 2, 3] * 3, most=8)
    assert draft == [1, 2, 3, 1, 2, 3, 1, 2]
    assert match == LONGEST_MATCH
    assert looked_up([1, 1, 1], most=4) == ([1, 1, 1, 1], 2)


@pytest.mark.parametrize("most", [0, -1])
def test_no_more_than_there_is_room_for(most: int) -> None:
    assert looked_up([1, 2, 3, 1, 2], most) == ([], 0)


def test_a_text_that_grows_is_searched_like_one_that_is_there() -> None:
    """Against the definition, tried out at every place."""
    generator = random.Random(0)
    lookup = TextLookup()
    text: list[int] = []
    for _ in range(400):
        new = [generator.randrange(6) for _ in range(generator.randrange(1, 5))]
        lookup.extend(new)
        text += new
        common = [
            (min(next(n for n in range(end + 2) if n > end or text[end - n] != text[-1 - n]), LONGEST_MATCH), end)
            for end in range(len(text) - 1)
        ]
        match, end = max(common, default=(0, 0))
        draft, found = lookup.draft(1)
        assert (draft, found) == (([text[end + 1]], match) if match >= SHORTEST_MATCH else ([], 0))
