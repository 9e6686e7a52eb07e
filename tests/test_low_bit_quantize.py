from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipex_vllm.low_bit.formats import FORMATS, Format, fitting_group_size, unsuitable_reason
from ipex_vllm.low_bit.quantize import QuantizedWeight, dequantize, pack_nibbles, quantize, unpack_nibbles
from ipex_vllm.low_bit.rounding import nearest_float8

QUANTIZED = [row for row in FORMATS.values() if row.kind != "dtype"]
GGML_BLOCKS = Path(__file__).parent / "fixtures" / "ipex_llm_blocks" / "blocks.safetensors"


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(48, 192) * 0.02
    outliers = normal.clone()
    outliers[::3, ::17] *= 100
    constant = normal.clone()
    constant[:8], constant[8:16], constant[16:24] = 0, 0.5, -0.5
    return {"normal": normal, "outliers": outliers, "constant": constant, "denormal": normal * 1e-38}


def halves(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.float16)


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4"])
def test_four_bits_without_search_equal_ipex_llm_bit_for_bit(name: str) -> None:
    fixture = load_file(GGML_BLOCKS)
    mine = quantize(fixture["weight"], FORMATS[name], 64, search=False)
    blocks = fixture[name]
    scales, rest = blocks[..., :2], blocks[..., 2:]
    if name == "asym_int4":
        assert mine.mins is not None
        assert torch.equal(halves(rest[..., :2]).squeeze(-1), mine.mins)
        rest = rest[..., 2:]
    assert torch.equal(halves(scales).squeeze(-1), mine.scales)
    assert torch.equal(torch.cat((rest & 15, rest >> 4), -1).flatten(1), mine.codes)


def test_eight_bits_in_groups_of_64_equal_ipex_llm_bit_for_bit() -> None:
    fixture = load_file(GGML_BLOCKS)
    mine = quantize(fixture["weight"], FORMATS["sym_int8"], 64, search=False)
    blocks = fixture["sym_int8"]
    assert torch.equal(blocks[..., :4].contiguous().view(torch.float32).squeeze(-1), mine.scales)
    assert torch.equal(blocks[..., 4:].contiguous().view(torch.int8).flatten(1), mine.codes)


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
@pytest.mark.parametrize("kind", ["normal", "outliers", "constant"])
def test_no_weight_is_further_off_than_half_a_step(format: Format, kind: str) -> None:
    weight = weights()[kind]
    quantized = quantize(weight, format, search=False)
    groups = weight.view(48, quantized.scales.shape[1], -1)
    error = (dequantize(quantized).view_as(groups) - groups).abs()
    if format.kind == "float8":
        mantissa = 2 if format.name == "fp8_e5m2" else 3
        step = groups.abs() * 2.0**-mantissa + quantized.scales.unsqueeze(-1) * 2.0**-8
    elif format.values is not None:
        gaps = torch.tensor(format.values).diff().max()
        # The lowest code reaches one step further than the highest, and the scale itself is rounded.
        step = quantized.scales.float().abs().unsqueeze(-1) * gaps * (2.02 if format.symmetric else 1.02)
    else:
        step = quantized.scales.unsqueeze(-1) * 1.001
    allowance = groups.abs().amax(-1, keepdim=True) * 2.0**-11
    assert (error <= step / 2 + allowance).all()


def weighted_error(weight: torch.Tensor, importance: torch.Tensor, quantized: QuantizedWeight) -> float:
    return ((dequantize(quantized) - weight).square() * importance).sum().item()


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_the_search_lowers_the_error_of_the_inputs_that_matter(format: Format, kind: str) -> None:
    weight, importance = weights()[kind], torch.linspace(-3, 3, 192).exp()
    nearest, searched = (quantize(weight, format, None, importance, search=search) for search in (False, True))
    assert weighted_error(weight, importance, searched) < weighted_error(weight, importance, nearest)


