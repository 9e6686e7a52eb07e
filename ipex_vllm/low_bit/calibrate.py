"""Rounding that goes further, for a checkpoint that is written once: the next columns make up for a column's error.

This is GPTQ (Frantar et al. 2022, arXiv:2210.17323) over text; without any, over text that the model writes itself. Two
things differ from the paper: a group's scale is searched with the inputs' importance (`rounding.py`), and the products
between different inputs count `CROSS_SHARE` of what the text says: a few thousand tokens tell them poorly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ipex_vllm.low_bit.importance import inputs_given_to
from ipex_vllm.low_bit.layout import to_tensors
from ipex_vllm.low_bit.quantize import QuantizedWeight, quantize
from ipex_vllm.low_bit.recipe import Storage
from ipex_vllm.low_bit.rounding import encoder

NUM_SEQUENCES, SEQUENCE_TOKENS = 16, 256
CROSS_SHARE = 0.7
PRODUCTS_BYTES = 2 << 30
DAMPING = 0.01  # of the mean importance of a layer's inputs, added to each


def quantized_layers(
    model_path: str, stored: Mapping[str, Storage], text: Path | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each layer of `stored`, by name, as `layout.to_tensors` lays it out, calibrated on `text` or the model's own.

    The model is in memory in float32, four bytes a parameter. Raises ValueError for a text of too few tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    if text is None:
        tokens = own_text(model)
    else:
        ids = AutoTokenizer.from_pretrained(model_path)(text.read_text(encoding="utf-8"))["input_ids"]
        tokens = cut(ids, text)
    modules = {name: module for name, module in model.named_modules() if name in stored}
    with tqdm(total=len(modules), desc="Calibrating", unit="layer") as bar:
        for part in parts_of(modules):
            for name, found in input_products(model, part, tokens).items():
                weight: Any = part[name].weight
                yield name, to_tensors(round_with_compensation(weight.detach(), stored[name], found))
            bar.update(len(part))  # an expert that no token chose was not reached


def parts_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
    """`modules` in parts whose products of inputs fit into `PRODUCTS_BYTES`; each part is a pass through the model."""
    part: dict[str, nn.Module] = {}
    size = 0
    for name, module in modules.items():
        needed = 4 * int(module.in_features) ** 2  # type: ignore[arg-type]
        if part and size + needed > PRODUCTS_BYTES:
            yield part
            part, size = {}, 0
        part[name] = module
        size += needed
    yield part


def own_text(model: Any) -> Tensor:
    """Token ids [sequences, tokens] that the model writes from its first token on, always the same."""
    config = model.generation_config
    first = config.bos_token_id if config.bos_token_id is not None else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids: Tensor = model.generate(
            torch.full((NUM_SEQUENCES, 1), first),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=SEQUENCE_TOKENS - 1,
            max_new_tokens=SEQUENCE_TOKENS - 1,
            pad_token_id=first,
        )
    return ids


def cut(ids: list[int], text: Path) -> Tensor:
    """The first token ids of a text as [sequences, tokens]. Raises ValueError where there is not one sequence."""
    num_sequences = min(len(ids) // SEQUENCE_TOKENS, NUM_SEQUENCES)
    if num_sequences == 0:
        raise ValueError(f"{text} has {len(ids)} tokens; calibrating takes at least {SEQUENCE_TOKENS}")
    return torch.tensor(ids[: num_sequences * SEQUENCE_TOKENS]).view(num_sequences, SEQUENCE_TOKENS)


def input_products(model: Any, part: Mapping[str, nn.Module], tokens: Tensor) -> dict[str, Tensor]:
    """For each module of `part`, the mean products of its inputs, float32 [in_features, in_features]."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, rows: Tensor) -> None:
        totals[name] = totals.get(name, 0) + rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    with torch.inference_mode(), inputs_given_to(part, add):
        for sequence in tokens:
            model(input_ids=sequence[None, :], use_cache=False)
    return {name: total / counts[name] for name, total in totals.items()}


def round_with_compensation(weight: Tensor, storage: Storage, products: Tensor) -> QuantizedWeight:
    """Quantize `weight` [out_features, in_features], of inputs with these mean `products` [in_features, in_features].

    Formats that are no integers of fewer than 8 bits have scales of whole channels, or levels that are close where
    weights are small: those are rounded by importance alone.
    """
    importance = products.diagonal().clone()
    format, size = storage.format, storage.group_size
    if format.kind != "integer" or format.bits == 8 or size is None or format.values is None:
        return quantize(weight, format, size or 0, importance)
    importance += importance.mean() * DAMPING
    hessian = (products * CROSS_SHARE).double()
    hessian.diagonal().copy_(importance)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factors = torch.linalg.cholesky(inverse, upper=True).float()
    encode, lowest, rest = encoder(format, search=True), format.values[0], weight.float().clone()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    scales, mins = [], []
    for start in range(0, rest.shape[1], size):
        columns = slice(start, start + size)
        block, errors, own = rest[:, columns], torch.empty(len(rest), size), factors[columns, columns]
        _, scale, low = encode(block[:, None, :].contiguous(), importance[None, columns])
        step = scale.flatten().float()
        offset = low.flatten().float() if low is not None else lowest * step
        inverse_step = torch.where(step == 0, 0, 1 / step)
        for column in range(size):
            wanted = block[:, column]
            code = ((wanted - offset) * inverse_step).round_().clamp_(0, len(format.values) - 1)
            codes[:, start + column] = code.to(torch.uint8)
            error = (wanted - (code * step + offset)) / own[column, column]
            errors[:, column] = error
            block[:, column + 1 :] -= error[:, None] * own[column, column + 1 :]
        rest[:, start + size :] -= errors @ factors[columns, start + size :]
        scales.append(scale.flatten(1))
        if low is not None:
            mins.append(low.flatten(1))
    return QuantizedWeight(format, codes, torch.cat(scales, 1), torch.cat(mins, 1) if mins else None)
