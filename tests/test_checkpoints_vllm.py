"""Checkpoints in other tools' layouts inside upstream vLLM, against Transformers with what their codes stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from benchmarks.checkpoints import LAYOUTS, write
from ipex_vllm.low_bit import OWN_16_BITS, UPSTREAM_KERNELS
from ipex_vllm.low_bit.kernels.vllm_cpu import operators
from tests.low_bit_logprobs import PROMPT
from tests.test_low_bit_vllm import LINEARS, Result, run_vllm
from tests.test_low_bit_vllm import SHAPE as WITH_ANY_HEAD

SHAPE = {**WITH_ANY_HEAD, "tie_word_embeddings": False}
# Its merged projections are made of whole blocks.
WIDE = {**SHAPE, "hidden_size": 256, "intermediate_size": 384}
MIXTURE = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32}
OSS = {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 32, "sliding_window": 16}
# The group sizes are those of our kernel, and one twice as large as the largest.
GROUP_SIZES = {"fp8-blocks": 128, "awq": 64, "gptq-act-order": 32, "gptq": 128, "compressed-tensors": 32}
FP8 = [name for name, layout in LAYOUTS.items() if layout.format == "fp8_e4m3"]
DENSE = [name for name, layout in LAYOUTS.items() if name not in FP8 and not layout.of_experts]
EXPERTS = ["awq", "gptq", "gptq-v2", "compressed-tensors-asym", "mxfp4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """For each layout, of a dense model and of a mixture, the directory and the prompt's log-probabilities."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dense, mixture = LlamaForCausalLM(LlamaConfig(**SHAPE)), Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **MIXTURE))
    found = {}
    wide = LlamaForCausalLM(LlamaConfig(**WIDE))
    wide_mixture = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{**WIDE, **MIXTURE, "moe_intermediate_size": 128, "head_dim": 64})
    )
    for model, source, names in (
        (dense, "dense", DENSE),
        (mixture, "experts", EXPERTS),
        (wide, "wide", FP8),
        (wide_mixture, "wide experts", FP8),
    ):
        model.save_pretrained(folder / source)
        for name in names:
            out, values = folder / f"{source} {name}", folder / f"{source} {name} in float32"
            group_size = 32 if model is mixture else GROUP_SIZES.get(name, 64)
            write(folder / source, out, LAYOUTS[name], group_size, values)
            meant: PreTrainedModel = AutoModelForCausalLM.from_pretrained(values, dtype=torch.float32)
            with torch.inference_mode():
                logprobs = meant.eval()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
            found[out.name] = out, logprobs[range(len(PROMPT) - 1), PROMPT[1:]]
    found["gpt-oss"] = write_gpt_oss(folder)
    return found


