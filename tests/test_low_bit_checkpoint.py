import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ipex_vllm.low_bit import importance, vllm_arguments
from ipex_vllm.low_bit.completeness import check_checkpoint
from ipex_vllm.low_bit.formats import FORMATS, Format, resolve
from ipex_vllm.low_bit.layout import from_tensors, meta_tensors, to_tensors
from ipex_vllm.low_bit.quantize import dequantize, quantize
from ipex_vllm.low_bit.readers import ipex_llm, ours
from ipex_vllm.low_bit.recipe import Recipe, Storage
from ipex_vllm.low_bit.save import save

QUANTIZED = [row for row in FORMATS.values() if row.kind != "dtype"]
MIXTURE = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
}
IPEX_LLM = Path(__file__).parent / "fixtures" / "ipex_llm_checkpoints"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "model")


def save_llama(path: Path, **changes: int | bool) -> Path:
    torch.manual_seed(0)
    config = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
    }
    LlamaForCausalLM(LlamaConfig(**{**config, **changes})).to(torch.bfloat16).save_pretrained(path)
    return path


def quantization_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return config


def with_quantization(path: Path, quantization: dict[str, object]) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return str(path)


@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
def test_a_weight_survives_the_way_through_its_tensors(format: Format, group_size: int) -> None:
    weight = quantize(torch.randn(8, 128), format, group_size)
    tensors, storage = to_tensors(weight), Storage(format, weight.group_size)
    assert torch.equal(dequantize(from_tensors(format, tensors)), dequantize(weight))
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in meta_tensors(storage, 8, 128).items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == expected


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4", "sym_int8", "fp6"])
def test_a_saved_checkpoint_holds_the_codes_and_everything_else_as_it_was(name: str, model: Path) -> None:
    out = model.parent / "out"
    save(str(model), FORMATS[name], out)
    original, saved = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    tensors = {key.removeprefix(f"{layer}."): saved[key] for key in saved if key.startswith(layer)}
    inputs = importance.read(importance.of_checkpoint(str(model)))[layer]
    expected = dequantize(quantize(original[f"{layer}.weight"], FORMATS[name], None, inputs))
    assert torch.equal(dequantize(from_tensors(FORMATS[name], tensors)), expected)
    for key in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(saved[key], original[key])
    assert vllm_arguments(None, str(out), "cpu") == {"quantization": f"ipex_{name}"}
    assert vllm_arguments(name, str(out), "cpu") == {"quantization": f"ipex_{name}"}


