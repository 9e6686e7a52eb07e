"""Mixtures of experts inside upstream vLLM, against Transformers with the dequantized weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from ipex_vllm.low_bit import importance
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.layout import from_tensors
from ipex_vllm.low_bit.quantize import dequantize, quantize
from ipex_vllm.low_bit.recipe import ExpertStorage, on_load
from ipex_vllm.low_bit.save import save
from tests.low_bit_logprobs import PROMPT
from tests.test_low_bit_vllm import MERGED, Result, rounded, run_vllm

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
# Of 8 experts 3 are chosen for each of 40 tokens: all are hit.
CONFIGS = {
    "qwen3-moe": Qwen3MoeConfig(
        **SHAPE, intermediate_size=256, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=3
    ),
    "mixtral": MixtralConfig(**SHAPE, intermediate_size=96, num_local_experts=8, num_experts_per_tok=3),
    "olmoe": OlmoeConfig(**SHAPE, intermediate_size=96, num_experts=8, num_experts_per_tok=3),
    "granitemoe": GraniteMoeConfig(**SHAPE, intermediate_size=96, num_local_experts=8, num_experts_per_tok=3),
    "gpt-oss": GptOssConfig(
        **SHAPE, intermediate_size=128, num_local_experts=8, num_experts_per_tok=3, sliding_window=16, layer_types=None
    ),
    "odd": Qwen3MoeConfig(
        **SHAPE, intermediate_size=256, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=3
    ),
}
FORMAT_OF = {
    "qwen3-moe": "sym_int4",
    "mixtral": "sym_int8",
    "olmoe": "sym_int4",
    "granitemoe": "asym_int4",
    "gpt-oss": "sym_int4",
    "odd": "sym_int4",
}
# Of these two, experts are in their files one by one.
SAVED = {"qwen3-moe": "sym_int4", "olmoe": "fp8_e4m3"}
# Where Transformers keeps an expert's inputs in the last dimension but one.
TRANSPOSED = "gpt-oss"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if "bias" in parameter_name or "sinks" in parameter_name or "experts." in parameter_name:
                nn.init.normal_(parameter, std=0.2)
        model.bfloat16().save_pretrained(folder / name)
    for name, format_name in SAVED.items():
        save(str(folder / name), FORMATS[format_name], folder / f"{name} saved")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def results(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Upstream vLLM with this package installed beside it."""
    arguments: dict[str, dict[str, object]] = {
        name: {"model": str(models[name]), "quantization": f"ipex_{format_name}"}
        for name, format_name in FORMAT_OF.items()
    }
    qwen = arguments["qwen3-moe"]
    arguments |= {
        "qwen3-moe compiled": {**qwen, "enforce_eager": False},
        # Each rank has half of the experts, or half of each.
        "qwen3-moe on 2 ranks": {**qwen, "tensor_parallel_size": 2, "enable_expert_parallel": True},
        "gpt-oss on 2 ranks": {**arguments["gpt-oss"], "tensor_parallel_size": 2},
        "qwen3-moe in fp8": {**qwen, "quantization": "ipex_fp8_e4m3"},
    }
    for name in SAVED:
        saved = {"model": str(models[f"{name} saved"])}
        arguments[f"{name} saved"] = saved
        arguments[f"{name} saved, on 2 ranks"] = {**saved, "tensor_parallel_size": 2}
    return run_vllm(arguments, tmp_path_factory.mktemp("vllm"))