@pytest.mark.parametrize("name", ["sym_int4", "asym_int4", "sym_int5", "asym_int5"])
def test_scaled_inputs_lower_it_further(name: str) -> None:
    weight, importance = weights()["normal"], torch.linspace(-3, 3, 192).exp()
    plain = quantize(weight, FORMATS[name], None, importance)
    scaled = quantize(weight, FORMATS[name], None, importance, scales_inputs=True)
    assert plain.input_scales is None
    assert scaled.input_scales is not None
    assert scaled.input_scales.log().mean().abs() < 1e-5
    assert weighted_error(weight, importance, scaled) < weighted_error(weight, importance, plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_fast_rounding_to_8_bit_floats_is_pytorchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(4096) * 10.0**power for power in range(-9, 3)])
    every = torch.arange(256).to(torch.uint8).view(dtype).float()
    values = torch.cat([values, every[every.isfinite()], (every[1:] + every[:-1])[:100] / 2]).nan_to_num()
    assert torch.equal(nearest_float8(values, dtype), values.to(dtype).float())


def test_weights_of_zeros_and_unused_inputs_are_quantized_all_the_same() -> None:
    weight = weights()["normal"]
    weight[:, 64:96] = 0
    importance = torch.ones(192)
    importance[:40] = 0
    for format in QUANTIZED:
        rounded = dequantize(quantize(weight, format, None, importance, scales_inputs=True))
        assert rounded.isfinite().all()
        assert not rounded[:, 64:96].any() or format.kind == "float8"


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
def test_zeros_stay_zeros_and_denormals_stay_finite(format: Format) -> None:
    zeros = torch.zeros(4, 128)
    assert torch.equal(dequantize(quantize(zeros, format)), zeros)
    assert dequantize(quantize(weights()["denormal"], format)).isfinite().all()


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_weight_that_no_scale_can_hold_is_refused(format: Format, bad: float) -> None:
    weight = weights()["normal"]
    weight[5, 7] = bad
    if bad == 3e38 and format.group_size is None:
        assert dequantize(quantize(weight, format)).isfinite().all()
    else:
        with pytest.raises(ValueError, match="not finite, or too large"):
            quantize(weight, format)


def test_rows_are_quantized_independently_of_how_the_weight_is_cut() -> None:
    weight = torch.randn(700, 512)
    whole = quantize(weight, FORMATS["sym_int4"])
    for part in (slice(0, 1), slice(1, 2), slice(300, 700)):
        piece = quantize(weight[part], FORMATS["sym_int4"])
        assert torch.equal(piece.codes, whole.codes[part])
        assert torch.equal(piece.scales, whole.scales[part])


def test_a_group_that_does_not_divide_the_inputs_is_refused_with_both_numbers() -> None:
    assert unsuitable_reason(FORMATS["sym_int4"], 100) == "100 inputs are no multiple of the group size 32"
    with pytest.raises(ValueError, match=r"shape \(8, 100\): 100 inputs are no multiple"):
        quantize(torch.zeros(8, 100), FORMATS["sym_int4"])


@pytest.mark.parametrize(
    ("name", "inputs", "asked", "expected"),
    [
        ("sym_int4", 256, 128, 128),
        ("sym_int4", 192, 128, 64),
        ("sym_int4", 96, 128, 32),
        ("sym_int4", 96, 64, 32),
        ("sym_int4", 96, 32, 32),
        ("sym_int8", 96, None, None),
        ("sym_int8", 96, 32, 32),
        ("sym_int8", 100, 32, None),
        ("fp8_e4m3", 96, 0, None),
    ],
)
def test_a_group_that_does_not_divide_the_inputs_gives_way_to_one_that_does(
    name: str, inputs: int, asked: int | None, expected: int | None
) -> None:
    assert unsuitable_reason(FORMATS[name], inputs, asked) is None
    assert fitting_group_size(FORMATS[name], inputs, asked) == expected
    assert quantize(torch.randn(8, inputs), FORMATS[name], asked).group_size == expected


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
def test_smaller_groups_are_closer_to_the_weight(format: Format) -> None:
    weight = weights()["normal"]
    errors = [(dequantize(quantize(weight, format, size)) - weight).norm() for size in (32, 64, 192)]
    # A float's relative precision is the same at every scale.
    assert errors[0] < errors[1] < errors[2] or format.kind == "float8"


def test_a_dtype_is_not_a_quantized_format() -> None:
    with pytest.raises(ValueError, match="bf16 is a dtype"):
        quantize(torch.zeros(8, 64), FORMATS["bf16"])


def test_packed_nibbles_unpack_to_the_same_codes() -> None:
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    words = pack_nibbles(codes)
    assert words.shape == (3, 8)
    assert words[0, 0].item() & 15 == codes[0, 0].item()
    assert torch.equal(unpack_nibbles(words), codes)
