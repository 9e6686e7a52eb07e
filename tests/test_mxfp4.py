"""MXFP4: every code and scale as our format, what the kernel keeps of it, and what is refused."""

import pytest
import torch

from ipex_vllm.low_bit.kernels import w4a8
from ipex_vllm.low_bit.quantize import dequantize
from ipex_vllm.low_bit.readers import mxfp4

# As OCP's specification lists E2M1.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*MAGNITUDES, *(-value for value in MAGNITUDES)], dtype=torch.float64)
EXPONENTS = torch.arange(-23, 16)
POWERS = torch.tensor([2.0**exponent for exponent in EXPONENTS.tolist()], dtype=torch.float64)


def every_code(exponents: torch.Tensor) -> torch.Tensor:
    return torch.arange(32, dtype=torch.uint8).remainder(16).repeat(len(exponents), 1)


def test_every_code_times_every_scale_is_exact_in_the_kernel_too() -> None:
    codes = every_code(EXPONENTS)
    weight = mxfp4.quantized(codes, (EXPONENTS + 127).to(torch.uint8).unsqueeze(1))
    expected = VALUES[codes.int()] * POWERS.unsqueeze(1)
    assert torch.equal(dequantize(weight).double(), expected)
    numbers, scales, mins = w4a8.unpack(w4a8.pack_weight(weight), len(codes), mxfp4.BLOCK, True)
    assert mins is None
    assert torch.equal(numbers, weight.codes)
    assert torch.equal(scales.double().squeeze(1), POWERS / 2)  # of levels in halves


def test_a_block_that_is_next_to_nothing_is_zeros() -> None:
    exponents = torch.tensor([0, 1, 103], dtype=torch.uint8).unsqueeze(1)
    weight = mxfp4.quantized(every_code(exponents), exponents)
    assert dequantize(weight).eq(0).all()


@pytest.mark.parametrize("exponent", [143, 254, 255])
def test_a_scale_beyond_float16_or_that_is_no_number_is_refused(exponent: int) -> None:
    exponents = torch.tensor([[exponent]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"MXFP4: a block's scale is no number, or above 2\^15"):
        mxfp4.quantized(every_code(exponents), exponents)


def test_the_first_code_of_a_byte_is_in_its_low_half() -> None:
    assert mxfp4.nibbles(torch.tensor([[0x21, 0x43]], dtype=torch.uint8)).tolist() == [[1, 2, 3, 4]]
