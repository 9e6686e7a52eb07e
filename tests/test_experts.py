"""The operator for a layer of experts: against float64, and the same bits for any batch, threads, instruction set."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from ipex_vllm.low_bit import native
from ipex_vllm.low_bit.experts import LowBitExperts
from ipex_vllm.low_bit.formats import FORMATS, Format
from ipex_vllm.low_bit.kernels import experts as kernel
from ipex_vllm.low_bit.kernels import w4a8
from ipex_vllm.low_bit.quantize import dequantize, quantize
from ipex_vllm.low_bit.recipe import ExpertStorage, Storage
from tests.int8_reference import isas, several_isas
from tests.test_w8a16 import isas as float_isas

HIDDEN, INTERMEDIATE, EXPERTS, CHOSEN = 160, 96, 6, 3
# Every layout: of int4 with 1, 2 and 3 tiles that share a scale of `down`, of int8 and fp8 with and without groups.
STORAGES = [("sym_int4", 32), ("asym_int4", 32), ("sym_int4", 64), ("asym_int4", 128), ("sym_int8", 32)]
STORAGES += [("sym_int8", 64), ("sym_int8", None), ("fp4", 32), ("nf4", 64)]
STORAGES += [("fp8_e4m3", 64), ("fp8_e5m2", 32), ("fp8_e4m3", None)]
# What down has may be another format of integers.
STORAGES += [("asym_int4+sym_int8", 32), ("sym_int8+fp4", 64)]


def activated(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if name == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up


def rounded(x: torch.Tensor, step: int) -> torch.Tensor:
    if step == 0:  # floats, which stay as they are
        return x.double()
    groups = functional.pad(x.float(), (0, -x.shape[1] % step)).view(len(x), -1, step)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scales).nan_to_num().round()
    return (codes.double() * scales.double()).flatten(1)[:, : x.shape[1]]


def as_kept(weight: torch.Tensor, format: Format, group: int | None) -> torch.Tensor:
    """In float64, with scales of groups rounded to float16, and NF4's levels to 127ths, as the kernels keep them."""
    quantized = quantize(weight, format, group or 0)
    scales = quantized.scales
    if format.name in w4a8.UNITS:
        scales = (scales.float() / w4a8.UNITS[format.name]).half().float() * w4a8.UNITS[format.name]
    elif group and format.kind != "float8":
        scales = scales.half().float()
    if format.name == "nf4":
        levels = tuple(round(127 * value) / 127 for value in format.values or ())
        quantized = replace(quantized, format=replace(format, values=levels))
    return dequantize(replace(quantized, scales=scales)).double()


class Layer:
    """A random layer of experts, and the same weights as the formats round them, in float64."""

    def __init__(
        self,
        format_name: str = "sym_int4",
        group: int | None = 32,
        activation: str = "silu",
        has_bias: bool = False,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
    ) -> None:
        if group and group > 32:
            hidden, intermediate = 2 * group, 3 * group
        names = format_name.split("+")
        format, down_format, self.activation = FORMATS[names[0]], FORMATS[names[-1]], activation
        self.step = 0 if format.kind == "float8" else min(group or 64, 64)
        gate, up = torch.randn(2, EXPERTS, intermediate, hidden) / hidden**0.5
        down = torch.randn(EXPERTS, hidden, intermediate) / intermediate**0.5
        self.biases = [
            torch.randn(EXPERTS, size) if has_bias else None for size in (intermediate, intermediate, hidden)
        ]
        storage = ExpertStorage(Storage(format, group), Storage(down_format, group))
        weights = zip(gate, up, down, strict=True)
        self.experts = LowBitExperts(weights, EXPERTS, storage, activation, *self.biases)
        matrices = ((gate, format), (up, format), (down, down_format))
        self.weights = [torch.stack([as_kept(each, kept, group) for each in part]) for part, kept in matrices]
        self.hidden = hidden

    def input(self, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, self.hidden).to(dtype)
        ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)]).int()
        return x, torch.rand(tokens, CHOSEN), ids

    def expected(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(len(x), self.hidden, dtype=torch.float64)
        x = rounded(x, self.step)
        gate_bias, up_bias, down_bias = (0 if each is None else each.double() for each in self.biases)
        for expert, (gate, up, down) in enumerate(zip(*self.weights, strict=True)):
            biases = (each if isinstance(each, int) else each[expert] for each in (gate_bias, up_bias, down_bias))
            g, u, d = biases
            between = rounded(activated(self.activation, x @ gate.T + g, x @ up.T + u), self.step)
            counts = (weights * (ids == expert)).sum(1, keepdim=True).double()
            result += counts * (between @ down.T + d)
        return result


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """A value between the matmuls may fall to the other side of a rounding boundary: one code of 127 of its group."""
    tolerance = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 8e-3}[out.dtype]
    assert (out.double() - expected).norm() < tolerance * expected.norm()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("format_name", "group"), STORAGES)
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
def test_every_layout(format_name, group, tokens):
    layer = Layer(format_name, group)
    arguments = layer.input(tokens)
    assert_close(layer.experts(*arguments), layer.expected(*arguments))