def test_a_tied_head_and_unsuitable_layers_are_listed_as_ignored(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tie_word_embeddings=True, intermediate_size=200)
    save(str(model), FORMATS["sym_int4"], tmp_path / "out")
    assert quantization_of(tmp_path / "out")["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]


def test_layers_stored_in_another_way_have_a_group_of_their_own(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", intermediate_size=160)
    save(str(model), FORMATS["sym_int4"], tmp_path / "out", group_size=64)
    config = quantization_of(tmp_path / "out")
    groups = [
        (group["targets"], group["format"], group["weights"]["num_bits"], group["weights"].get("group_size"))
        for group in config["config_groups"].values()
    ]
    assert groups == [
        (["Linear"], "pack-quantized", 4, 64),
        (["model.layers.0.mlp.down_proj"], "pack-quantized", 4, 32),
        (["re:.*lm_head"], "int-quantized", 8, None),
    ]
    assert config["format"] == "mixed-precision"


def test_what_is_saved_says_by_what_recipe(model: Path) -> None:
    for number, (head, group_size) in enumerate([(None, None), ("none", 32), ("same", 128)]):
        out = model.parent / f"out{number}"
        save(str(model), FORMATS["sym_int4"], out, head, group_size)
        format = {None: FORMATS["sym_int8"], "none": None, "same": FORMATS["sym_int4"]}[head]
        expected = Recipe(FORMATS["sym_int4"], group_size or FORMATS["sym_int4"].group_size, format)
        assert ours.recipe_of(quantization_of(out)) == expected
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (head != "same")


def test_outer_layers_of_another_format_are_saved_as_such(model: Path) -> None:
    out = model.parent / "outer"
    save(str(model), FORMATS["sym_int4"], out, outer="sym_int8")
    recipe = ours.recipe_of(quantization_of(out))
    assert (recipe.outer, recipe.num_layers) == (FORMATS["sym_int8"], 1)
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize(("name", "marked"), [("sym_int4", "compressed-tensors"), ("asym_int4", "ipex_asym_int4")])
def test_experts_that_are_stored_one_by_one_are_saved_as_they_would_be_opened(
    name: str, marked: str, tmp_path: Path
) -> None:
    config = Qwen3MoeConfig(**MIXTURE)
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    save(str(tmp_path / "model"), FORMATS[name], tmp_path / "out")
    original, saved = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    for expert in (0, 3):
        for part in ("gate_proj", "up_proj", "down_proj"):
            layer = f"model.layers.0.mlp.experts.{expert}.{part}"
            tensors = {key.removeprefix(f"{layer}."): saved[key] for key in saved if key.startswith(f"{layer}.")}
            found, expected = from_tensors(FORMATS[name], tensors), quantize(original[f"{layer}.weight"], FORMATS[name])
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scales, expected.scales)
    assert torch.equal(saved["model.layers.0.mlp.gate.weight"], original["model.layers.0.mlp.gate.weight"])
    quantization = quantization_of(tmp_path / "out")
    assert (quantization["quant_method"], quantization[ours.EXPERTS]) == (marked, True)


def test_stacked_experts_stay_as_they_are(tmp_path: Path) -> None:
    config = GptOssConfig(**MIXTURE, layer_types=None)
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    save(str(tmp_path / "model"), FORMATS["sym_int4"], tmp_path / "out")
    original, saved = (load_file(tmp_path / each / "model.safetensors") for each in ("model", "out"))
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.{name}"
        assert torch.equal(saved[key], original[key])
    assert ours.EXPERTS not in quantization_of(tmp_path / "out")


def test_a_saved_mixture_that_lacks_a_layers_experts_is_told(tmp_path: Path) -> None:
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE)).bfloat16().save_pretrained(tmp_path / "model")
    save(str(tmp_path / "model"), FORMATS["sym_int4"], tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file({name: each for name, each in load_file(file).items() if ".experts." not in name}, file)
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"lacks 2 of the model's tensors: model\.layers\.0\.mlp\.experts"):
        check_checkpoint(tmp_path / "out")


def test_a_checkpoint_saved_before_groups_and_heads_were_recorded_is_what_it_was_then() -> None:
    recipe = ours.recipe_of({"quant_method": "ipex_sym_int4", "ipex_vllm_format": "sym_int4"})
    layer, head = Storage(FORMATS["sym_int4"], 64), recipe.storage("lm_head", 128, is_head=True)
    assert (recipe.storage("model.layers.0.mlp.up_proj", 128), head) == (layer, layer)
    assert recipe.storage("model.layers.0.mlp.down_proj", 96) == "96 inputs are no multiple of the group size 64"
    recipe = ours.recipe_of({"quant_method": "ipex_sym_int8", "ipex_vllm_format": "sym_int8"})
    assert recipe.storage("model.layers.0.mlp.down_proj", 96) == Storage(FORMATS["sym_int8"], None)


def test_saving_again_or_over_something_is_refused(model: Path) -> None:
    out = model.parent / "out"
    save(str(model), FORMATS["sym_int8"], out)
    with pytest.raises(ValueError, match=r"is already quantized \(sym_int8\)"):
        save(str(out), FORMATS["sym_int4"], model.parent / "other")
    with pytest.raises(ValueError, match="is not empty"):
        save(str(model), FORMATS["sym_int4"], out)
    with pytest.raises(ValueError, match="there is nothing to save"):
        save(str(model), FORMATS["bf16"], model.parent / "other")


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_checkpoint_without_one_of_its_tensors_is_not_saved(name: str, model: Path) -> None:
    rewrite(model, lambda tensors: tensors.pop(name))
    out = model.parent / "out"
    with pytest.raises(ValueError, match=f"lacks 1 of the model's tensors: {name}"):
        save(str(model), FORMATS["sym_int4"], out)
    assert not out.exists()


