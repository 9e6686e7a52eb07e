"""Of a model's alike layers PyTorch compiles one, and calls its code for each of them.

Compiled as one graph, thirty layers are traced, lowered and built thirty times. As a nested region of the graph
(`torch.compiler.nested_compile_region`) a layer is, but for the names by which attention finds its cache, the same code
with other weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import fx_utils
from vllm.model_executor.models import utils
from vllm.utils.torch_utils import LayerName

# Decoder layers that differ from each other in weights alone, by the name of their class.
ALIKE = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")

make_layers = utils.make_layers
is_same = fx_utils._is_fake_tensor_same


def mend() -> None:
    """Mark the layers of models that are made from now on; a second call changes nothing."""
    utils.make_layers = make_layers_alike
    fx_utils._is_fake_tensor_same = is_same_or_a_name


def make_layers_alike(*arguments: Any, **options: Any) -> tuple[int, int, torch.nn.ModuleList]:
    """vLLM's `make_layers`."""
    start, end, layers = make_layers(*arguments, **options)
    for layer in layers[start + 1 : end]:  # the first one has no residual, so its graph is another
        kind = type(layer)
        if kind.__name__ in ALIKE:
            # As many kinds of them as a file's precisions make; beyond its own limit PyTorch fails.
            layer.forward_alike = torch.compiler.nested_compile_region(kind.forward, max_reuse_entries=len(layers))
            layer.forward = layer_forward.__get__(layer)
    return start, end, layers


def layer_forward(self: Any, *arguments: Any, **options: Any) -> Any:
    return self.forward_alike(self, *arguments, **options)


def is_same_or_a_name(new: Any, old: Any, *others: Any, **options: Any) -> bool:
    """Whether two calls of a region have alike arguments.

    PyTorch 2.13 lifts objects like vLLM's names of layers out of a region, so that it is one for all of them, and then
    refuses that its calls have different ones.
    """
    if isinstance(new, LayerName) and isinstance(old, LayerName):
        return True
    return bool(is_same(new, old, *others, **options))
