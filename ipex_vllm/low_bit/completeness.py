"""Whether a checkpoint holds every parameter of its model, seen before the weights themselves are read."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ipex_vllm.low_bit.architecture import linear_layers, read_config
from ipex_vllm.low_bit.layout import meta_tensors
from ipex_vllm.low_bit.readers import ours
from ipex_vllm.low_bit.recipe import DECODER_LAYER, Storage
from ipex_vllm.machine.checkpoint import check_files, header_of, some, weight_files

BY_EXPERT = re.compile(r"\.experts\.\d+\.")
logger = logging.getLogger(__name__)


def check_checkpoint(source: Path) -> None:
    """Raise ValueError, naming them, where tensors of the checkpoint in `source` are missing or of another shape.

    The files are compared with their index and numbering, and their headers with the parameters of the model that
    Transformers would build. For a model that Transformers does not know, and for the checkpoints of other tools that
    quantize, it is the files alone.
    """
    check_files(source)
    config = read_config(str(source))
    try:
        if (quantization := config.get("quantization_config")) is None:
            missing, misshapen = _compare_with_transformers(source, config)
        elif ours.MARK in quantization:
            missing, misshapen = _compare_with_recipe(source, quantization)
        else:
            return
    except Exception as error:  # of any kind: there are models that need code of their own, or another class
        logger.debug("%s cannot be compared with its model: %s", source, error, exc_info=True)
        return
    check_loaded(str(source), missing, misshapen)


def check_loaded(model_path: str, missing: list[str], misshapen: list[str]) -> None:
    """Raise ValueError where parameters of a model were not in its checkpoint, or in another shape."""
    if missing:
        raise ValueError(f"{model_path} lacks {len(missing)} of the model's tensors: {some(missing)}")
    if misshapen:
        raise ValueError(f"{model_path} holds tensors of other shapes than the model's: {some(misshapen)}")


def loading_report(info: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What Transformers' `output_loading_info` says is missing, and of another shape."""
    shapes = (f"{name} {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"])
    return sorted(info["missing_keys"]), sorted(shapes)


def _compare_with_transformers(source: Path, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers():
        # On the meta device, where no weight is read.
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=AutoConfig.from_pretrained(source, trust_remote_code=False),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    if type(model).__name__ not in (config.get("architectures") or ()):
        # Transformers would build a part of it, or another model, whose parameters say nothing.
        return [], []
    return loading_report(info)


def _compare_with_recipe(source: Path, quantization: dict[str, Any]) -> tuple[list[str], list[str]]:
    recipe, linears = ours.recipe_of(quantization), linear_layers(source)
    expected = dict(linears.others)
    for name, (out_features, in_features) in linears.shapes.items():
        storage = recipe.storage(name, in_features, is_head=name == linears.head)
        tensors = (
            {key: tuple(tensor.shape) for key, tensor in meta_tensors(storage, out_features, in_features).items()}
            if isinstance(storage, Storage)
            else {"weight": (out_features, in_features)}
        )
        expected |= {f"{name}.{key}": shape for key, shape in tensors.items()}
    found = {name: shape for file in weight_files(source) for name, shape in header_of(file).items()}
    for name in [each for each in expected if each not in found and is_by_expert(each, found)]:
        del expected[name]
    shapes = (
        f"{name} {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
    )
    return sorted(expected.keys() - found.keys()), sorted(shapes)


def is_by_expert(name: str, found: Iterable[str]) -> bool:
    """Whether a parameter of Transformers' belongs to a block whose experts the checkpoint has one by one.

    There it may have other names; which, only what opens it knows.
    """
    layer = DECODER_LAYER.search(name)
    return layer is not None and any(layer[0] in each and BY_EXPERT.search(each) for each in found)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no tables of Transformers' own: what they would say is said here, in a line."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
