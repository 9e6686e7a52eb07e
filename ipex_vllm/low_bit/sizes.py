"""How many bytes a model takes once it is loaded, from the names and shapes of its tensors. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ipex_vllm.low_bit.formats import resolve
from ipex_vllm.low_bit.recipe import Storage, count_layers, on_load

# By Transformers' names, as checkpoints have them.
EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings|shared)\.weight$")
HEAD = re.compile(r"^(\w+\.)?(lm_head|embed_out|output)\.weight$")
# Experts one by one, [features, inputs], or stacked, [experts, features, inputs]; GraniteMoE has names of its own.
EXPERTS = re.compile(r"\.experts\.(\d+\.\w+\.weight|gate_up_proj|down_proj)$|\.(input|output)_linear\.weight$")


def loaded_bytes(
    tensors: Mapping[str, tuple[Sequence[int], int]],
    format_name: str | None,
    *,
    head: str | None = None,
    device: str = "cpu",
    group_size: int | None = None,
    outer: str | None = None,
    is_tied: bool = False,
    num_ranks: int = 1,
    itemsize: int | None = None,
) -> int:
    """Bytes of the weights of a model quantized on load, over all ranks, without kernels' padding.

    Args:
        tensors: the shape and the bytes of an element of every tensor in the checkpoint, which is in full precision:
            one that is quantized already takes what its files do. The headers of its safetensors files have both.
        format_name: what `--low-bit` says; None for no quantizing.
        head, device, group_size, outer: as for `recipe.on_load`.
        is_tied: whether the output head shares the embedding's weight (`tie_word_embeddings`). Quantized, it is a
            tensor of its own, beside the embedding; a head that the checkpoint has all the same is not loaded.
        num_ranks: over which experts are split; where the parts could be too odd for the kernel, they stay as they are.
        itemsize: bytes of an element of what is not quantized, that is, of the served dtype; None for the checkpoint's,
            or for the dtype that `format_name` names.

    Raises:
        ValueError: as from `formats.resolve` and `recipe.on_load`.
    """
    recipe = None
    if format_name is not None:
        format = resolve(format_name)
        if format.kind == "dtype":
            itemsize = format.bits // 8
        else:
            recipe = on_load(format, head, device, group_size, outer, count_layers(tensors))

    def stays(shape: Sequence[int], item: int) -> int:
        return math.prod(shape) * (itemsize or item)

    total = 0
    for name, (shape, item) in tensors.items():
        is_head = HEAD.search(name) is not None
        if is_head and is_tied:
            continue
        is_linear = len(shape) == 2 and name.endswith(".weight") and not EMBEDDING.search(name)
        storage: Storage | str = ""
        if recipe is not None and EXPERTS.search(name) and len(shape) in (2, 3):
            # Either size is the hidden one.
            parts = (size // num_ranks if size % num_ranks == 0 else 1 for size in shape[-2:])
            experts = recipe.expert_storage(name, *parts) if device == "cpu" else ""
            storage = experts if isinstance(experts, str) else experts.down
        elif recipe is not None and is_linear:
            storage = recipe.storage(name.removesuffix(".weight"), shape[1], is_head=is_head)
        total += _stored(shape, storage) if isinstance(storage, Storage) else stays(shape, item)
    if is_tied and recipe is not None:
        # The embedding of the vocabulary is the largest; another may hold positions.
        shapes = [shape for name, (shape, _) in tensors.items() if len(shape) == 2 and EMBEDDING.search(name)]
        for shape in sorted(shapes, key=math.prod)[-1:]:
            storage = recipe.storage("lm_head", shape[1], is_head=True)
            total += _stored(shape, storage) if isinstance(storage, Storage) else 0
    return total


def _stored(shape: Sequence[int], storage: Storage) -> int:
    """Bytes of a weight [..., out_features, in_features]: codes, scales and minima."""
    inputs = shape[-1]
    outputs = math.prod(shape[:-1])
    codes = outputs * inputs * (4 if storage.format.is_packed else 8) // 8
    return codes + outputs * (inputs // (storage.group_size or inputs)) * storage.scale_bytes
