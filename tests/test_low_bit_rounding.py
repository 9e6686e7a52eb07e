"""The search in the C++ library finds the codes and scales that it finds in PyTorch."""

import pytest
import torch

from ipex_vllm.low_bit import rounding
from ipex_vllm.low_bit.formats import FORMATS, Format

INTEGERS = [row for row in FORMATS.values() if row.kind == "integer"]


def added_as_the_library_does(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, kept: the second half of its blocks of 16 onto the first until one is left, and
    the halves of that likewise."""
    blocks = torch.nn.functional.pad(values, (0, -values.shape[-1] % 16)).unflatten(-1, (-1, 16))
    while (count := blocks.shape[-2]) > 1:
        half = (count + 1) // 2
        first = blocks[..., :half, :].clone()
        first[..., : count - half, :] += blocks[..., half:, :]
        blocks = first
    lanes = blocks.squeeze(-2)
    while (count := lanes.shape[-1]) > 1:
        lanes = lanes[..., : count // 2] + lanes[..., count // 2 :]
    return lanes


def groups_of(kind: str, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    groups = torch.randn(70, 3, size) * 0.02
    if kind == "outliers":
        groups[::3, :, ::17] *= 100
    elif kind == "ties":
        groups = (groups * 100).round() / 64
    elif kind == "constant":
        groups[:, 0], groups[:, 1], groups[::2, 2] = 0, 0.5, -0.5
    elif kind == "denormal":
        groups *= 1e-38
    return groups


@pytest.mark.parametrize("format", INTEGERS, ids=lambda row: row.name)
@pytest.mark.parametrize("kind", ["normal", "outliers", "ties", "constant", "denormal"])
@pytest.mark.parametrize("size", [32, 64, 100, 128, 1200])
@pytest.mark.parametrize("is_weighed", [True, False])
def test_the_library_rounds_bit_for_bit_as_pytorch_does(
    format: Format, kind: str, size: int, is_weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = groups_of(kind, size)
    importance = torch.randn(3, size).mul(2).exp() if is_weighed else None
    codes, scales, mins = rounding.encoder(format, search=True)(groups, importance)
    monkeypatch.setattr(rounding, "_sum", added_as_the_library_does)
    tried = rounding.tried(format.bits, format.symmetric)
    expected = rounding.round_integers(groups, importance, tried, format.bits, format.symmetric)
    assert torch.equal(codes, expected[0])
    assert codes.dtype == expected[0].dtype
    assert torch.equal(scales, expected[1])
    assert scales.dtype == expected[1].dtype
    assert mins is None if format.symmetric else torch.equal(mins, expected[2])


def searched_in_pytorch(*_: object, **__: object) -> None:
    raise AssertionError("PyTorch searched")


@pytest.mark.parametrize("format", INTEGERS, ids=lambda row: row.name)
def test_the_search_is_the_librarys_where_there_is_one(format: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_integers", searched_in_pytorch)
    rounding.encoder(format, search=True)(torch.randn(4, 2, 32), None)
    with pytest.raises(AssertionError, match="PyTorch searched"):
        rounding.round_integers(torch.randn(4, 2, 32), None, torch.ones(1), format.bits, format.symmetric)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 5, 63])
@pytest.mark.parametrize("format", INTEGERS, ids=lambda row: row.name)
def test_a_weight_that_is_no_number_leaves_no_finite_scale(format: Format, place: int, bad: float) -> None:
    groups = torch.randn(4, 2, 64)
    groups[1, 0, place] = bad
    for importance in (None, torch.rand(2, 64)):
        _, scales, mins = rounding.encoder(format, search=True)(groups, importance)
        is_finite = scales.isfinite() if mins is None else scales.isfinite() & mins.isfinite()
        assert not is_finite[1, 0]
        assert is_finite.sum() == 7


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((torch.zeros(2, 32), None, torch.ones(1), 4, True), "is float32"),
        ((torch.zeros(2, 1, 32).half(), None, torch.ones(1), 4, True), "is float32"),
        ((torch.zeros(2, 1, 32), torch.ones(2, 32), torch.ones(1), 4, True), "importance"),
        ((torch.zeros(2, 1, 32), None, torch.ones(0), 4, True), "at least one"),
        ((torch.zeros(2, 1, 32), None, torch.ones(1), 6, True), "4 or 5 bits"),
        ((torch.zeros(2, 1, 32), None, torch.ones(1), 8, False), "8 that are symmetric"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[object, ...], reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.ipex_vllm.round_integers(*arguments)


def test_the_deviation_of_columns_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3000, 192) * torch.rand(192).exp() + torch.randn(192)
    weight[:, 5] = 0.25
    expected = weight.double().std(0, correction=0).float()
    assert torch.allclose(rounding.column_deviations(weight), expected, rtol=1e-5, atol=1e-3 * expected.mean().item())
    assert torch.allclose(rounding.column_deviations(weight.bfloat16()), expected, rtol=1e-2, atol=1e-3)
