"""How far the rounding of activations alone moves Transformers' own answers, without vLLM or a kernel of ours.

python -m benchmarks.models.rounding NAME ...

The inputs of each linear layer are rounded to 8 bits in groups of 64, as the kernels of `sym_int8` do. What a row of
the table differs by then is not a fault of what serves it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import questions, tiny
from benchmarks.models.zoo import ARCHITECTURES
from ipex_vllm.low_bit.recipe import ROUTER

GROUP_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.rounding", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=ARCHITECTURES)
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            tiny.make(ARCHITECTURES[name], Path(folder))
            model = tiny.load(ARCHITECTURES[name], Path(folder))
        exact = logprobs(model)
        for layer_name, layer in model.named_modules():
            is_rounded = isinstance(layer, nn.Linear) and layer.in_features % GROUP_SIZE == 0
            if is_rounded and not ROUTER.search(f"{layer_name}.weight"):
                layer.register_forward_pre_hook(round_inputs)
        errors = (logprobs(model) - exact).abs()
        print(f"{name}: mean {errors.mean():.1e}, largest {errors.max():.1e}, then {errors.sort().values[-2]:.1e}")


def logprobs(model: Any) -> torch.Tensor:
    """float32 [63], of 64 tokens but the first."""
    ids = torch.tensor([questions.token_ids(questions.NUM_PROMPT + questions.NUM_GREEDY)])
    with torch.inference_mode():
        log_softmax = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    chosen: torch.Tensor = log_softmax.gather(1, ids[0, 1:, None]).squeeze(1)
    return chosen


def round_inputs(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    first, *others = inputs
    groups = first.reshape(-1, GROUP_SIZE)
    scales = (groups.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (((groups / scales).round() * scales).reshape(first.shape), *others)


if __name__ == "__main__":
    main()