def test_a_tensor_of_another_shape_is_not_saved(model: Path) -> None:
    rewrite(model, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64)}))
    with pytest.raises(ValueError, match=r"other shapes than the model's: model\.norm\.weight \(64,\), not \(128,\)"):
        save(str(model), FORMATS["sym_int4"], model.parent / "out")


def test_a_saved_checkpoint_that_lost_a_tensor_is_told(model: Path) -> None:
    out = model.parent / "out"
    save(str(model), FORMATS["asym_int4"], out)
    check_checkpoint(out)
    (out / "model.safetensors.index.json").unlink()
    rewrite(out, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_min"))
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: .*up_proj\.weight_min"):
        check_checkpoint(out)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_checkpoint_in_pytorchs_files_is_saved(is_tied: bool, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tie_word_embeddings=is_tied)
    save(str(model), FORMATS["sym_int4"], tmp_path / "expected")
    tensors = load_file(model / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    save(str(model), FORMATS["sym_int4"], tmp_path / "out")
    expected, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_mistrals_own_layout_is_left_out_and_alone_refused(model: Path) -> None:
    out = model.parent / "out"
    (model / "params.json").write_text("{}")
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    save(str(model), FORMATS["sym_int4"], out)
    assert not (out / "consolidated.safetensors").exists()
    assert not (out / "params.json").exists()
    (model / "model.safetensors").unlink()
    rewritten = {f"mistral.{name}": tensor for name, tensor in load_file(model / "consolidated.safetensors").items()}
    save_file(rewritten, model / "consolidated.safetensors")
    with pytest.raises(ValueError, match="names its tensors otherwise than Transformers does"):
        save(str(model), FORMATS["sym_int4"], model.parent / "other")
    assert not (model.parent / "other").exists()


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no linear layer that could be quantized"):
        save(str(tmp_path / "model"), FORMATS["sym_int4"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_a_checkpoint_is_not_left_behind(model: Path) -> None:
    rewrite(model, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        save(str(model), FORMATS["sym_int4"], model.parent / "out")
    assert not (model.parent / "out").exists()


def test_the_command_knows_the_demo_and_that_a_file_is_no_directory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ipex_vllm.low_bit", "save", "--model-path", "demo", "--low-bit", "sym_int4"]
    result = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    check_checkpoint(tmp_path / "out")
    result = subprocess.run([*command, "--out", str(tmp_path / "out/config.json")], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: --out {tmp_path}/out/config.json is a file: give a directory, new or empty"
    ]


def test_the_command_reports_a_mistake_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ipex_vllm.low_bit", "save", "--model-path", "/no/such", "--low-bit", "sym_int4"]
    result = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot read the configuration of /no/such")


def test_arguments_for_a_checkpoint_in_full_precision(model: Path) -> None:
    assert vllm_arguments(None, str(model), "cpu") == {}
    assert vllm_arguments("fp16", str(model), "cpu") == {"dtype": "float16"}
    assert vllm_arguments("sym_int4", str(model), "cpu") == {"quantization": "ipex_sym_int4"}
    assert vllm_arguments("fp8", str(model), "cpu") == {"quantization": "ipex_fp8_e4m3"}
    with_head = {"quantization": "ipex_sym_int4", "additional_config": {"ipex_vllm_head": "none"}}
    assert vllm_arguments("sym_int4", str(model), "cpu", "none") == with_head


@pytest.mark.parametrize(
    ("low_bit", "head", "device", "message"),
    [
        ("sym_int4", "int3", "cpu", "low-bit format 'int3' is unknown"),
        ("sym_int4", "bf16", "cpu", "bf16 quantizes nothing: the output head cannot have it"),
        ("sym_int4", "sym_int8", "xpu", "sym_int8 has no kernel on XPU, for the output head either"),
        ("bf16", "none", "cpu", "goes with one that quantizes"),
        (None, "none", "cpu", "goes with one that quantizes"),
    ],
)
def test_a_head_that_cannot_be_is_refused_in_one_line(
    low_bit: str | None, head: str, device: str, message: str, model: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        vllm_arguments(low_bit, str(model), device, head)


def test_the_head_of_a_quantized_checkpoint_is_not_chosen_again() -> None:
    with pytest.raises(ValueError, match=r"already quantized .*: leave --low-bit-head out"):
        vllm_arguments("sym_int4", str(IPEX_LLM / "sym_int4"), "cpu", "none")


def test_a_format_that_xpu_has_no_kernel_for_is_refused_with_those_it_has(model: Path) -> None:
    with pytest.raises(ValueError, match=r"nf4 has no kernel on XPU; use one of sym_int4, fp8_e4m3, .*bf16"):
        vllm_arguments("nf4", str(model), "xpu")


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "sym": True}, "sym_int4"),
        ({"quant_method": "awq", "bits": 4, "zero_point": True}, "asym_int4"),
        ({"quant_method": "fp8"}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 8, "symmetric": True}}},
            },
            "sym_int8",
        ),
    ],
)
def test_another_tools_checkpoint_is_used_as_it_is_or_the_conflict_is_one_line(
    quantization: dict[str, object], name: str, tmp_path: Path
) -> None:
    path = with_quantization(tmp_path / "model", quantization)
    assert vllm_arguments(None, path, "cpu") == {}
    assert vllm_arguments(name, path, "cpu") == {}
    with pytest.raises(ValueError, match=rf"already quantized \({quantization['quant_method']}\): leave --low-bit out"):
        vllm_arguments("nf4", path, "cpu")


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4", "sym_int8"])
def test_what_ipex_llm_saved_is_read_bit_for_bit(name: str) -> None:
    original = load_file(IPEX_LLM / "original" / "model.safetensors")
    tensors = dict(ipex_llm.read(IPEX_LLM / name))
    layers = {key.removesuffix(".weight") for key in original if "_proj" in key or "lm_head" in key}
    assert len(layers) == 8
    for layer in layers:
        parts = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{layer}.")}
        expected = quantize(original[f"{layer}.weight"], resolve(name), 64, search=False)
        weight = from_tensors(resolve(name), parts)
        assert torch.equal(weight.scales, expected.scales)
        assert weight.mins is expected.mins is None or torch.equal(weight.mins, expected.mins)
        # ipex-llm rounds the ties of its 8-bit codes the other way.
        ties = (original[f"{layer}.weight"].float() / expected.scales.float().repeat_interleave(64, 1)).frac().abs()
        differs = weight.codes != expected.codes
        assert not differs.any() or (name == "sym_int8" and ((ties[differs] - 0.5).abs() < 1e-4).all())
    assert torch.equal(tensors["model.embed_tokens.weight"].bfloat16(), original["model.embed_tokens.weight"])


def test_arguments_for_what_ipex_llm_saved() -> None:
    expected = {"quantization": "ipex_sym_int4", "load_format": "ipex_llm_low_bit"}
    assert vllm_arguments(None, str(IPEX_LLM / "sym_int4"), "cpu") == expected
    with pytest.raises(ValueError, match=r"already quantized \(sym_int4, saved by ipex-llm\)"):
        vllm_arguments("sym_int8", str(IPEX_LLM / "sym_int4"), "cpu")


def test_an_ipex_llm_format_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "bigdl_transformers_low_bit": "nf3"}))
    with pytest.raises(ValueError, match="saved by ipex-llm in nf3; readable are sym_int4, asym_int4, sym_int8"):
        vllm_arguments(None, str(tmp_path), "cpu")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    source = IPEX_LLM / "sym_int4" / "config.json"
    (tmp_path / "config.json").write_text(source.read_text())
    torch.save({"lm_head.weight": Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        list(ipex_llm.read(tmp_path))
    assert not (tmp_path / "ran").exists()
