"""What becomes of each layer, and the bytes that it takes."""

import math
import sys
from collections.abc import Sequence
from subprocess import run
from typing import Any

import pytest
import torch

from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.layout import to_tensors
from ipex_vllm.low_bit.quantize import quantize
from ipex_vllm.low_bit.recipe import Storage, count_layers, on_load, on_save, summarize_kept
from ipex_vllm.low_bit.sizes import loaded_bytes

INT4, INT8, FP8 = FORMATS["sym_int4"], FORMATS["sym_int8"], FORMATS["fp8_e4m3"]
LAYERS = {
    "model.layers.0.self_attn.q_proj.weight": (128, 128),
    "model.layers.0.mlp.down_proj.weight": (128, 192),
    "model.layers.0.mlp.gate_proj.weight": (192, 128),
    "model.layers.0.input_layernorm.weight": (128,),
    "model.embed_tokens.weight": (320, 128),
    "lm_head.weight": (320, 128),
}


@pytest.mark.parametrize(
    "name",
    [
        "visual.blocks.0.attn.qkv",  # Qwen-VL in vLLM
        "model.visual.merger.mlp.0",  # and in its checkpoints
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",  # LLaVA, Gemma 3
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_a_vision_tower_stays_as_it_is(name: str) -> None:
    assert on_load(INT4).storage(name, 128) == "a vision tower is not quantized"
    assert on_load(INT4).storage(name.replace("vis", "lis"), 128) == Storage(INT4, 32)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate",
        "model.layers.3.block_sparse_moe.gate",
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.0.mlp.router",
        "model.layers.0.feed_forward.router",
        "encoder.block.1.layer.1.mlp.router.classifier",
    ],
)
def test_what_chooses_a_tokens_experts_is_never_quantized(name: str) -> None:
    for row in (INT4, INT8):
        assert on_load(row).storage(name, 128) == "a router is not quantized"


