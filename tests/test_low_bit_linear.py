"""Every kernel against dequantizing in float32 and multiplying, on what each does to the activations."""

import pytest
import torch

from ipex_vllm.low_bit.formats import FORMATS, Format
from ipex_vllm.low_bit.kernels import vllm_cpu, w4a8, w8a8, w8a16
from ipex_vllm.low_bit.kernels.base import LowBitLinear
from ipex_vllm.low_bit.linear import KERNELS, choose_kernel, make_linear
from ipex_vllm.low_bit.quantize import dequantize, quantize

QUANTIZED = [row for row in FORMATS.values() if row.kind != "dtype"]
SHAPES = [(64, 128), (33, 128), (96, 1024), (64, 384)]
TOKENS = [1, 2, 3, 4, 5, 8, 16, 17, 64, 129, 257]


def available(dtype: torch.dtype) -> list[tuple[type[LowBitLinear], Format, int | None]]:
    """Every kernel of this machine with every format and group size that it computes."""
    sizes = (None, 32, 64, 128)
    triples = [(k, f, size) for k in KERNELS for f in QUANTIZED for size in sizes if size or f.bits == 8]
    return [(k, f, size) for k, f, size in triples if k.unavailable_reason(f, size, 64, dtype) is None]


def activations(tokens: int, features: int) -> dict[str, torch.Tensor]:
    normal = torch.randn(tokens, features)
    outliers = normal.clone()
    outliers[:, ::29] *= 50
    return {"normal": normal, "outliers": outliers, "zeros": torch.zeros_like(normal), "denormal": normal * 1e-39}


