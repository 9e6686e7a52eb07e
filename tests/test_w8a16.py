"""The fp8 kernel: every result against float64, and the same bits for any batch and number of threads."""

import itertools
from pathlib import Path

import pytest
import torch

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.kernels import w8a16
from ipex_vllm.low_bit.quantize import QuantizedWeight, dequantize

WEIGHT_DTYPES = [*w8a16.WEIGHT_DTYPES]
DTYPES = [*native.DTYPES]
# Outputs, inputs, and the inputs that share a scale.
SHAPES = [(1, 1, 0), (31, 2, 0), (32, 15, 0), (33, 16, 0), (96, 640, 0), (70, 1001, 0)]
SHAPES += [(33, 96, 32), (70, 192, 64), (96, 640, 128)]
EVERY_ROWS = [*range(1, 34), 127, 128, 129, 257]
# The rounding of the result itself, and the smallest difference that its dtype knows.
PRECISION = {torch.float32: (0, 0), torch.bfloat16: (2**-8, 0), torch.float16: (2**-11, 2**-25)}


def random_weight(outputs: int, inputs: int, dtype: torch.dtype, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of all magnitudes, subnormal ones and zeros among them, and a scale per output, or group of its inputs."""
    codes = torch.randint(0, w8a16.LARGEST_CODES[dtype] + 1, (outputs, inputs), dtype=torch.uint8)
    signs = torch.randint(0, 2, (outputs, inputs), dtype=torch.uint8) << 7
    return (codes | signs).view(dtype), torch.rand(outputs, inputs // group if group else 1) * 0.01


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The product in float64, and the sum of its terms' magnitudes."""
    weight = codes.double() * scales.double().repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)
    return torch.stack([x.double() @ weight.T, x.double().abs() @ weight.abs().T])


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    result, magnitude = expected
    relative, absolute = PRECISION[out.dtype]
    error, bound = (out.double() - result).abs(), relative * result.abs() + 2e-6 * magnitude + absolute
    assert (error <= bound).all(), f"off by up to {(error - bound).max()} beyond the tolerance"