@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_activations_and_biases(activation, has_bias):
    layer = Layer(activation=activation, has_bias=has_bias)
    x, weights, ids = layer.input(30)
    for scale in (1, 10):  # with 10, gpt-oss' limits are reached
        assert_close(layer.experts(x * scale, weights, ids), layer.expected(x * scale, weights, ids))


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_dtypes(dtype):
    layer = Layer()
    arguments = layer.input(30, dtype)
    out = layer.experts(*arguments)
    assert out.dtype == dtype
    assert_close(out, layer.expected(*arguments))


def test_a_hidden_size_that_no_vector_divides():
    layer = Layer("sym_int8", None, hidden=150)
    arguments = layer.input(5)
    assert_close(layer.experts(*arguments), layer.expected(*arguments))


@pytest.mark.parametrize(("format_name", "group"), STORAGES)
def test_a_token_does_not_depend_on_its_batch(format_name, group):
    layer = Layer(format_name, group)
    x, weights, ids = layer.input(1100)  # more than a pass
    ids[:300] = torch.tensor([0, 1, 2])  # more rows of an expert than a task
    together = layer.experts(x, weights, ids)
    for token in (0, 1, 299, 300, 1023, 1024, 1099):
        part = slice(token, token + 1)
        assert torch.equal(together[part], layer.experts(x[part], weights[part], ids[part]))


def test_same_bits_for_any_number_of_threads(threads):
    layer = Layer(has_bias=True)
    arguments = layer.input(70)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(layer.experts(*arguments))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@several_isas
@pytest.mark.parametrize("activation", kernel.ACTIVATIONS)
@pytest.mark.parametrize(("format_name", "group"), STORAGES)
def test_same_bits_for_every_instruction_set(format_name, group, activation, monkeypatch):
    layer = Layer(format_name, group, activation, has_bias=True)
    arguments = layer.input(150)
    results = []
    forward = kernel.forward
    is_float = layer.experts.format.kind == "float8"
    for isa in (0, *(float_isas(torch.float32) if is_float else isas())):
        monkeypatch.setattr(kernel, "forward", lambda *arguments, isa=isa: forward(*arguments, isa))
        results.append(layer.experts(*arguments))
    assert len(results) > 2
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_ids_that_are_no_experts_are_left_out():
    layer = Layer()
    x, weights, ids = layer.input(20)
    ids[:, 1] = -1
    ids[7], ids[8, 0] = -1, EXPERTS
    out = layer.experts(x, weights, ids)
    assert_close(out, layer.expected(x, weights, ids))
    assert out[7].eq(0).all()
    assert layer.experts(x, weights, torch.full_like(ids, -1)).eq(0).all()


@pytest.mark.parametrize("isa", isas())
def test_what_is_no_number_stays_to_its_token(isa, monkeypatch):
    layer = Layer()
    x, weights, ids = layer.input(20)
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *arguments: forward(*arguments, isa))
    usual = layer.experts(x, weights, ids)
    x[3, 5] = float("nan")
    x[4, 5] = float("inf")
    out = layer.experts(x, weights, ids)
    assert out[3:5].isnan().all()
    assert torch.equal(out[5:], usual[5:])


def test_no_tokens_and_strided_tokens():
    layer = Layer()
    x, weights, ids = layer.input(6)
    assert layer.experts(x[:0], weights[:0], ids[:0]).shape == (0, HIDDEN)
    assert torch.equal(layer.experts(x[::2], weights[::2], ids[::2]), layer.experts(x, weights, ids)[::2])


def test_bad_calls_are_refused():
    layer = Layer()
    x, weights, ids = layer.input(6)
    with pytest.raises(RuntimeError, match="are not"):
        layer.experts(x[:, :128], weights, ids)
    with pytest.raises(RuntimeError, match="groups that divide"):
        layer.experts(x[:, :100], weights, ids)
    layer.experts.storage = ExpertStorage(layer.experts.storage.gate_up, Storage(FORMATS["fp8_e4m3"], 32))
    with pytest.raises(RuntimeError, match="not of both"):
        layer.experts(x, weights, ids)
    layer = Layer()
    with pytest.raises(RuntimeError, match=r"\[tokens, chosen\]"):
        layer.experts(x, weights[:5], ids)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        layer.experts(x.double(), weights, ids)


def test_the_operator_compiles_into_one_graph():
    layer = Layer(has_bias=True)
    compiled = torch.compile(layer.experts, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 4, 9):
        arguments = layer.input(tokens)
        assert torch.equal(compiled(*arguments), layer.experts(*arguments))
