"""What vLLM's engine makes of our options before vLLM starts."""

import argparse
from typing import Any

import pytest

from ipex_vllm.demo import resolve_model_path
from ipex_vllm.engines.vllm import VllmEngine, apply_low_bit
from ipex_vllm.errors import OptionError
from ipex_vllm.low_bit import quantization_line
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import cpu
from ipex_vllm.plan.plan import Demands


def low_bit_arguments(*flags: str, **options: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    VllmEngine.add_arguments(parser)
    args = parser.parse_args(flags)
    worker_options = WorkerOptions(model_path=resolve_model_path("demo"), kv_cache_gib=1.0, **options)
    VllmEngine.check(worker_options, args)
    apply_low_bit(args, cpu.make_plan(MachineFacts.probe(), worker_options, ModelFacts(), Demands()))
    return args


def test_the_heads_format_goes_to_vllm_beside_what_the_user_tells_its_plugins() -> None:
    args = low_bit_arguments("--additional-config", '{"a": 1}', low_bit="sym_int4", low_bit_head="none")
    assert args.quantization == "ipex_sym_int4"
    assert args.additional_config == {"a": 1, "ipex_vllm_head": "none"}
    assert low_bit_arguments(low_bit="sym_int4").additional_config == {}


def test_quantized_checkpoints_may_be_left_to_upstreams_kernels() -> None:
    assert low_bit_arguments(upstream_kernels=True).additional_config == {"ipex_vllm_upstream_kernels": True}
    assert low_bit_arguments().additional_config == {}


@pytest.mark.parametrize(
    ("method", "upstream_kernels", "line"),
    [
        (None, False, None),
        ("ipex_sym_int4", False, None),
        ("auto_gptq", False, "quantization: auto_gptq, by our kernels where they take it"),
        ("auto_awq", True, "quantization: auto_awq, left to vLLM's own kernels"),
    ],
)
def test_one_line_says_whose_kernels_compute_a_quantized_checkpoint(
    method: str | None, upstream_kernels: bool, line: str | None
) -> None:
    found = quantization_line(method, upstream_kernels)
    assert found == line or str(found).startswith(str(line))


def test_a_head_beside_weights_that_stay_is_refused_in_one_line() -> None:
    with pytest.raises(OptionError, match="--low-bit: a format for the output head"):
        low_bit_arguments(low_bit_head="none")


def test_auto_asks_for_a_context_that_fits() -> None:
    parser = argparse.ArgumentParser()
    VllmEngine.add_arguments(parser)
    demands = [VllmEngine.demands(parser.parse_args(["--max-model-len", value])) for value in ("auto", "-1", "2k")]
    assert [each.max_model_len for each in demands] == [None, None, 2000]


@pytest.mark.parametrize(
    ("told", "meant"), [("auto", None), ("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")]
)
def test_the_plan_gets_a_dtype_by_its_usual_name(told: str, meant: str | None) -> None:
    parser = argparse.ArgumentParser()
    VllmEngine.add_arguments(parser)
    assert VllmEngine.demands(parser.parse_args(["--dtype", told])).dtype == meant
