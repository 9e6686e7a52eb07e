"""The parts of the ipex-llm engine that need no ipex-llm: the choice of a format, and one-line errors."""

import argparse

import pytest

from ipex_vllm.engines.ipex_llm import IpexLlmEngine, choose_low_bit
from ipex_vllm.errors import EngineError, OptionError
from ipex_vllm.options import WorkerOptions


@pytest.mark.parametrize(
    ("low_bit", "expected", "dtype"), [(None, None, "auto"), ("bf16", None, "bfloat16"), ("nf4", "nf4", "auto")]
)
def test_low_bit_is_a_dtype_or_a_format(low_bit: str | None, expected: str | None, dtype: str) -> None:
    IpexLlmEngine.check(WorkerOptions(low_bit=low_bit, device="xpu"), argparse.Namespace(model=None))
    assert choose_low_bit(low_bit, "auto") == (expected, dtype)


def test_a_format_that_does_not_run_there_names_those_that_do() -> None:
    with pytest.raises(OptionError, match=r"--low-bit nf4: on cpu, --engine ipex-llm has bf16, .*sym_int8$"):
        IpexLlmEngine.check(WorkerOptions(low_bit="nf4"), argparse.Namespace(model=None))


def test_a_head_of_its_own_format_is_refused() -> None:
    options = WorkerOptions(low_bit="sym_int4", low_bit_head="sym_int8")
    with pytest.raises(OptionError, match="--low-bit-head: with --engine ipex-llm"):
        IpexLlmEngine.check(options, argparse.Namespace(model=None))


def test_there_are_no_other_kernels_to_choose() -> None:
    with pytest.raises(OptionError, match="--upstream-kernels: a choice of the default engine"):
        IpexLlmEngine.check(WorkerOptions(upstream_kernels=True), argparse.Namespace(model=None))


def test_without_ipex_llm_one_line_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="make env-ipex-llm"):
        IpexLlmEngine.add_arguments(argparse.ArgumentParser())
