"""The 16-bit kernel: every result against float64, and the same bits for any batch, threads and instruction set."""

from pathlib import Path

import pytest
import torch

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.kernels import w16a16
from tests.test_w8a16 import assert_close

DTYPES = [*native.DTYPES]
SHAPES = [(1, 1), (31, 2), (32, 15), (33, 16), (96, 640), (70, 1001)]
EVERY_ROWS = [*range(1, 34), 127, 128, 129, 257]
FLAGS = Path("/proc/cpuinfo").read_text().split()
ISAS = [isa for isa, flag in ((1, "avx2"), (2, "avx512bw")) if flag in FLAGS]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product in float64, and the sum of its terms' magnitudes."""
    return torch.stack([x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T])


def test_the_kernel_was_built_and_runs_here():
    assert w16a16.unavailable_reason() is None
    assert w16a16.isa() == w16a16.ISAS[ISAS[-1]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", w16a16.WEIGHT_DTYPES)
def test_every_number_of_rows_and_odd_sizes(weight_dtype, dtype, isa):
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs).to(weight_dtype)
        packed = w16a16.pack(weight)
        assert packed.shape == (-(-outputs // 32) * 32, inputs + inputs % 2)
        assert packed.dtype == weight_dtype
        x = torch.randn(max(EVERY_ROWS), inputs).to(dtype)
        expected = reference(x, weight)
        for rows in EVERY_ROWS:
            assert_close(w16a16.linear(x[:rows], packed, None, outputs, isa), expected[:, :rows])


@pytest.mark.parametrize("weight_dtype", w16a16.WEIGHT_DTYPES)
def test_every_number_is_read_as_it_is(weight_dtype):
    """Subnormal numbers, the largest, infinities, in both places of a pair: an input at a time."""
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(weight_dtype)
    numbers = words[~words.isnan()]
    for isa in ISAS:
        for place in (0, 1):
            weight = torch.zeros(len(numbers), 2, dtype=weight_dtype)
            weight[:, place] = numbers
            x = torch.zeros(1, 2)
            x[0, place] = 1
            assert torch.equal(w16a16.linear(x, w16a16.pack(weight), None, len(numbers), isa)[0], numbers.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "same"])
def test_dtypes_and_bias(dtype, bias_dtype):
    weight, x = torch.randn(70, 256).bfloat16(), torch.randn(2, 5, 256).to(dtype)
    bias = None if bias_dtype is None else torch.randn(70).to(dtype if bias_dtype == "same" else bias_dtype)
    out = w16a16.linear(x, w16a16.pack(weight), bias, 70)
    assert out.shape == (2, 5, 70)
    assert out.dtype == dtype
    expected = reference(x.flatten(0, 1), weight)
    if bias is not None:
        expected += torch.stack([bias.double(), bias.double().abs()])[:, None]
    assert_close(out.flatten(0, 1), expected)


@pytest.mark.parametrize("weight_dtype", w16a16.WEIGHT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_nothing_else(dtype, weight_dtype):
    packed, x = w16a16.pack(torch.randn(96, 1001).to(weight_dtype)), torch.randn(130, 1001).to(dtype)
    whole = w16a16.linear(x, packed, None, 96)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(w16a16.linear(x, packed, None, 96), whole)
    finally:
        torch.set_num_threads(threads)
    for isa in ISAS:
        assert torch.equal(w16a16.linear(x, packed, None, 96, isa), whole)
        for rows in (1, 2, 3, 7, 13):
            assert torch.equal(w16a16.linear(x[:rows], packed, None, 96, isa), whole[:rows])
    assert w16a16.linear(x[:0], packed, None, 96).shape == (0, 96)


def test_what_does_not_fit_is_refused():
    packed = w16a16.pack(torch.randn(32, 64).half())
    for x, outputs, weight in (
        (torch.randn(1, 66), 32, packed),
        (torch.randn(1, 64), 64, packed),
        (torch.randn(1, 64), 32, packed.float()),
        (torch.randn(1, 64).double(), 32, packed),
    ):
        with pytest.raises(RuntimeError):
            w16a16.linear(x, weight, None, outputs)
