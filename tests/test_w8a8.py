"""The W8A8 kernel: every result against float64, and the same bits for any batch, thread count, instruction set."""

import pytest
import torch

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.kernels import w8a8
from tests.int8_reference import assert_close, isas, product, several_isas

GROUPS = [w8a8.ROW, *w8a8.GROUP_SIZES]
# Outputs and inputs of models' linear layers, and odd ones that only a scale per output takes.
SHAPES = [(2048, 2048), (5632, 2048), (2048, 5632), (4096, 14336), (1152, 896), (576, 576), (1536, 576)]
ODD_SHAPES = [(1, 1), (31, 2), (33, 65), (70, 1001)]
EVERY_ROWS = [*range(1, 130), 255, 256, 257, 1000]


def random_weight(outputs: int, inputs: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    scales = torch.rand(outputs, inputs // group if group else 1) * 0.001
    return codes, scales.half().float() if group else scales


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The product in float64 with rounded activations, and the sum of its terms' magnitudes."""
    group = codes.shape[1] // scales.shape[1]
    weight = codes.double() * scales.double().repeat_interleave(group, 1)
    return product(x, weight, 32 if group == 32 else 64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_kernel_was_built_and_runs_here():
    assert w8a8.unavailable_reason() is None
    assert w8a8.isa(1000) == w8a8.ISAS[isas()[-1]]
    assert w8a8.isa(1) == w8a8.ISAS[min(isas()[-1], 3)], "AMX is for many rows"


@pytest.mark.parametrize("group", GROUPS)
def test_every_number_of_rows(group):
    codes, scales = random_weight(96, 640, group)
    packed = w8a8.pack(codes, scales)
    # Tiles of 32 outputs: a byte for each code, and a float16 for each output and group, or a float32 for each output.
    assert packed.numel() == 96 * 640 + 96 * (640 // group * 2 if group else 4)
    x = torch.randn(max(EVERY_ROWS), 640)
    expected = reference(x, codes, scales)
    for rows in EVERY_ROWS:
        assert_close(w8a8.linear(x[:rows], packed, None, 96, group), expected[:, :rows])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shapes_of_the_models(shape, group):
    # All outputs are computed; those of four tiles are compared, since float64 takes seconds for the rest.
    outputs, inputs = shape
    codes, scales = random_weight(outputs, inputs, group)
    packed = w8a8.pack(codes, scales)
    columns = (torch.randperm(outputs // 32)[:4, None] * 32 + torch.arange(32)).flatten()
    for rows in (1, 4, 17):
        x = torch.randn(rows, inputs, dtype=torch.bfloat16)
        out = w8a8.linear(x, packed, None, outputs, group)
        assert_close(out[:, columns], reference(x, codes[columns], scales[columns]))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_a_scale_per_output_takes_any_size(shape, isa):
    codes, scales = random_weight(*shape, w8a8.ROW)
    packed = w8a8.pack(codes, scales)
    for rows in (1, 2, 7, 16, 33):
        x = torch.randn(rows, shape[1])
        assert_close(w8a8.linear(x, packed, None, shape[0], w8a8.ROW, isa), reference(x, codes, scales))


def test_float32_scales_of_outputs_lose_nothing():
    """What float16 does not hold: more than 11 bits, and numbers as small as a checkpoint of small weights has."""
    scales = torch.tensor([1 + 2.0**-20, 3.1e-9, 7.7e12, 1.0])[:, None]
    codes = torch.full((4, 64), 127, dtype=torch.int8)
    out = w8a8.linear(torch.ones(1, 64), w8a8.pack(codes, scales), None, 4, w8a8.ROW)
    assert torch.allclose(out[0].double(), scales[:, 0].double() * 127 * 64, rtol=4e-7, atol=0)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "same"])
def test_dtypes_and_bias(dtype, bias_dtype, group):
    codes, scales = random_weight(70, 256, group)
    packed = w8a8.pack(codes, scales)
    x = torch.randn(2, 5, 256).to(dtype)
    bias = None if bias_dtype is None else torch.randn(70).to(dtype if bias_dtype == "same" else bias_dtype)
    out = w8a8.linear(x, packed, bias, 70, group)
    assert out.shape == (2, 5, 70)
    assert out.dtype == dtype
    expected = reference(x.flatten(0, 1), codes, scales)
    if bias is not None:
        expected += torch.stack([bias.double(), bias.double().abs()])[:, None]
    assert_close(out.flatten(0, 1), expected)


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_does_not_depend_on_its_batch(group):
    packed = w8a8.pack(*random_weight(96, 1152, group))
    x = torch.randn(130, 1152, dtype=torch.bfloat16)
    together = w8a8.linear(x, packed, None, 96, group)
    alone = torch.cat([w8a8.linear(row, packed, None, 96, group) for row in x.split(1)])
    assert torch.equal(together, alone)


def test_same_bits_for_any_number_of_threads(threads):
    packed = w8a8.pack(*random_weight(480, 1152, 64))
    x = torch.randn(300, 1152)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append([w8a8.linear(x[:rows], packed, None, 480, 64) for rows in (1, 9, 300)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@several_isas
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_same_bits_for_every_instruction_set(group, dtype):
    packed = w8a8.pack(*random_weight(96, 1152, group))
    x = (torch.randn(150, 1152) * torch.logspace(-3, 3, 150)[:, None]).to(dtype)
    for rows in (1, 5, 20, 150):
        results = [w8a8.linear(x[:rows], packed, None, 96, group, isa) for isa in isas()]
        assert len(results) > 1
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("isa", isas())
def test_the_largest_sums_do_not_overflow(isa, group):
    codes = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(32)[:, None].expand(64, 14336).contiguous()
    scales = torch.ones(64, 14336 // group if group else 1)
    signs = torch.tensor([1.0, -1.0])
    x = torch.stack([torch.ones(14336), -torch.ones(14336), signs.repeat(7168), signs.repeat_interleave(7168)])
    out = w8a8.linear(x, w8a8.pack(codes, scales), None, 64, group, isa)
    assert_close(out, reference(x, codes, scales))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("group", GROUPS)
def test_extreme_rows_stay_to_themselves(group, isa):
    codes, scales = random_weight(64, 256, group)
    packed = w8a8.pack(codes, scales)
    x = torch.randn(9, 256)
    usual = w8a8.linear(x, packed, None, 64, group, isa)
    x[1] = 0
    x[2] *= 1e29
    x[3] *= 1e-28
    x[4] *= 1e-40
    x[5, 3] = float("nan")
    x[6, 3] = float("inf")
    x[7, 3] = 2.0**101
    x[8, 3] = 1e6
    out = w8a8.linear(x, packed, None, 64, group, isa)
    assert torch.equal(out[0], usual[0])
    assert out[1].eq(0).all()
    assert_close(out[2:4], reference(x[2:4], codes, scales))
    assert out[4].eq(0).all(), "below 2^-100 a group counts as zero"
    assert out[5:8].isnan().all(), "above 2^100 it counts as infinite"
    assert_close(out[8:], reference(x[8:], codes, scales))


def test_float16_results_overflow_to_infinity():
    packed = w8a8.pack(torch.full((32, 128), 127, dtype=torch.int8), torch.full((32, 4), 100.0))
    assert w8a8.linear(torch.full((1, 128), 100.0).half(), packed, None, 32, 32).isposinf().all()


def test_no_rows_and_strided_rows():
    packed = w8a8.pack(*random_weight(64, 128, 32))
    assert w8a8.linear(torch.empty(0, 128), packed, None, 64, 32).shape == (0, 64)
    x = torch.randn(5, 256)[:, ::2]
    assert torch.equal(w8a8.linear(x, packed, None, 64, 32), w8a8.linear(x.contiguous(), packed, None, 64, 32))


def test_bad_weights_are_refused():
    codes, scales = random_weight(64, 128, 32)
    for bad_scales in (scales[:, :3], scales[:32], torch.ones(64, 8), torch.empty(64, 0), torch.ones(32, 1)):
        with pytest.raises(ValueError, match="or K must be 32 or 64 times"):
            w8a8.pack(codes, bad_scales)
    with pytest.raises(ValueError, match="below 65504"):
        w8a8.pack(codes, scales * 1e9)
    with pytest.raises(ValueError, match="must be finite"):
        w8a8.pack(codes, torch.full((64, 1), float("inf")))


def test_bad_calls_are_refused():
    packed = w8a8.pack(*random_weight(64, 128, 32))
    x = torch.randn(1, 128)
    with pytest.raises(RuntimeError, match="are not"):
        w8a8.linear(x[:, :64], packed, None, 64, 32)
    with pytest.raises(RuntimeError, match="are not"):
        w8a8.linear(x, packed, None, 64, w8a8.ROW)
    with pytest.raises(RuntimeError, match="groups of 32 or 64 inputs"):
        w8a8.linear(x, packed, None, 64, 128)
    with pytest.raises(RuntimeError, match="bias of 63"):
        w8a8.linear(x, packed, torch.zeros(63), 64, 32)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        w8a8.linear(x.double(), packed, None, 64, 32)


def test_the_operator_compiles_into_one_graph():
    packed = w8a8.pack(*random_weight(64, 128, 32))
    bias = torch.randn(64)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(w8a8.linear(x * 2, packed, bias, 64, 32))

    x = torch.randn(3, 128)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4, 9):
        x = torch.randn(rows, 128)
        assert torch.equal(compiled(x), layer(x))
    operator = torch.ops.ipex_vllm.w8a8_linear.default
    torch.library.opcheck(operator, (x, packed, bias, 64, 32, 0), test_utils=("test_schema", "test_faketensor"))