def allowed_error(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half an 8-bit step on each activation, added in quadrature with a margin of 4, and the rounding of the result.

    Some kernels round activations to 8 bits, symmetric or with a zero point; none does worse than that.
    """
    step = x.abs().amax(1, keepdim=True) / 127
    from_activations = 4 * step / 2 * weight.norm(dim=1) / 3**0.5
    precision = torch.finfo(dtype).eps
    return from_activations + precision * (x.abs() @ weight.abs().t()) + 2 * precision + 1e-30


@pytest.mark.parametrize(
    ("kernel", "format", "group_size"),
    available(torch.bfloat16),
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "name", None) or str(value),
)
@pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "denormal"])
def test_a_kernel_is_within_its_rounding_of_the_float32_product(
    kernel: type[LowBitLinear], format: Format, group_size: int | None, kind: str
) -> None:
    torch.manual_seed(0)
    for out_features, in_features in SHAPES:
        if kernel.unavailable_reason(format, group_size, out_features, torch.bfloat16):
            continue
        weight = torch.randn(out_features, in_features) * 0.02
        weight[0], weight[1, ::5], weight[2] = 0, 3.0, 0.25
        quantized = quantize(weight, format, group_size or 0)
        linear, reference = kernel(quantized, torch.bfloat16), dequantize(quantized)
        bias = torch.randn(out_features).bfloat16()
        for tokens in TOKENS:
            x = activations(tokens, in_features)[kind].bfloat16()
            expected = x.float() @ reference.t()
            allowed = allowed_error(x.float(), reference, torch.bfloat16)
            assert ((linear(x).float() - expected).abs() <= allowed).all()
            with_bias = expected + bias.float()
            allowed = allowed + with_bias.abs() * 2**-8
            assert ((linear(x, bias).float() - with_bias).abs() <= allowed).all()


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_leading_dimensions_and_dtype_of_the_activations_are_kept(format: Format, dtype: torch.dtype) -> None:
    linear = make_linear(quantize(torch.randn(64, 128), format), dtype)
    y = linear(torch.randn(2, 3, 128, dtype=dtype))
    assert (y.shape, y.dtype) == ((2, 3, 64), dtype)
    assert linear(torch.randn(0, 128, dtype=dtype)).shape == (0, 64)


@pytest.mark.parametrize("format", QUANTIZED, ids=lambda row: row.name)
def test_torch_compile_takes_the_layer_whole_and_gives_the_same_numbers(format: Format) -> None:
    torch._dynamo.reset()  # the formats before this one count against dynamo's limit of recompilations
    linear = make_linear(quantize(torch.randn(64, 128), format), torch.bfloat16)
    compiled = torch.compile(lambda x: linear(x * 2) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 7):
        x = torch.randn(tokens, 128).bfloat16()
        assert torch.equal(compiled(x), linear(x * 2) + 1)


AVX512_BF16 = frozenset({"onednn_scaled_mm", "cpu_gemm_wna16", "int4_scaled_mm_cpu"})
AVX512 = frozenset({"onednn_scaled_mm", "cpu_gemm_wna16"})
AVX2 = frozenset({"onednn_scaled_mm"})


@pytest.mark.parametrize(
    ("format", "operators", "is_built", "dtype", "outputs", "kernel"),
    [
        ("sym_int4", AVX2, True, torch.bfloat16, 64, "w4a8"),
        ("sym_int4", AVX512_BF16, True, torch.bfloat16, 64, "w4a8"),
        ("sym_int4", AVX512_BF16, True, torch.float32, 96, "w4a8"),
        ("sym_int4", AVX512_BF16, False, torch.bfloat16, 64, "vllm-w4a8"),
        ("sym_int4", AVX512, False, torch.bfloat16, 64, "vllm-w4a16"),
        ("sym_int4", AVX512, False, torch.float32, 64, "dequantize"),
        ("asym_int4", AVX512_BF16, True, torch.bfloat16, 64, "w4a8"),
        ("asym_int4", AVX512_BF16, False, torch.bfloat16, 64, "dequantize"),
        ("sym_int8", AVX2, True, torch.bfloat16, 33, "w8a8"),
        ("sym_int8", AVX512_BF16, False, torch.float32, 33, "onednn-w8a8"),
        ("sym_int8", AVX2, False, torch.float32, 33, "dequantize"),  # oneDNN there: -10.9 for -2.6, seen on Zen 3
        ("sym_int8", frozenset(), True, torch.bfloat16, 64, "w8a8"),
        ("sym_int8", frozenset(), False, torch.bfloat16, 64, "dequantize"),
        ("fp8_e4m3", AVX512_BF16, True, torch.bfloat16, 64, "w8a16"),
        ("fp8_e5m2", frozenset(), True, torch.float32, 33, "w8a16"),
        ("fp8_e4m3", AVX512_BF16, False, torch.bfloat16, 64, "dequantize"),
        ("nf4", frozenset(), True, torch.bfloat16, 64, "w4a8"),
        ("fp4", AVX512_BF16, True, torch.float32, 33, "w4a8"),
        ("nf4", AVX512_BF16, False, torch.bfloat16, 64, "dequantize"),
        ("fp6", AVX512_BF16, True, torch.bfloat16, 64, "dequantize"),
    ],
)
def test_the_kernel_follows_from_the_format_the_machine_the_dtype_and_the_shape(
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    operators: frozenset[str],
    is_built: bool,
    dtype: torch.dtype,
    outputs: int,
    kernel: str,
) -> None:
    monkeypatch.setattr(vllm_cpu, "operators", lambda: operators)
    monkeypatch.setattr(vllm_cpu, "has_vnni", lambda: operators == AVX512_BF16)
    for ours in (w4a8, w8a8, w8a16):
        monkeypatch.setattr(ours, "unavailable_reason", lambda: None if is_built else "was not built")
    row = FORMATS[format]
    assert choose_kernel(row, row.group_size, outputs, dtype).kernel == kernel


@pytest.mark.parametrize(
    ("name", "group_size", "kernel"),
    [
        ("sym_int4", 32, "w4a8"),
        ("sym_int4", 128, "w4a8"),
        ("sym_int4", 16, "dequantize"),
        ("sym_int8", None, "w8a8"),
        ("sym_int8", 32, "w8a8"),
        ("sym_int8", 64, "w8a8"),
        ("sym_int8", 128, "dequantize"),
        ("fp8_e4m3", 64, "w8a16"),
        ("fp8_e4m3", 16, "dequantize"),
    ],
)
def test_a_group_that_a_kernel_does_not_take_is_for_another(
    name: str, group_size: int | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_cpu, "operators", frozenset)
    for ours in (w4a8, w8a8, w8a16):
        monkeypatch.setattr(ours, "unavailable_reason", lambda: None)
    assert choose_kernel(FORMATS[name], group_size, 64, torch.bfloat16).kernel == kernel
