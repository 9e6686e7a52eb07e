"""Of alike layers one is compiled, whatever their names are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor import fx_utils
from torch._inductor.utils import run_and_get_code
from torch.library import Library
from vllm.utils.torch_utils import LayerName, direct_register_custom_op

from ipex_vllm.low_bit.vllm import alike_layers

WIDTH = 16
library = Library("ipex_vllm_test", "FRAGMENT")  # type: ignore[no-untyped-call]
NAMED: list[str] = []


def add_by_name(x: torch.Tensor, output: torch.Tensor, name: LayerName) -> None:
    """Stands for attention: what it writes depends on the name."""
    NAMED.append(name.value)
    torch.add(x, int(name.value), out=output)


direct_register_custom_op(
    "add_by_name",
    add_by_name,
    mutates_args=["output"],
    fake_impl=lambda x, output, name: None,
    target_lib=library,
    dispatch_key="CPU",
)


class LlamaDecoderLayer(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.nn.Parameter(torch.randn(WIDTH))
        self.bias = torch.nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x if residual is None else residual + x
        named = torch.empty_like(x)
        torch.ops.ipex_vllm_test.add_by_name(residual * self.weight, named, LayerName(self.name))
        return torch.nn.functional.silu(named + self.bias.sum(0)), residual


class Model(torch.nn.Module):
    def __init__(self, num_layers: int, make_layers: Any) -> None:
        super().__init__()
        self.start, self.end, self.layers = make_layers(num_layers, lambda prefix: LlamaDecoderLayer(prefix[1:]), "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual)
        return x


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(
        alike_layers,
        "make_layers",
        lambda number, make, prefix: (0, number, torch.nn.ModuleList(make(f"{prefix}.{i}") for i in range(number))),
    )
    monkeypatch.setattr(fx_utils, "_is_fake_tensor_same", alike_layers.is_same_or_a_name)


def alike(model: Model) -> None:
    pass


def each_other(model: Model) -> None:
    """As in a file whose layers have a precision each."""
    for number, layer in enumerate(model.layers):
        layer.bias = torch.nn.Parameter(torch.randn(1 + number, WIDTH))


@torch.no_grad()
@torch._inductor.config.patch(fx_graph_cache=False)
@torch._functorch.config.patch(enable_autograd_cache=False)
def kernels_of(num_layers: int, change: Callable[[Model], None] = alike) -> int:
    """How many kernels the compiled model has; its results are those without a compiler."""
    model = Model(num_layers, alike_layers.make_layers_alike)
    change(model)
    x = torch.randn(3, WIDTH)
    expected = model(x)
    NAMED.clear()
    found, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    torch.testing.assert_close(found, expected)
    assert [str(i) for i in range(num_layers)] == NAMED, "each layer by its own name"
    return len(re.findall(r"async_compile\.cpp", code))


def test_as_many_kernels_for_two_alike_layers_as_for_eight() -> None:
    assert kernels_of(8) == kernels_of(3)


def test_a_model_of_more_kinds_of_layers_than_pytorch_keeps_is_compiled() -> None:
    assert kernels_of(12, each_other) > kernels_of(12)


def test_upstream_alone_refuses_calls_with_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, `alike_layers.is_same_or_a_name` is no longer needed."""
    monkeypatch.setattr(fx_utils, "_is_fake_tensor_same", alike_layers.is_same)
    with pytest.raises(Exception, match="consistent values"):
        kernels_of(3)


def test_other_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike_layers, "ALIKE", ())
    model = Model(3, alike_layers.make_layers_alike)
    assert not any(hasattr(layer, "forward_alike") for layer in model.layers)
