import sys
from subprocess import run

import pytest

from ipex_vllm.low_bit.formats import FORMATS, NF4_VALUES, resolve


def test_an_unknown_name_is_refused_with_the_list_of_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"'int3' is unknown; use one of sym_int4, .*fp8$"):
        resolve("int3")


def test_fp8_is_an_alias_of_fp8_e4m3() -> None:
    assert resolve("fp8") is FORMATS["fp8_e4m3"]


def test_values_of_the_small_floats_are_those_of_the_ocp_specification() -> None:
    assert FORMATS["fp4"].values == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
    fp6 = FORMATS["fp6"].values
    assert fp6 is not None
    assert len(fp6) == 63
    assert (fp6[-1], min(value for value in fp6 if value > 0)) == (28, 0.0625)


@pytest.mark.parametrize("format", [row for row in FORMATS.values() if row.values], ids=lambda row: row.name)
def test_the_codes_of_a_format_fit_its_bits_and_ascend(format) -> None:
    assert len(format.values) <= 2**format.bits
    assert list(format.values) == sorted(format.values)


def test_nf4_has_an_exact_zero_and_spans_one() -> None:
    assert (NF4_VALUES[0], NF4_VALUES[7], NF4_VALUES[15]) == (-1, 0, 1)


def test_the_server_can_read_the_table_without_pytorch() -> None:
    code = "import ipex_vllm.low_bit, ipex_vllm.low_bit.formats, sys; assert 'torch' not in sys.modules"
    assert run([sys.executable, "-c", code]).returncode == 0
