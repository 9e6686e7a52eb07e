"""What can be known without an Intel GPU: the plan, the choice of kernels, and that vLLM's and PyTorch's names exist.

A stand-in takes the place of vLLM's GPU platform and operators. vLLM's own GPU layers call the same operators here, so
the tests compare what both pass to them.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ipex_vllm.engines.vllm import apply_plan
from ipex_vllm.errors import EngineError
from ipex_vllm.low_bit import vllm_arguments
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.kernels import vllm_cpu
from ipex_vllm.low_bit.kernels import xpu as xpu_kernels
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.linear import choose_kernel, make_linear
from ipex_vllm.low_bit.quantize import dequantize, quantize
from ipex_vllm.machine.facts import GIB, MachineFacts
from ipex_vllm.machine.kv_cache import KvCache
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import xpu
from ipex_vllm.plan.plan import Demands, Plan
from ipex_vllm.plan.xpu import Card, Gpus

MACHINE = MachineFacts.probe()
ARC = Card("Arc B580", memory_total=12 * GIB, memory_free=int(11.5 * GIB))
MODEL_7B = ModelFacts(weight_bytes=14 * GIB, embedding_bytes=GIB, kv_cache=KvCache(128 << 10), max_position=4096)


def plan(*cards: Card, model: ModelFacts = MODEL_7B, num_ranks: int = 1, **options: Any) -> Plan:
    environ = options.pop("environ", {})
    demands = Demands(num_ranks=num_ranks)
    return xpu.choose(Gpus(cards, MACHINE), WorkerOptions(device="xpu", **options), model, demands, environ)


def test_without_a_gpu_it_says_what_is_missing() -> None:
    assert xpu.probe(MACHINE).cards == ()
    with pytest.raises(EngineError, match="finds no Intel GPU") as caught:
        plan()
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_refused_with_the_figures_and_low_bit_makes_it_fit() -> None:
    with pytest.raises(EngineError, match=r"10\.6 GiB can be used on each of 1, 14\.0 GiB weights"):
        plan(ARC)
    assert GIB < plan(ARC, low_bit="sym_int4").kv_cache_bytes < 11 * GIB


def test_tensor_parallelism_divides_the_model_over_the_cards() -> None:
    halved = plan(ARC, ARC, ARC, num_ranks=2)
    assert 2 * GIB < halved.kv_cache_bytes < 4 * GIB
    assert len(halved.rank_cores) == 2
    with pytest.raises(EngineError, match="2 GPUs are asked for and PyTorch sees 1"):
        plan(ARC, num_ranks=2)


def test_vllm_is_given_what_other_programs_leave_free() -> None:
    busy = replace(ARC, memory_free=6 * GIB)
    args = argparse.Namespace(
        kv_cache_memory_bytes=None, gpu_memory_utilization=0.92, enforce_eager=False, max_model_len=None
    )
    apply_plan(args, plan(ARC, busy, num_ranks=2, low_bit="sym_int4", compile=False))
    # vLLM refuses to start unless this share of the card's whole memory is free.
    assert args.gpu_memory_utilization * busy.memory_total < busy.memory_free
    assert args.enforce_eager
    assert args.kv_cache_memory_bytes is None  # vLLM measures it


def test_what_the_user_chose_is_kept() -> None:
    args = argparse.Namespace(
        kv_cache_memory_bytes=None, gpu_memory_utilization=0.5, enforce_eager=True, max_model_len=2000
    )
    apply_plan(args, plan(ARC, kv_cache_gib=2.0))
    assert vars(args) == {
        "kv_cache_memory_bytes": 2 * GIB,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "max_model_len": 2000,
    }


def test_the_plan_names_the_selectors_and_the_variables_that_do_nothing_now() -> None:
    environ = {"ZE_AFFINITY_MASK": "0", "USE_XETLA": "OFF", "SYCL_CACHE_PERSISTENT": "1"}
    lines = "\n".join(plan(ARC, low_bit="sym_int4", environ=environ).lines)
    assert "ZE_AFFINITY_MASK=0" in lines
    assert "USE_XETLA is set:" in lines
    assert "SYCL_CACHE_PERSISTENT" not in lines  # still good


# The choice of kernels

Calls = list[dict[str, Any]]
INT4_SCHEMA = (
    "int4_gemm_w4a16(Tensor input, Tensor q_weight, Tensor? bias, Tensor weight_scale, Tensor qzeros, "
    "int group_size, Tensor? group_idx) -> Tensor"
)
FP8_SCHEMA = "fp8_gemm_w8a16(Tensor input, Tensor q_weight, Tensor weight_scale, Tensor? bias) -> Tensor"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """What the operators of the stand-in were called with."""
    import vllm.model_executor.kernels.linear  # registers operators for the platform that it finds
    import vllm.platforms

    calls: Calls = []

    def int4(
        input: torch.Tensor,
        q_weight: torch.Tensor,
        bias: torch.Tensor | None,
        weight_scale: torch.Tensor,
        qzeros: torch.Tensor,
        group_size: int,
        group_idx: torch.Tensor | None,
    ) -> torch.Tensor:
        calls.append({"q_weight": q_weight, "weight_scale": weight_scale, "qzeros": qzeros, "group_size": group_size})
        codes = (q_weight.unsqueeze(1) >> torch.arange(0, 32, 4).view(1, 8, 1)) & 15
        weight = (codes.flatten(0, 1) - qzeros) * weight_scale.float().repeat_interleave(group_size, dim=0)
        y = input.float() @ weight
        return (y if bias is None else y + bias).to(input.dtype)

    def fp8(
        input: torch.Tensor, q_weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        calls.append({"q_weight": q_weight, "weight_scale": weight_scale})
        y = input.float() @ (q_weight.float() * weight_scale)
        return (y if bias is None else y + bias).to(input.dtype)

    stand_in = types.SimpleNamespace(is_xpu=lambda: True, is_cpu=lambda: False, device_type="xpu")
    monkeypatch.setattr(vllm.platforms, "current_platform", stand_in)
    caches = (vllm_cpu.operators, xpu_kernels.operators)
    for cache in caches:
        cache.cache_clear()
    with torch.library._scoped_library("_xpu_C", "FRAGMENT") as library:
        library.define(INT4_SCHEMA)
        library.define(FP8_SCHEMA)
        library.impl("int4_gemm_w4a16", int4, "CPU")
        library.impl("fp8_gemm_w8a16", fp8, "CPU")
        yield calls
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.kind != "dtype" and row.runs_on_xpu])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_format_that_is_offered_has_its_kernel_and_the_right_result(
    calls: Calls, name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(96, 256) * 0.02, FORMATS[name])
    linear = make_linear(weight, dtype)
    assert linear.kernel == {"sym_int4": "xpu-w4a16"}.get(name, "xpu-w8a16")
    x, bias = torch.randn(2, 3, 256, dtype=dtype), torch.randn(96, dtype=dtype)
    expected = x.float() @ dequantize(weight).t() + bias
    torch.testing.assert_close(linear(x, bias).float(), expected, atol=0.02, rtol=0.02)
    assert len(calls) == 1


def test_a_processors_kernel_is_never_chosen_on_a_gpu_for_a_format_that_is_offered(calls: Calls) -> None:
    for row in FORMATS.values():
        if row.kind != "dtype" and row.runs_on_xpu:
            assert choose_kernel(row, row.group_size, 4096, torch.bfloat16).kernel.startswith("xpu-")


def test_a_format_without_a_gpu_kernel_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(ValueError, match="sym_int8 has no kernel on XPU; use one of sym_int4, fp8_e4m3, fp8_e5m2"):
        vllm_arguments("sym_int8", "/a/model", "xpu")


def assert_same_call(ours: dict[str, Any], vllms: dict[str, Any]) -> None:
    assert ours.keys() == vllms.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.stride()) == (vllms[name].dtype, vllms[name].stride()), name
            assert torch.equal(value.double(), vllms[name].double()), name
        else:
            assert value == vllms[name], name


def test_the_int4_operator_is_called_as_vllm_calls_it_for_gptq(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.model_executor.kernels.linear.mixed_precision.xpu import XPUwNa16LinearKernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import gptq_pack
    from vllm.scalar_type import scalar_types

    torch.manual_seed(0)
    weight = quantize(torch.randn(96, 256), FORMATS["sym_int4"])
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    linear: LowBitLinear = make_linear(weight, torch.bfloat16)
    y = linear(x)

    layer = torch.nn.Module()
    packed = gptq_pack(weight.codes.t().to(torch.int32), 4, 256, 96)
    layer.qweight = torch.nn.Parameter(packed, requires_grad=False)
    layer.scales = torch.nn.Parameter(weight.scales.t().bfloat16().contiguous(), requires_grad=False)
    shape, size = (256, 96), linear.group_size
    config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, torch.bfloat16, size, zero_points=False)
    kernel = XPUwNa16LinearKernel(config, "qweight", "scales")
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: self if args == ("xpu",) else to(self, *args))
    kernel.process_weights_after_loading(layer)
    assert torch.equal(kernel.apply_weights(layer, x), y)
    assert_same_call(*calls)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_the_fp8_operator_is_called_as_vllm_calls_it(calls: Calls, name: str) -> None:
    from vllm.model_executor.kernels.linear.scaled_mm.xpu import XPUW8A16FP8LinearKernel

    torch.manual_seed(0)
    weight = quantize(torch.randn(96, 256), FORMATS[name])
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    y = make_linear(weight, torch.bfloat16)(x)

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.codes, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(weight.scales, requires_grad=False)
    kernel = object.__new__(XPUW8A16FP8LinearKernel)  # the constructor asks for the hardware
    kernel.config = types.SimpleNamespace(weight_shape=(96, 256))
    kernel.process_weights_after_loading(layer)
    assert torch.equal(kernel.apply_weights(layer, x), y)
    assert_same_call(*calls)


# The names that the GPU path uses


def test_pytorch_has_the_names_that_find_the_gpus() -> None:
    for name in ("device_count", "mem_get_info", "get_device_name", "is_available"):
        assert callable(getattr(torch.xpu, name))


def test_vllm_has_the_arguments_that_the_plan_sets() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    defaults = AsyncEngineArgs(model="")
    assert defaults.gpu_memory_utilization == xpu.MEMORY_SHARE
    assert defaults.kv_cache_memory_bytes is None
    assert defaults.enforce_eager is False


def test_vllms_gpu_platform_is_as_we_take_it_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "._C", "._moe_C", "._xpu_C"):
        monkeypatch.setitem(sys.modules, f"vllm_xpu_kernels{name}", types.ModuleType("stand_in"))
    # Importing the platform replaces this function for the whole process.
    monkeypatch.setattr(torch.accelerator, "get_memory_info", torch.accelerator.get_memory_info)
    monkeypatch.delitem(sys.modules, "vllm.platforms.xpu", raising=False)
    from vllm.platforms.xpu import XPUPlatform

    assert XPUPlatform.device_type == "xpu"
    assert XPUPlatform.device_control_env_var == xpu.SELECTORS[0]
    assert XPUPlatform.dist_backend == "xccl"
    assert XPUPlatform.supported_quantization  # a list, to which vLLM adds the formats that we register
    monkeypatch.delitem(sys.modules, "vllm.platforms.xpu")
