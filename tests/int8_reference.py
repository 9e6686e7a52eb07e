"""What the kernels with int8 activations should give, in float64."""

from pathlib import Path

import pytest
import torch

# The rounding of the result itself, and what float32 may lose over the groups.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 2e-6}


def isas() -> list[int]:
    """The instruction sets of this CPU: AVX-VNNI and AMX have to be asked for, the others follow from the best one."""
    flags = Path("/proc/cpuinfo").read_text().split()
    known = ((1, "avx2"), (2, "avx_vnni"), (3, "avx512_vnni"), (4, "amx_int8"))
    return [isa for isa, flag in known if flag in flags]


several_isas = pytest.mark.skipif(len(isas()) < 2, reason="this CPU has AVX2 alone, and nothing to compare it with")


def product(x: torch.Tensor, weight: torch.Tensor, step: int) -> torch.Tensor:
    """x rounded to int8 `step` inputs at a time, times a float64 weight: the result, and its terms' magnitudes."""
    rows, inputs = x.shape
    groups = torch.nn.functional.pad(x.float(), (0, -inputs % step)).view(rows, -1, step)
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * (torch.full_like(largest, 127) / largest)).nan_to_num().round()
    rounded = (codes.double() * (largest / 127).double()).view(rows, -1)[:, :inputs]
    return torch.stack([rounded @ weight.T, rounded.abs() @ weight.abs().T])


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    result, magnitude = expected
    error = (out.double() - result).abs()
    bound = TOLERANCE[out.dtype] * result.abs() + 2e-6 * magnitude
    assert (error <= bound).all(), f"off by up to {(error / bound).max():.2f} times the tolerance"
