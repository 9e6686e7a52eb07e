"""The W4A8 kernel: every result against float64, and the same bits for any batch, thread count, instruction set."""

import pytest
import torch

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.kernels import w4a8
from tests.int8_reference import assert_close, isas, product, several_isas

# Outputs and inputs of each model's linear layers, alone and as vLLM merges them (QKV, gate and up).
MODEL_SHAPES = {
    "llama-1.1b": [(2048, 2048), (256, 2048), (2560, 2048), (5632, 2048), (11264, 2048), (2048, 5632)],
    "llama-7b": [(4096, 4096), (12288, 4096), (11008, 4096), (22016, 4096), (4096, 11008)],
    "llama-8b": [(1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)],
    "qwen-2.5-0.5b": [(896, 896), (128, 896), (1152, 896), (4864, 896), (9728, 896), (896, 4864)],
}
EVERY_ROWS = [*range(1, 130), 255, 256, 257, 1000]


def block_bytes(group: int, symmetric: bool) -> int:
    """The size of one group of one tile: its terms, and half a byte for each code."""
    return (1 if symmetric else 2) * w4a8.TERM_BYTES + group * w4a8.TILE_OUTPUTS // 2


def random_weight(outputs: int, inputs: int, group: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // group) * 0.01).half().float()
    mins = None if symmetric else (torch.randn(outputs, inputs // group) * 0.05).half().float()
    return codes, scales, mins


def reference(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None) -> torch.Tensor:
    """Dequantized weights times rounded activations in float64: the result, and the sum of its terms' magnitudes."""
    group = codes.shape[1] // scales.shape[1]
    mins = -8 * scales if mins is None else mins
    weight = codes.double() * scales.double().repeat_interleave(group, 1) + mins.double().repeat_interleave(group, 1)
    return product(x, weight, min(group, 64))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_kernel_was_built_and_runs_here():
    assert w4a8.unavailable_reason() is None
    assert w4a8.isa(1000) == w4a8.ISAS[isas()[-1]]
    assert w4a8.isa(1) == w4a8.ISAS[min(isas()[-1], 3)], "AMX is for many rows"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", w4a8.GROUP_SIZES)
@pytest.mark.parametrize("outputs", [64, 70])
def test_unpack_inverts_pack(outputs, group, symmetric):
    codes, scales, mins = random_weight(outputs, 384, group, symmetric)
    packed = w4a8.pack(codes, scales, mins)
    tiles = -(-outputs // w4a8.TILE_OUTPUTS)
    assert packed.numel() == tiles * (384 // group) * block_bytes(group, symmetric)
    assert packed.is_contiguous()
    unpacked = w4a8.unpack(packed, outputs, group, symmetric)
    assert torch.equal(unpacked[0], codes)
    assert torch.equal(unpacked[1], scales)
    assert unpacked[2] is None if symmetric else torch.equal(unpacked[2], mins)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", w4a8.GROUP_SIZES)
def test_every_number_of_rows(group, symmetric):
    codes, scales, mins = random_weight(96, 640, group, symmetric)
    packed = w4a8.pack(codes, scales, mins)
    x = torch.randn(max(EVERY_ROWS), 640)
    expected = reference(x, codes, scales, mins)
    for rows in EVERY_ROWS:
        assert_close(w4a8.linear(x[:rows], packed, None, 96, group, symmetric), expected[:, :rows])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [shape for shapes in MODEL_SHAPES.values() for shape in shapes], ids=str)
def test_the_shapes_of_the_models(shape, symmetric):
    # All outputs are computed; four tiles of them are compared, since float64 takes seconds for the rest.
    outputs, inputs = shape
    for group in w4a8.GROUP_SIZES:
        tiles = outputs // w4a8.TILE_OUTPUTS
        shape_of_blocks = (tiles, inputs // group, block_bytes(group, symmetric))
        blocks = torch.randint(0, 256, shape_of_blocks, dtype=torch.uint8)
        packed = blocks.view(-1)
        for term in range(1 if symmetric else 2):
            values = torch.randn(tiles, inputs // group, w4a8.TILE_OUTPUTS) * 0.01
            blocks[..., term * w4a8.TERM_BYTES :][..., : w4a8.TERM_BYTES] = values.half().view(torch.uint8)
        chosen = torch.randperm(tiles)[:4]
        columns = (chosen[:, None] * w4a8.TILE_OUTPUTS + torch.arange(w4a8.TILE_OUTPUTS)).flatten()
        weight = w4a8.unpack(blocks[chosen].flatten(), len(columns), group, symmetric)
        for rows in (1, 4, 17):
            x = torch.randn(rows, inputs, dtype=torch.bfloat16)
            out = w4a8.linear(x, packed, None, outputs, group, symmetric)
            assert_close(out[:, columns], reference(x, *weight))


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, "same"])
def test_dtypes_and_bias(dtype, bias_dtype):
    codes, scales, mins = random_weight(70, 256, 32, True)
    packed = w4a8.pack(codes, scales, mins)
    x = torch.randn(2, 5, 256).to(dtype)
    bias = None if bias_dtype is None else torch.randn(70).to(dtype if bias_dtype == "same" else bias_dtype)
    out = w4a8.linear(x, packed, bias, 70, 32, True)
    assert out.shape == (2, 5, 70)
    assert out.dtype == dtype
    expected = reference(x.flatten(0, 1), codes, scales, mins)
    if bias is not None:
        expected += torch.stack([bias.double(), bias.double().abs()])[:, None]
    assert_close(out.flatten(0, 1), expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_does_not_depend_on_its_batch(symmetric):
    packed = w4a8.pack(*random_weight(96, 1152, 32, symmetric))
    x = torch.randn(130, 1152, dtype=torch.bfloat16)
    together = w4a8.linear(x, packed, None, 96, 32, symmetric)
    alone = torch.cat([w4a8.linear(row, packed, None, 96, 32, symmetric) for row in x.split(1)])
    assert torch.equal(together, alone)


def test_same_bits_for_any_number_of_threads(threads):
    packed = w4a8.pack(*random_weight(480, 1152, 64, False))
    x = torch.randn(300, 1152)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append([w4a8.linear(x[:rows], packed, None, 480, 64, False) for rows in (1, 9, 300)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("group", w4a8.GROUP_SIZES)
@pytest.mark.parametrize("name", w4a8.TABLES)
def test_the_levels_of_a_table(name, group):
    values = torch.tensor(FORMATS[name].values)
    levels = (values * w4a8.UNITS[name]).round()  # those of fp4 are whole already
    assert (levels / w4a8.UNITS[name] - values).abs().max() < 0.004
    codes = torch.randint(0, len(levels), (70, 1152), dtype=torch.uint8)
    _, scales, _ = random_weight(70, 1152, group, True)
    packed, table = w4a8.pack(codes, scales, None), w4a8.TABLES[name]
    weight = levels.double()[codes.long()] * scales.double().repeat_interleave(group, 1)
    x = torch.randn(150, 1152)
    for rows in (1, 3, 20, 150):
        expected = product(x[:rows], weight, min(group, 64))
        results = [w4a8.linear(x[:rows], packed, None, 70, group, True, isa, table) for isa in isas()]
        assert_close(results[0], expected)
        assert all(torch.equal(results[0], result) for result in results[1:])


def test_a_table_that_there_is_not_is_refused():
    packed = w4a8.pack(*random_weight(64, 128, 32, True))
    with pytest.raises(RuntimeError, match="no such table"):
        w4a8.linear(torch.randn(1, 128), packed, None, 64, 32, True, table=3)


@several_isas
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", w4a8.GROUP_SIZES)
def test_same_bits_for_every_instruction_set(group, symmetric, dtype):
    packed = w4a8.pack(*random_weight(96, 1152, group, symmetric))
    x = (torch.randn(150, 1152) * torch.logspace(-3, 3, 150)[:, None]).to(dtype)
    for rows in (1, 5, 20, 150):
        results = [w4a8.linear(x[:rows], packed, None, 96, group, symmetric, isa) for isa in isas()]
        assert len(results) > 1
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("group", w4a8.GROUP_SIZES)
@pytest.mark.parametrize("isa", isas())
def test_the_largest_sums_do_not_overflow(isa, group):
    codes = torch.tensor([0, 15], dtype=torch.uint8).repeat_interleave(32)[:, None].expand(64, 14336).contiguous()
    scales = torch.ones(64, 14336 // group)
    signs = torch.tensor([1.0, -1.0])
    x = torch.stack([torch.ones(14336), -torch.ones(14336), signs.repeat(7168), signs.repeat_interleave(7168)])
    for mins in (None, -15 * scales):
        packed = w4a8.pack(codes, scales, mins)
        out = w4a8.linear(x, packed, None, 64, group, mins is None, isa)
        assert_close(out, reference(x, codes, scales, mins))


@pytest.mark.parametrize("isa", isas())
def test_extreme_rows_stay_to_themselves(isa):
    codes, scales, mins = random_weight(64, 256, 32, True)
    packed = w4a8.pack(codes, scales, mins)
    x = torch.randn(9, 256)
    usual = w4a8.linear(x, packed, None, 64, 32, True, isa)
    x[1] = 0
    x[2] *= 1e29
    x[3] *= 1e-28
    x[4] *= 1e-40
    x[5, 3] = float("nan")
    x[6, 3] = float("inf")
    x[7, 3] = 2.0**101
    x[8, 3] = 1e6
    out = w4a8.linear(x, packed, None, 64, 32, True, isa)
    assert torch.equal(out[0], usual[0])
    assert out[1].eq(0).all()
    assert_close(out[2:4], reference(x[2:4], codes, scales, mins))
    assert out[4].eq(0).all(), "below 2^-100 a group counts as zero"
    assert out[5:8].isnan().all(), "above 2^100 it counts as infinite"
    assert_close(out[8:], reference(x[8:], codes, scales, mins))


def test_one_large_input_costs_only_its_own_group():
    """Why activations have a scale per group: real ones hold a few inputs a hundred times as large as the others."""
    codes, scales, mins = random_weight(64, 1024, 64, True)
    x = torch.randn(16, 1024)
    x[:, 70] = 100.0
    weight = (codes.double() - 8) * scales.double().repeat_interleave(64, 1)
    exact = x.double() @ weight.T
    error = w4a8.linear(x, w4a8.pack(codes, scales, mins), None, 64, 64, True) - exact
    error_per_row = torch.round(x.double() * 1.27) / 1.27 @ weight.T - exact  # 127 / max|x|
    assert error.norm() < 0.35 * error_per_row.norm(), "one group of 16 is rough: a quarter of the error"


def test_float16_results_overflow_to_infinity():
    packed = w4a8.pack(torch.full((32, 128), 15, dtype=torch.uint8), torch.full((32, 4), 100.0), None)
    assert w4a8.linear(torch.full((1, 128), 100.0).half(), packed, None, 32, 32, True).isposinf().all()


def test_no_rows_and_strided_rows():
    packed = w4a8.pack(*random_weight(64, 128, 32, True))
    assert w4a8.linear(torch.empty(0, 128), packed, None, 64, 32, True).shape == (0, 64)
    x = torch.randn(5, 256)
    strided = w4a8.linear(x[:, ::2], packed, None, 64, 32, True)
    assert torch.equal(strided, w4a8.linear(x[:, ::2].contiguous(), packed, None, 64, 32, True))


def test_bad_weights_are_refused():
    codes, scales, _ = random_weight(64, 128, 32, True)
    for bad_scales in (scales[:, :3], scales[:32], torch.ones(64, 8), torch.empty(64, 0)):
        with pytest.raises(ValueError, match="K must be 32, 64 or 128 times"):
            w4a8.pack(codes, bad_scales, None)
    with pytest.raises(ValueError, match="shape of the scales"):
        w4a8.pack(codes, scales, scales[:32])
    with pytest.raises(ValueError, match="below 65504"):
        w4a8.pack(codes, scales * 1e9, None)


def test_bad_calls_are_refused():
    packed = w4a8.pack(*random_weight(64, 128, 32, True))
    x = torch.randn(1, 128)
    with pytest.raises(RuntimeError, match="are not"):
        w4a8.linear(x[:, :64], packed, None, 64, 32, True)
    with pytest.raises(RuntimeError, match="groups of 32, 64 or 128 inputs"):
        w4a8.linear(x, packed, None, 64, 48, True)
    with pytest.raises(RuntimeError, match="bias of 63"):
        w4a8.linear(x, packed, torch.zeros(63), 64, 32, True)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        w4a8.linear(x.double(), packed, None, 64, 32, True)


def test_the_operator_compiles_into_one_graph():
    packed = w4a8.pack(*random_weight(64, 128, 32, True))
    bias = torch.randn(64)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(w4a8.linear(x * 2, packed, bias, 64, 32, True))

    x = torch.randn(3, 128)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4, 9):
        x = torch.randn(rows, 128)
        assert torch.equal(compiled(x), layer(x))
    operator = torch.ops.ipex_vllm.w4a8_linear.default
    torch.library.opcheck(operator, (x, packed, bias, 64, 32, True, 0), test_utils=("test_schema", "test_faketensor"))