@pytest.mark.parametrize("name", ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.gate_up_proj", "gate_proj"])
def test_a_gated_mlp_has_no_router(name: str) -> None:
    assert on_load(INT4).storage(name, 128) == Storage(INT4, INT4.group_size)


@pytest.mark.parametrize("row", [row for row in FORMATS.values() if row.kind != "dtype"], ids=lambda row: row.name)
def test_the_head_has_eight_bits_by_default(row) -> None:
    assert on_load(row).storage("lm_head", 128, is_head=True) == Storage(INT8, 32)
    assert on_save(row).storage("lm_head", 128, is_head=True) == Storage(INT8, None)


def test_on_a_gpu_the_head_has_a_format_with_a_kernel_there_or_none_and_the_reason_is_said() -> None:
    assert on_load(FP8, device="xpu").head is FP8
    assert on_load(INT4, "same", "xpu").head is INT4
    assert on_load(INT4, device="xpu").storage("lm_head", 128, is_head=True) == (
        "there is no kernel for 8-bit integers on XPU"
    )


def test_the_first_and_the_last_layer_may_have_a_format_of_their_own() -> None:
    names = [f"model.layers.{number}.mlp.up_proj" for number in range(12)]
    recipe = on_load(INT4, outer="sym_int8", num_layers=count_layers([*names, "lm_head"]))
    stored = [recipe.storage(name, 128) for name in names]
    assert stored == [Storage(INT8, 32), *[Storage(INT4, 32)] * 10, Storage(INT8, 32)]
    assert recipe.storage("lm_head", 128, is_head=True) == Storage(INT8, 32)
    with pytest.raises(ValueError, match="bf16 quantizes nothing: the first and the last layer cannot have it"):
        on_load(INT4, outer="bf16", num_layers=12)
    with pytest.raises(ValueError, match="nf4 has no kernel on XPU, for the first and the last layer either"):
        on_load(INT4, device="xpu", outer="nf4", num_layers=12)


def test_what_stays_is_said_in_a_line_for_each_reason() -> None:
    kept = [("a", "too wide"), ("b", "a router"), ("c", "too wide"), ("d", "too wide")]
    assert list(summarize_kept(kept)) == ["not quantized: a and 2 more (too wide)", "not quantized: b (a router)"]


def checkpoint(shapes: dict[str, Sequence[int]], itemsize: int = 2) -> dict[str, tuple[Sequence[int], int]]:
    return {name: (shape, itemsize) for name, shape in shapes.items()}


def bytes_of(shape: Sequence[int], storage: Storage) -> int:
    """Those of the tensors of such a weight."""
    tensors = to_tensors(quantize(torch.randn(*shape), storage.format, storage.group_size or 0))
    total = sum(tensor.nbytes for name, tensor in tensors.items() if name != "weight_shape")
    # The kernel keeps the scales of groups in two bytes each.
    return total - (tensors["weight_scale"].nbytes // 2 if storage == Storage(INT8, 32) else 0)


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4", "sym_int8", "fp8_e4m3", "nf4", "sym_int5"])
@pytest.mark.parametrize("head", [None, "same", "none"])
def test_the_bytes_are_those_of_the_codes_and_scales_and_of_all_that_stays(name: str, head: str | None) -> None:
    recipe = on_load(FORMATS[name], head)
    expected = 0
    for key, shape in LAYERS.items():
        storage: Storage | str = ""
        if len(shape) == 2 and "embed" not in key:
            storage = recipe.storage(key.removesuffix(".weight"), shape[1], is_head=key.startswith("lm_head"))
        if isinstance(storage, str):
            expected += 2 * math.prod(shape)
            continue
        expected += bytes_of(shape, storage)
    assert loaded_bytes(checkpoint(LAYERS), name, head=head) == expected


def test_outer_layers_are_counted_as_they_are_stored() -> None:
    layers = {f"model.layers.{number}.mlp.up_proj.weight": (128, 64) for number in range(3)}
    inner, outer = (bytes_of((128, 64), Storage(format, 32)) for format in (INT4, INT8))
    assert loaded_bytes(checkpoint(layers), "sym_int4", outer="sym_int8") == inner + 2 * outer


def test_unquantized_a_model_takes_what_its_elements_do() -> None:
    elements = sum(math.prod(shape) for shape in LAYERS.values())
    assert loaded_bytes(checkpoint(LAYERS), None) == 2 * elements
    assert loaded_bytes(checkpoint(LAYERS, itemsize=4), "bf16") == 2 * elements
    assert loaded_bytes(checkpoint(LAYERS), "fp32") == 4 * elements


def test_a_tied_head_takes_bytes_of_its_own_only_if_it_is_quantized() -> None:
    tied = {name: shape for name, shape in LAYERS.items() if name != "lm_head.weight"}
    assert loaded_bytes(checkpoint(tied), None, is_tied=True) == loaded_bytes(checkpoint(tied), None)
    for head in (None, "same"):
        untied = loaded_bytes(checkpoint(LAYERS), "sym_int4", head=head)
        assert loaded_bytes(checkpoint(tied), "sym_int4", head=head, is_tied=True) == untied
        # Some checkpoints have the head all the same.
        assert loaded_bytes(checkpoint(LAYERS), "sym_int4", head=head, is_tied=True) == untied
    head_bytes = 2 * 320 * 128
    untied = loaded_bytes(checkpoint(LAYERS), "sym_int4", head="none")
    assert loaded_bytes(checkpoint(tied), "sym_int4", head="none", is_tied=True) == untied - head_bytes


def test_experts_are_counted_as_they_are_stored_and_routers_as_they_are() -> None:
    experts = {
        "model.layers.0.mlp.experts.0.down_proj.weight": (128, 192),
        "model.layers.0.mlp.experts.gate_up_proj": (8, 384, 128),
        "model.layers.0.block_sparse_moe.output_linear.weight": (8, 128, 192),
    }
    others = {
        "model.layers.0.mlp.gate.weight": (8, 128),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (8, 384),
        "model.layers.0.mlp.experts.1.down_proj.weight": (128, 48),
    }

    def more(name: str, **options: Any) -> int:
        with_experts = loaded_bytes(checkpoint(LAYERS | experts | others), name, **options)
        return with_experts - loaded_bytes(checkpoint(LAYERS), name, **options)

    kept = 2 * sum(math.prod(shape) for shape in others.values())
    for name, group_size in (("sym_int4", 32), ("asym_int4", 32), ("sym_int8", 32), ("nf4", 32), ("fp8_e4m3", 64)):
        storage = Storage(FORMATS[name], group_size)
        matrices = [shape if len(shape) == 2 else (shape[0] * shape[1], shape[2]) for shape in experts.values()]
        assert more(name) == kept + sum(bytes_of(shape, storage) for shape in matrices)
    # No kernel: they stay.
    assert more("fp6") == kept + 2 * sum(math.prod(shape) for shape in experts.values())
    assert more("sym_int4", device="xpu") == kept + 2 * sum(math.prod(shape) for shape in experts.values())
    shared = {"model.layers.0.mlp.shared_experts.down_proj.weight": (128, 192)}
    added = loaded_bytes(checkpoint(LAYERS | shared), "sym_int4") - loaded_bytes(checkpoint(LAYERS), "sym_int4")
    assert added == bytes_of((128, 192), Storage(INT4, INT4.group_size))


def test_a_layer_that_no_group_fits_is_counted_as_it_is() -> None:
    assert loaded_bytes({"down_proj.weight": ((128, 100), 2)}, "sym_int4") == 2 * 128 * 100


def test_the_recipe_and_the_sizes_are_read_without_pytorch() -> None:
    code = "import ipex_vllm.low_bit.recipe, ipex_vllm.low_bit.sizes, sys; assert 'torch' not in sys.modules"
    assert run([sys.executable, "-c", code]).returncode == 0