def experts_of(network: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The stacked matrices of the experts, by name."""
    return {name: each for name, each in network.named_parameters() if each.dim() == 3}


def logprobs(network: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        logits = network(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return logits[range(len(PROMPT) - 1), PROMPT[1:]]


def expected(model: Path, format_name: str, *, has_experts: bool = True, num_ranks: int = 1) -> torch.Tensor:
    """The log-probabilities with the weights that the format stands for; the experts', too, unless told otherwise."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    importances = importance.measure(network)
    recipe = on_load(FORMATS[format_name])
    linears = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
    weights = {name: linear.weight.detach() for name, linear in linears.items()}
    for name, weight in weights.items():
        parent, _, last = name.rpartition(".")
        storage = recipe.storage(name, weight.shape[1], is_head=name == "lm_head")
        if last in ("k_proj", "v_proj", "up_proj") or isinstance(storage, str):
            continue
        if last == "o_proj":  # of which a rank has a part of the inputs
            parts = zip(weight.chunk(num_ranks, 1), importances[name].chunk(num_ranks), strict=True)
            pieces = [rounded(part, storage, inputs, False) for part, inputs in parts]
            linears[name].weight = nn.Parameter(torch.cat(pieces, 1))
            continue
        names = [f"{parent}.{part}" for part in MERGED[last]] if last in MERGED else [name]
        names = [each for each in names if each in weights]  # latent attention has a query projection alone
        # A rank has its part of the outputs, and chooses how to round them by what it has.
        of_ranks = [[weights[each].chunk(num_ranks)[rank] for each in names] for rank in range(num_ranks)]
        done = [
            rounded(torch.cat(parts), storage, importances[name], False).split([len(part) for part in parts])
            for parts in of_ranks
        ]
        for index, each in enumerate(names):
            linears[each].weight = nn.Parameter(torch.cat([parts[index] for parts in done]))
    for parameter in experts_of(network).values() if has_experts else ():
        for expert in parameter.data:
            matrix = expert.T if model.name == TRANSPOSED else expert
            storage = recipe.expert_storage("experts", matrix.shape[1], 32)
            assert isinstance(storage, ExpertStorage)
            size = storage.gate_up.group_size or 0
            matrix.copy_(dequantize(quantize(matrix, storage.gate_up.format, size)))
    return logprobs(network)


def expected_as_saved(model: Path, saved: Path, format_name: str) -> torch.Tensor:
    """The log-probabilities with the weights that a saved checkpoint holds."""
    tensors = load_file(saved / "model.safetensors")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def weight(name: str) -> torch.Tensor:
        parts = {key.removeprefix(f"{name}."): each for key, each in tensors.items() if key.startswith(f"{name}.")}
        format = FORMATS["sym_int8" if name == "lm_head" else format_name]
        return dequantize(from_tensors(format, parts)) if "weight_scale" in parts else parts["weight"].float()

    for name, module in network.named_modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(weight(name))
    for name, parameter in experts_of(network).items():
        layer, _, last = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for expert, matrix in enumerate(parameter.data):
            matrix.copy_(torch.cat([weight(f"{layer}.{expert}.{part}") for part in parts]))
    return logprobs(network)


def assert_close(run: Result, wanted: torch.Tensor, model: Path) -> None:
    """Activations are rounded to 8 bits; what is left must be well below what quantizing the weights changed."""
    unquantized = logprobs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    assert (run.logprobs - wanted).norm() < 0.5 * (unquantized - wanted).norm()


@pytest.mark.parametrize(
    ("run", "name"),
    [
        *((name, name) for name in FORMAT_OF if name != "odd"),
        ("qwen3-moe compiled", "qwen3-moe"),
        ("qwen3-moe on 2 ranks", "qwen3-moe"),
        ("gpt-oss on 2 ranks", "gpt-oss"),
    ],
)
def test_experts_are_quantized(run: str, name: str, models: dict[str, Path], results: dict[str, Result]) -> None:
    wanted = expected(models[name], FORMAT_OF[name], num_ranks=2 if "ranks" in run else 1)
    if FORMAT_OF[name] == "sym_int8":
        # Rounding activations costs as much as rounding weights. Either sends a token whose experts are nearly alike to
        # another one, in Transformers too, and that token's error is twenty times the others': so the median.
        assert (results[run].logprobs - wanted).abs().median() < 0.06
    else:
        assert_close(results[run], wanted, models[name])
    assert f"{FORMAT_OF[name]}: 2 layers use the kernel experts" in results[run].log
    if "compiled" in run:
        assert "saved AOT compiled function" in results[run].log


@pytest.mark.parametrize("run_name", ["qwen3-moe saved", "qwen3-moe saved, on 2 ranks", "olmoe saved"])
def test_saved_experts_are_opened_as_they_are(
    run_name: str, models: dict[str, Path], results: dict[str, Result]
) -> None:
    run, name = results[run_name], run_name.partition(" ")[0]
    wanted = expected_as_saved(models[name], models[f"{name} saved"], SAVED[name])
    assert (run.logprobs - wanted).abs().mean() < 0.06
    assert f"{SAVED[name]}: 2 layers use the kernel experts" in run.log


def test_saved_experts_that_ranks_cannot_share_are_refused(results: dict[str, Result]) -> None:
    assert "a rank's 48 intermediate features are no multiple of 32" in results["olmoe saved, on 2 ranks"].log


def test_experts_of_8_bit_floats_leave_activations_as_they_are(
    models: dict[str, Path], results: dict[str, Result]
) -> None:
    run, wanted = results["qwen3-moe in fp8"], expected(models["qwen3-moe"], "fp8_e4m3")
    assert (run.logprobs - wanted).abs().mean() < 0.06
    assert "fp8_e4m3: 2 layers use the kernel experts" in run.log


def test_experts_that_no_kernel_takes_stay_as_they_are(models: dict[str, Path], results: dict[str, Result]) -> None:
    run, reason = results["odd"], "48 inputs are no multiple of the group size 32"
    assert_close(run, expected(models["odd"], FORMAT_OF["odd"], has_experts=False), models["odd"])
    assert run.log.count(f"({reason})") == 1
    assert f"experts and 1 more ({reason})" in run.log