def isas(dtype: torch.dtype) -> list[int]:
    """The instruction sets of this CPU that take such activations."""
    flags = Path("/proc/cpuinfo").read_text().split()
    known = [isa for isa, flag in ((1, "avx2"), (2, "avx512bw"), (3, "avx512_bf16")) if flag in flags]
    return [isa for isa in known if isa < 3 or dtype == torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_was_built_and_runs_here(dtype):
    assert w8a16.unavailable_reason() is None
    assert w8a16.isa(dtype) == w8a16.ISAS[isas(dtype)[-1]]


@pytest.mark.parametrize(
    ("dtype", "isa"), [(dtype, isa) for dtype in DTYPES for isa in isas(dtype)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_every_number_of_rows_and_odd_sizes(weight_dtype, dtype, isa):
    for outputs, inputs, group in SHAPES:
        codes, scales = random_weight(outputs, inputs, weight_dtype, group)
        packed = w8a16.pack(codes, scales)
        # A tile of 32 outputs, for each group: a float32 scale each, then 64 bytes for each two inputs.
        assert packed.numel() == -(-outputs // 32) * (128 * scales.shape[1] + -(-inputs // 2) * 64)
        x = torch.randn(max(EVERY_ROWS), inputs).to(dtype)
        expected = reference(x, codes, scales)
        for rows in EVERY_ROWS:
            out = w8a16.linear(x[:rows], packed, None, outputs, group, weight_dtype, isa)
            assert_close(out, expected[:, :rows])


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_its_number(weight_dtype, dtype):
    # One input at a time: the outputs are all codes, twice over, so that each stands in both halves of a tile.
    numbers = torch.arange(w8a16.LARGEST_CODES[weight_dtype] + 1, dtype=torch.uint8)
    codes = torch.cat([numbers, numbers | 0x80]).repeat(2)[1:, None].view(weight_dtype).expand(-1, 3).contiguous()
    packed = w8a16.pack(codes, torch.ones(len(codes), 1))
    for isa in isas(dtype):
        out = w8a16.linear(torch.eye(3, dtype=dtype), packed, None, len(codes), w8a16.ROW, weight_dtype, isa)
        assert torch.equal(out, codes.T.to(dtype))


@pytest.mark.parametrize("group", [w8a16.ROW, 32])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_the_weights_are_those_that_dequantizing_gives(name, group):
    codes, scales = random_weight(64, 64, getattr(torch, FORMATS[name].dtype), group)
    out = w8a16.linear(torch.eye(64), w8a16.pack(codes, scales), None, 64, group, codes.dtype)
    assert torch.equal(out.T, dequantize(QuantizedWeight(FORMATS[name], codes, scales)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "same"])
def test_dtypes_and_bias(dtype, bias_dtype):
    codes, scales = random_weight(70, 256, torch.float8_e4m3fn)
    x = torch.randn(2, 5, 256).to(dtype)
    bias = None if bias_dtype is None else torch.randn(70).to(dtype if bias_dtype == "same" else bias_dtype)
    out = w8a16.linear(x, w8a16.pack(codes, scales), bias, 70, w8a16.ROW, codes.dtype)
    assert out.shape == (2, 5, 70)
    assert out.dtype == dtype
    expected = reference(x.flatten(0, 1), codes, scales)
    if bias is not None:
        expected += torch.stack([bias.double(), bias.double().abs()])[:, None]
    assert_close(out.flatten(0, 1), expected)


@pytest.mark.parametrize(("inputs", "group"), [(1001, w8a16.ROW), (640, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype, inputs, group):
    codes, scales = random_weight(96, inputs, torch.float8_e4m3fn, group)
    packed = w8a16.pack(codes, scales)
    x = torch.randn(130, inputs).to(dtype)
    for isa in isas(dtype):
        together = w8a16.linear(x, packed, None, 96, group, codes.dtype, isa)
        alone = [w8a16.linear(row, packed, None, 96, group, codes.dtype, isa) for row in x.split(1)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype, threads):
    codes, scales = random_weight(480, 1152, torch.float8_e5m2, 64)
    packed = w8a16.pack(codes, scales)
    x = torch.randn(300, 1152).to(dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append([w8a16.linear(x[:rows], packed, None, 480, 64, codes.dtype) for rows in (1, 9, 300)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.skipif(len(isas(torch.float32)) < 2, reason="this CPU has no AVX-512")
@pytest.mark.parametrize(("inputs", "group"), [(1001, w8a16.ROW), (640, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_avx2_and_avx512_give_the_same_bits(dtype, inputs, group):
    codes, scales = random_weight(96, inputs, torch.float8_e4m3fn, group)
    packed = w8a16.pack(codes, scales)
    x = (torch.randn(20, inputs) * torch.logspace(-3, 3, 20)[:, None]).to(dtype)
    avx2, avx512 = (w8a16.linear(x, packed, None, 96, group, codes.dtype, isa) for isa in (1, 2))
    assert torch.equal(avx2, avx512)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_rows_stay_to_themselves(weight_dtype, dtype):
    codes, scales = random_weight(64, 257, weight_dtype)
    codes[:, 256] = 2.0
    packed = w8a16.pack(codes, scales)
    smaller, larger = (2.0**-15, 1) if dtype == torch.float16 else (2.0**-90, 2.0**100)
    x = torch.randn(6, 257).to(dtype)
    for isa in isas(dtype):
        usual = w8a16.linear(x, packed, None, 64, w8a16.ROW, weight_dtype, isa)
        extreme = x.clone()
        extreme[1] = 0
        extreme[2] *= smaller
        extreme[3] *= larger
        extreme[4, 3] = float("nan")
        extreme[5, 256] = float("inf")
        out = w8a16.linear(extreme, packed, None, 64, w8a16.ROW, weight_dtype, isa)
        assert torch.equal(out[0], usual[0])
        assert out[1].eq(0).all()
        assert_close(out[2:4], reference(extreme[2:4], codes, scales))
        assert out[4].isnan().all()
        assert out[5].isinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales(dtype):
    """What the quantizer makes of the largest weights that there are, and of ones near the smallest."""
    x = torch.ones(1, 4, dtype=dtype)
    codes = torch.tensor([[1.0, -2.0, 448.0, 0.0]]).to(torch.float8_e4m3fn)
    for scale in (2.0**118, 2.0**-110):
        expected = torch.tensor([[447.0 * scale]]).to(dtype)
        packed = w8a16.pack(codes, torch.tensor([[scale]]))
        assert torch.equal(w8a16.linear(x, packed, None, 1, w8a16.ROW, codes.dtype), expected)


def test_no_rows_and_strided_rows():
    codes, scales = random_weight(64, 128, torch.float8_e4m3fn)
    packed = w8a16.pack(codes, scales)
    assert w8a16.linear(torch.empty(0, 128), packed, None, 64, w8a16.ROW, codes.dtype).shape == (0, 64)
    x = torch.randn(5, 256)[:, ::2]
    strided = w8a16.linear(x, packed, None, 64, w8a16.ROW, codes.dtype)
    assert torch.equal(strided, w8a16.linear(x.contiguous(), packed, None, 64, w8a16.ROW, codes.dtype))


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_bad_weights_are_refused(weight_dtype):
    codes, scales = random_weight(64, 128, weight_dtype)
    for bad_scales in (scales[:32], scales.flatten(), torch.ones(64, 3), torch.ones(64, 8)):
        with pytest.raises(ValueError, match="need a scale per output"):
            w8a16.pack(codes, bad_scales)
    with pytest.raises(ValueError, match="too large, or not finite"):
        w8a16.pack(codes, scales * float("inf"))
    for sign, code in itertools.product((0, 0x80), range(w8a16.LARGEST_CODES[weight_dtype] + 1, 0x80)):
        bad = codes.clone()
        bad.view(torch.uint8)[3, 5] = sign | code
        assert not bad.double().isfinite().all()
        with pytest.raises(ValueError, match="infinite or not a number"):
            w8a16.pack(bad, scales)


def test_bad_calls_are_refused():
    codes, scales = random_weight(64, 128, torch.float8_e4m3fn)
    packed = w8a16.pack(codes, scales)
    x = torch.randn(1, 128)
    with pytest.raises(RuntimeError, match="are not"):
        w8a16.linear(x[:, :64], packed, None, 64, w8a16.ROW, codes.dtype)
    with pytest.raises(RuntimeError, match="not divided by 48"):
        w8a16.linear(x, packed, None, 64, 48, codes.dtype)
    with pytest.raises(RuntimeError, match="bias of 63"):
        w8a16.linear(x, packed, torch.zeros(63), 64, w8a16.ROW, codes.dtype)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        w8a16.linear(x.double(), packed, None, 64, w8a16.ROW, codes.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_the_operator_compiles_into_one_graph(weight_dtype, dtype):
    torch._dynamo.reset()
    packed = w8a16.pack(*random_weight(64, 128, weight_dtype))
    bias = torch.randn(64)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(w8a16.linear(x * 2, packed, bias, 64, w8a16.ROW, weight_dtype))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4, 9):
        x = torch.randn(rows, 128).to(dtype)
        assert torch.equal(compiled(x), layer(x))
    arguments = (x, packed, bias, 64, w8a16.ROW, w8a16.WEIGHT_DTYPES[weight_dtype], 0)
    operator = torch.ops.ipex_vllm.w8a16_linear.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
