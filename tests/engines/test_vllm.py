"""What vLLM's engine makes of our options before vLLM starts."""

import argparse

import pytest

from ipex_vllm.demo import resolve_model_path
from ipex_vllm.engines.vllm import VllmEngine, apply_low_bit
from ipex_vllm.errors import EngineError
from ipex_vllm.options import WorkerOptions


def low_bit_arguments(*flags: str, **options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    VllmEngine.add_arguments(parser)
    args = parser.parse_args(flags)
    apply_low_bit(args, WorkerOptions(model_path=str(resolve_model_path("demo")), **options))
    return args


def test_the_heads_format_goes_to_vllm_beside_what_the_user_tells_its_plugins() -> None:
    args = low_bit_arguments("--additional-config", '{"a": 1}', low_bit="sym_int4", low_bit_head="none")
    assert args.quantization == "ipex_sym_int4"
    assert args.additional_config == {"a": 1, "ipex_vllm_head": "none"}
    assert low_bit_arguments(low_bit="sym_int4").additional_config == {}


def test_a_head_beside_weights_that_stay_is_refused_in_one_line() -> None:
    with pytest.raises(EngineError, match="--low-bit: a format for the output head"):
        low_bit_arguments(low_bit_head="none")