def write_gpt_oss(folder: Path) -> tuple[Path, torch.Tensor]:
    """As gpt-oss comes: experts in MXFP4. What they stand for is what Transformers makes of them."""
    source, out = folder / "gpt-oss in full", folder / "gpt-oss"
    model = GptOssForCausalLM(GptOssConfig(**{**SHAPE, **OSS}, layer_types=None))
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name or "experts." in name:
            nn.init.normal_(parameter, std=0.2)
    model.bfloat16().save_pretrained(source)
    write(source, out, LAYOUTS["gpt-oss"])
    unpacked = Mxfp4Config(dequantize=True)
    meant = AutoModelForCausalLM.from_pretrained(out, quantization_config=unpacked, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = meant.eval()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return out, logprobs[range(len(PROMPT) - 1), PROMPT[1:]]


@pytest.fixture(scope="module")
def results(
    models: dict[str, tuple[Path, torch.Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    def arguments_of(name: str, **others: object) -> dict[str, object]:
        return {"model": str(models[name][0]), "dtype": "float32", **others}

    upstream = {"additional_config": {UPSTREAM_KERNELS: True}}
    arguments = {name: arguments_of(name, exact=True) for name in models if name.startswith("dense")}
    arguments |= {name: arguments_of(name) for name in models if name.startswith("experts")}
    # On a CPU with AMX vLLM has a kernel for blocks, but not in float16.
    arguments |= {name: arguments_of(name, dtype="float16") for name in models if name.startswith("wide")}
    arguments |= {
        "dense awq, served": arguments_of("dense awq", dtype="bfloat16"),
        "dense awq, its head by our kernel": arguments_of(
            "dense awq", dtype="float16", additional_config={OWN_16_BITS: True}
        ),
        "dense gptq-act-order, compiled": arguments_of("dense gptq-act-order", enforce_eager=False),
        "dense awq, upstream": arguments_of("dense awq", dtype="bfloat16", **upstream),
        "dense gptq-asym, upstream": arguments_of("dense gptq-asym", dtype="bfloat16", **upstream),
        "dense mxfp4, served": arguments_of("dense mxfp4", dtype="bfloat16"),
        "dense int8-channels, served": arguments_of("dense int8-channels", dtype="bfloat16"),
        "dense int8-static, served": arguments_of("dense int8-static", dtype="bfloat16"),
        "experts awq, 2 ranks": arguments_of("experts awq", tensor_parallel_size=2),
        "gpt-oss": arguments_of("gpt-oss"),
        "gpt-oss, 2 ranks": arguments_of("gpt-oss", dtype="bfloat16", tensor_parallel_size=2),
        "gpt-oss, experts over 2 ranks": arguments_of(
            "gpt-oss", tensor_parallel_size=2, enable_expert_parallel=True, enforce_eager=False
        ),
    }
    return run_vllm(arguments, tmp_path_factory.mktemp("vllm"))


@pytest.mark.parametrize("layout", DENSE)
def test_the_codes_stand_for_what_the_tool_meant(
    layout: str, models: dict[str, tuple[Path, torch.Tensor]], results: dict[str, Result]
) -> None:
    """Without rounding activations. What is left is the float16 of a scale times its zero point, where there is one."""
    run, (_, wanted) = results[f"dense {layout}"], models[f"dense {layout}"]
    assert (run.logprobs - wanted).abs().max() < (0.02 if LAYOUTS[layout].format == "asym_int4" else 1e-3)
    assert (run.logprobs - wanted).abs().mean() < 0.004
    assert f"{LAYOUTS[layout].format}: {LINEARS} layers use the kernel dequantize" in run.log


@pytest.mark.parametrize(
    "run",
    [
        "dense awq, served",
        "dense awq, its head by our kernel",
        "dense gptq-act-order, compiled",
        "dense mxfp4, served",
        "dense int8-channels, served",
        "dense int8-static, served",
        "gpt-oss",
        "gpt-oss, 2 ranks",
        "gpt-oss, experts over 2 ranks",
        *(f"experts {layout}" for layout in EXPERTS),
        "experts awq, 2 ranks",
    ],
)
def test_with_8_bit_activations_the_rest_is_the_same(
    run: str, models: dict[str, tuple[Path, torch.Tensor]], results: dict[str, Result]
) -> None:
    _, wanted = models[run.partition(",")[0]]
    assert (results[run].logprobs - wanted).abs().mean() < 0.06
    kernel = "w8a8" if "int8" in run else "w4a8" if run.startswith("dense") else "experts"
    assert f"layers use the kernel {kernel}" in results[run].log
    assert "activations rounded to 8 bits" in results[run].log


def test_a_head_in_16_bits_is_multiplied_by_our_kernel_where_it_is_wanted(results: dict[str, Result]) -> None:
    line = "layers in 16 bits use the kernel w16a16"
    assert line in results["dense awq, its head by our kernel"].log
    assert line not in results["dense awq, served"].log


@pytest.mark.parametrize("layout", FP8)
def test_8_bit_floats_are_multiplied_by_activations_as_they_are(
    layout: str, models: dict[str, tuple[Path, torch.Tensor]], results: dict[str, Result]
) -> None:
    run, (_, wanted) = results[f"wide {layout}"], models[f"wide {layout}"]
    assert (run.logprobs - wanted).abs().mean() < 0.01
    assert f"fp8_e4m3: {LINEARS} layers use the kernel w8a16" in run.log
    run, (_, wanted) = results[f"wide experts {layout}"], models[f"wide experts {layout}"]
    assert (run.logprobs - wanted).abs().mean() < 0.01
    assert "fp8_e4m3: 2 layers use the kernel experts" in run.log


@pytest.mark.skipif("cpu_gemm_wna16" not in operators(), reason="vLLM's library for AVX2 alone multiplies no 4 bits")
def test_the_user_may_leave_them_to_upstream_which_reads_the_same(
    models: dict[str, tuple[Path, torch.Tensor]], results: dict[str, Result]
) -> None:
    run, (_, wanted) = results["dense awq, upstream"], models["dense awq"]
    assert (run.logprobs - wanted).abs().mean() < 0.06
    assert "layers use the kernel" not in run.log


def test_what_nobody_else_computes_says_so(results: dict[str, Result]) -> None:
    assert "GPTQ with zero points is computed by ipex_vllm's kernel alone, and --upstream-kernels asks for" in str(
        results["dense gptq-asym, upstream"].value
    )
