"""Drafts as long as they pay: by what became of a stream's drafts, and by the streams beside it."""

import random

import pytest

from ipex_vllm.engines.draft_length import CHECK_ROWS, FREE_ROWS, LOOKUPS_CHANCES, Acceptance, lengths, proposal


def powers(chance: float, most: int) -> list[float]:
    return [chance**power for power in range(1, most + 1)]


def test_a_stream_is_drafted_for_longer_as_its_drafts_are_right() -> None:
    acceptance, position, seen = Acceptance(), 0, []
    for _ in range(8):
        (length,) = lengths([acceptance.chances(position, 15)])
        acceptance.learn(length, length, position)
        position += length + 1
        seen.append(length)
    assert seen == sorted(seen)
    assert 1 <= seen[0] <= 3
    assert seen[-1] == 15


@pytest.mark.parametrize("match", [2, 3, 8])
def test_a_stream_whose_drafts_are_wrong_costs_little_and_is_tried_again(match: int) -> None:
    acceptance, drafted, last = Acceptance(LOOKUPS_CHANCES), 0, 0
    for position in range(1000):  # something to draft is found for every token
        (length,) = lengths([acceptance.chances(position, 15, match)])
        if length:
            acceptance.learn(length, 0, position, match)
            drafted, last = drafted + length + CHECK_ROWS, position
    assert drafted / (FREE_ROWS + 1) < 0.03 * 1000, "rows in vain, in steps: more than 3 %"
    assert last > 500


def test_what_comes_to_be_right_is_found_out() -> None:
    acceptance, position = Acceptance(), 200
    for at in range(200):
        if lengths([acceptance.chances(at, 15)])[0]:
            acceptance.learn(1, 0, at)
    seen = []
    for _ in range(200):
        (length,) = lengths([acceptance.chances(position, 15)])
        if length:
            acceptance.learn(length, length, position)
        position += length + 1
        seen.append(length)
    assert max(seen) == 15


def test_a_match_is_learned_of_by_its_length() -> None:
    """Where one token is found again by chance, and eight are because a text is copied."""
    acceptance = Acceptance(LOOKUPS_CHANCES)
    for position in range(0, 200, 10):
        acceptance.learn(4, 0, position, match=1)
        acceptance.learn(4, 4, position + 4, match=8)
    assert lengths([acceptance.chances(200, 15, match=1)]) == [0]
    assert lengths([acceptance.chances(200, 15, match=8)])[0] > 10


def test_a_token_that_follows_right_ones_rests_on_a_longer_match() -> None:
    first, second, third = Acceptance((0.2, 0.5, 0.8)).chances(0, 3)
    assert (first, second, third) == pytest.approx((0.2, 0.2 * 0.5, 0.2 * 0.5 * 0.8))
    assert Acceptance((0.2, 0.5, 0.8)).chances(0, 2, match=9) == pytest.approx([0.8, 0.8 * 0.8])


@pytest.mark.parametrize(("chance", "most_streams"), [(0.4, 4), (0.5, 8), (0.7, 16)])
def test_no_drafts_where_the_streams_fill_the_arithmetic(chance: float, most_streams: int) -> None:
    assert lengths([powers(chance, 4)])[0] > 0
    assert not any(lengths([powers(chance, 4)] * most_streams))


def test_each_stream_gets_what_its_own_chance_is_worth() -> None:
    assert lengths([powers(0.95, 4), powers(0.05, 4), []]) == [4, 0, 0]
    hot, warm = lengths([powers(0.9, 15), powers(0.6, 15)])
    assert hot > warm > 0


def test_the_lengths_are_the_best_of_all() -> None:
    """Against every allotment, by expected tokens for rows, of three streams."""
    generator = random.Random(0)
    every = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    for _ in range(50):
        chances = [sorted((generator.random() for _ in range(4)), reverse=True) for _ in range(3)]

        def rate(counts: tuple[int, ...], chances: list[list[float]] = chances) -> float:
            tokens = sum(1 + sum(each[:count]) for each, count in zip(chances, counts, strict=True))
            return tokens / (FREE_ROWS + 3 + sum(counts) + (CHECK_ROWS if any(counts) else 0))

        assert rate(tuple(lengths(chances))) == pytest.approx(max(map(rate, every)))


def test_a_model_that_drafts_is_asked_for_what_its_own_steps_are_worth() -> None:
    assert proposal([powers(0.9, 5)], step_cost=0.1) == 5
    assert 0 < proposal([powers(0.6, 5)], step_cost=0.2) < 5
    assert proposal([powers(0.6, 5)], step_cost=0.9) == 0
    assert proposal([powers(0.6, 5)] * 32, step_cost=0.1) == 0
    assert proposal([], step_cost=0.1) == 0
