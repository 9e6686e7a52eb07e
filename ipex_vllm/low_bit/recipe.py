"""What becomes of each linear layer of a model: the one place where that is decided. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ipex_vllm.low_bit.formats import Format, fitting_group_size, resolve, unsuitable_reason

# What `--low-bit-head` takes beside the names of the formats: the format of the other layers, and none at all.
SAME, NONE = "same", "none"

# What a saved checkpoint is calibrated on when no text is given: what the model writes itself.
OWN_TEXT = "own"

# The format of the head, unless another is asked for.
INT8 = "sym_int8"

# How many inputs share a scale in memory, on a CPU, where nothing else is asked for. It keeps more of a model's answers
# than a scale an output channel (docs/low-bit.md), which is what these formats have in a file, for others to open it.
LOADED_GROUP_SIZES = {INT8: 32, "fp8_e4m3": 64, "fp8_e5m2": 64}

# The number of a decoder layer in the name of one of its parts.
DECODER_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

# The formats that experts can have, on a CPU, how many inputs may share a scale then, and what has to divide their
# intermediate size.
EXPERT_FORMATS: dict[str, tuple[int | None, ...]] = {
    **dict.fromkeys(("sym_int4", "asym_int4", "nf4", "fp4"), (32, 64, 128)),
    INT8: (None, 32, 64),
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), (None, 32, 64, 128)),
}
EXPERT_TILE = 32

# The layers that choose a token's experts. They are tiny, and a wrong choice is the largest error that there is.
ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.|$)")

# The up-projection of multi-head latent attention: vLLM takes it apart when it is loaded, to multiply with its halves.
LATENT = re.compile(r"(^|\.)kv_b_proj(\.|$)")

# What turns pictures into embeddings: a small part of the bytes, and nothing here measures what a picture would lose.
VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder)(\.|$)")


@dataclass(frozen=True)
class Storage:
    """How one weight is stored: its format, and how many inputs share a scale (None: all of an output channel's)."""

    format: Format
    group_size: int | None

    @property
    def scale_bytes(self) -> int:
        """What the kernels keep beside the codes that share a scale: that, and in asymmetric formats a minimum."""
        has_float16 = self.group_size is not None and self.format.kind != "float8"
        return 2 * (2 - self.format.symmetric) if has_float16 else 4


@dataclass(frozen=True)
class ExpertStorage:
    """How the matrices of a layer of experts are stored."""

    gate_up: Storage
    down: Storage


@dataclass(frozen=True)
class Recipe:
    """How a model's linear layers are stored.

    Attributes:
        format: that of all layers but the output head.
        group_size: the inputs that share a scale where they divide a layer's; None for the format's default.
        head: the output head's format; None if it stays as it is.
        head_reason: why it does.
        group_sizes: the inputs that share a scale, by the format's name, where `group_size` does not say it and it is
            not the format's own number.
        outer: the format of the first and the last decoder layer; None for that of the others.
        num_layers: the number of decoder layers, of which `outer` needs to know.
        falls_back: whether a layer whose inputs `group_size` does not divide takes a smaller group.
    """

    format: Format
    group_size: int | None = None
    head: Format | None = None
    head_reason: str = "left as it is"
    group_sizes: Mapping[str, int] = field(default_factory=dict)
    outer: Format | None = None
    num_layers: int = 0
    falls_back: bool = True

    def storage(self, name: str, in_features: int, *, is_head: bool = False) -> Storage | str:
        """How the layer called `name`, with `in_features` inputs, is stored, or in words why it stays as it is."""
        if ROUTER.search(name):
            return "a router is not quantized"
        if LATENT.search(name):
            return "latent attention takes the weight itself"
        if VISION.search(name):
            return "a vision tower is not quantized"
        format = self.head if is_head else self.outer if self.is_outer(name) else self.format
        if format is None:
            return self.head_reason
        # An 8-bit head beside 4-bit layers has its own default.
        wanted = self.group_size if format is self.format else None
        if wanted is None:
            wanted = self.group_sizes.get(format.name)
        if reason := unsuitable_reason(format, in_features, wanted, falls_back=self.falls_back):
            return reason
        return Storage(format, fitting_group_size(format, in_features, wanted))

    def expert_storage(self, name: str, hidden: int, intermediate: int) -> ExpertStorage | str:
        """How the experts called `name`, of these sizes, are stored, or in words why they stay as they are."""
        gate_up, down = self.storage(name, hidden), self.storage(name, intermediate)
        if isinstance(gate_up, str):
            return gate_up
        if isinstance(down, str):
            return down
        if gate_up.format.name not in EXPERT_FORMATS:
            return f"there is no kernel for experts in {gate_up.format.name}"
        if not {gate_up.group_size, down.group_size} <= {*EXPERT_FORMATS[gate_up.format.name]}:
            return f"there is no kernel for experts in {gate_up.format.name} with groups of {gate_up.group_size}"
        if intermediate % EXPERT_TILE:
            return f"the experts' {intermediate} intermediate features are no multiple of {EXPERT_TILE}"
        return ExpertStorage(gate_up, down)

    def is_outer(self, name: str) -> bool:
        """Whether the layer called `name` is a part of the first or the last decoder layer, and that matters."""
        found = DECODER_LAYER.search(name) if self.outer is not None else None
        return found is not None and int(found[1]) in (0, self.num_layers - 1)


def count_layers(names: Iterable[str]) -> int:
    """How many decoder layers there are, from the names of their parts."""
    return 1 + max((int(found[1]) for name in names if (found := DECODER_LAYER.search(name))), default=-1)


def on_load(
    format: Format,
    head: str | None = None,
    device: str = "cpu",
    group_size: int | None = None,
    outer: str | None = None,
    num_layers: int = 0,
) -> Recipe:
    """The recipe for quantizing a model to `format`, with the head in the format `head`.

    That is a name, "same" for the other layers' or "none" for neither. By default (None) the head has 8 bits, tied to
    the embedding or not: at fewer it is what costs most of a model's answers. On an Intel GPU ("xpu") there is no
    kernel for 8-bit integers; there a format of 8 bits is the head's, too, and beside one of fewer bits the head stays
    as it is.

    The first and the last of `num_layers` decoder layers have the format `outer`, where one is given.

    Raises ValueError for an unknown name, or a format without a kernel on `device`.
    """
    recipe = _with_head(format, head, device, group_size)
    if outer is None:
        return recipe
    return replace(recipe, outer=_kernels_format(outer, device, "the first and the last layer"), num_layers=num_layers)


def _kernels_format(name: str, device: str, part: str) -> Format:
    """The format called `name`, for a part of the model. Raises ValueError where it cannot be that."""
    format = resolve(name)
    if format.kind == "dtype":
        raise ValueError(f"{format.name} quantizes nothing: {part} cannot have it")
    if device == "xpu" and not format.runs_on_xpu:
        raise ValueError(f"{format.name} has no kernel on XPU, for {part} either")
    return format


def _with_head(format: Format, head: str | None, device: str, group_size: int | None) -> Recipe:
    if head is None and device == "xpu" and format.bits < 8:
        return Recipe(format, group_size, None, "there is no kernel for 8-bit integers on XPU")
    if head is None:
        head = SAME if device == "xpu" else INT8
    group_sizes = LOADED_GROUP_SIZES if device == "cpu" else {}
    if head == NONE:
        return Recipe(format, group_size, group_sizes=group_sizes)
    chosen = format if head == SAME else _kernels_format(head, device, "the output head")
    return Recipe(format, group_size, chosen, group_sizes=group_sizes)


def on_save(
    format: Format,
    head: str | None = None,
    group_size: int | None = None,
    outer: str | None = None,
    num_layers: int = 0,
) -> Recipe:
    """Like `on_load` on a CPU, for a file: its 8-bit formats have a scale an output channel, as others read them."""
    loaded = on_load(format, head, group_size=group_size, outer=outer, num_layers=num_layers)
    return replace(loaded, group_sizes={})


def summarize_kept(kept: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A line for each reason why layers, given as (name, reason), stay as they are; it names the first of them."""
    names: dict[str, list[str]] = {}
    for name, reason in kept:
        names.setdefault(reason, []).append(name)
    for reason, layers in names.items():
        others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        yield f"not quantized: {layers[0]}{others} ({reason})"
