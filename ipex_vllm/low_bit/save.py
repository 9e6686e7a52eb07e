"""Writing a checkpoint with quantized weights, which opens without quantizing again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ipex_vllm.low_bit import importance
from ipex_vllm.low_bit.architecture import Linears, linear_layers, local_directory
from ipex_vllm.low_bit.calibrate import quantized_layers
from ipex_vllm.low_bit.completeness import check_checkpoint
from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.layout import to_tensors
from ipex_vllm.low_bit.quantize import quantize
from ipex_vllm.low_bit.readers import ours, quantized_in
from ipex_vllm.low_bit.recipe import (
    OWN_TEXT,
    ExpertStorage,
    Recipe,
    Storage,
    count_layers,
    on_save,
    summarize_kept,
)
from ipex_vllm.machine.checkpoint import SAFETENSORS_INDEX as INDEX
from ipex_vllm.machine.checkpoint import header_of, some, weight_files

# An expert's matrix, where a checkpoint has them one by one.
EXPERT = re.compile(r"(?P<layer>.+\.experts)\.\d+\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
DOWN = ("down_proj", "w2")

# Of files that are not written here, and of their other layout, which vLLM would look for.
DESCRIBE_THE_SOURCE = ("pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "params.json")


def save(
    model_path: str,
    format: Format,
    out: Path,
    head: str | None = None,
    group_size: int | None = None,
    calibration: Path | Literal["own"] | None = None,
    outer: str | None = None,
) -> None:
    """Quantize the checkpoint at `model_path`, a directory or a Hugging Face name, into the new directory `out`.

    The weights of the linear layers and of experts that are stored one by one are replaced one by one, so memory holds
    one file of the result at a time; stacked experts stay, and are quantized when the checkpoint is opened. `head`,
    `group_size` and `outer` are those of `recipe.on_save`. With `calibration`, a text or `OWN_TEXT`, rounding goes
    further (`calibrate.py`), with the whole model in memory. What is stored in sym_int4, sym_int8 and fp8_e4m3 only is
    marked as compressed-tensors, which vLLM and others open without this package.
    Raises ValueError for a dtype format, a checkpoint that is quantized already, is not complete or has no layer to
    quantize, or an `out` that is not an empty directory; then nothing is left of `out`.
    """
    if format.kind == "dtype":
        raise ValueError(f"{format.name} quantizes nothing; there is nothing to save")
    on_save(format, head, group_size, outer)  # which raises
    if (existing := quantized_in(model_path)) is not None:
        raise ValueError(f"{model_path} is already quantized ({existing.description})")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a directory")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    source = local_directory(model_path)
    check_checkpoint(source)
    linears = linear_layers(source)
    recipe = on_save(format, head, group_size, outer, count_layers(linears.shapes))
    stored = {
        name: recipe.storage(name, in_features, is_head=name == linears.head)
        for name, (_, in_features) in linears.shapes.items()
    }
    check_quantizable(source, linears, stored)
    stored |= expert_storages(source, recipe)
    out.mkdir(parents=True, exist_ok=True)
    try:
        quantized = {name: storage for name, storage in stored.items() if isinstance(storage, Storage)}
        calibrated: dict[str, dict[str, torch.Tensor]] = {}
        if calibration is not None:
            text = None if calibration == OWN_TEXT else Path(calibration)
            linear = {name: storage for name, storage in quantized.items() if name in linears.shapes}
            calibrated = dict(quantized_layers(str(source), linear, text))
        _write(source, out, recipe, linears, stored, calibrated)
        check_checkpoint(out)
    except BaseException:  # Ctrl-C as well: half a checkpoint looks like a whole one
        shutil.rmtree(out, ignore_errors=True)
        raise


def check_quantizable(source: Path, linears: Linears, stored: dict[str, Storage | str]) -> None:
    """Raise ValueError where `save` would leave the layers of a model as they are."""
    if not any(isinstance(storage, Storage) for name, storage in stored.items() if name != linears.head):
        why = "; ".join(summarize_kept((name, reason) for name, reason in stored.items() if isinstance(reason, str)))
        raise ValueError(f"{source} has no linear layer that could be quantized{f': {why}' if why else ''}")
    found = {name for file in weight_files(source) for name in names_in(file)}
    if lost := [
        name for name, storage in stored.items() if isinstance(storage, Storage) and f"{name}.weight" not in found
    ]:
        raise ValueError(f"{source} names its tensors otherwise than Transformers does: it has no {some(lost)}")


def expert_storages(source: Path, recipe: Recipe) -> dict[str, Storage | str]:
    """How the matrices of experts are stored, by name, where the checkpoint has them one by one."""
    found: dict[str, Storage | str] = {}
    for file in weight_files(source):
        for name, shape in header_of(file).items() if file.suffix == ".safetensors" else ():
            if (match := EXPERT.fullmatch(name)) is None:
                continue
            is_down = match["part"] in DOWN
            hidden, intermediate = shape if is_down else reversed(shape)
            storage = recipe.expert_storage(match["layer"], hidden, intermediate)
            if isinstance(storage, ExpertStorage):
                found[name.removesuffix(".weight")] = storage.down if is_down else storage.gate_up
            else:
                found[name.removesuffix(".weight")] = storage
    return found


def names_in(file: Path) -> Iterable[str]:
    """The names of the tensors in one of a checkpoint's files."""
    return header_of(file) if file.suffix == ".safetensors" else (name for name, _ in ours.tensors_of(file))


def _write(
    source: Path,
    out: Path,
    recipe: Recipe,
    linears: Linears,
    stored: dict[str, Storage | str],
    calibrated: dict[str, dict[str, torch.Tensor]],
) -> None:
    index: dict[str, str] = {}
    quantized = {name: storage for name, storage in stored.items() if isinstance(storage, Storage)}
    left: list[str] = []
    importances = importance.read(importance.of_checkpoint(str(source)))
    with tqdm(total=len(quantized), desc=f"Quantizing to {recipe.format.name}", unit="layer") as bar:
        for file in weight_files(source):
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in ours.tensors_of(file):
                layer, _, kind = name.rpartition(".")
                if linears.is_tied and layer == linears.head:
                    continue  # a `.bin` has it, as another name of the embedding
                if kind != "weight" or layer not in quantized:
                    tensors[name] = tensor if file.suffix == ".safetensors" else tensor.clone().contiguous()
                    if tensor.dim() > 1 and layer not in stored:
                        left.append(name)
                    continue
                storage = quantized[layer]
                if (parts := calibrated.get(layer)) is None:
                    weight = quantize(tensor, storage.format, storage.group_size or 0, importances.get(layer))
                    parts = to_tensors(weight)
                for suffix, part in parts.items():
                    tensors[f"{layer}.{suffix}"] = part
                bar.update()
            name = file.with_suffix(".safetensors").name.replace("pytorch_model", "model", 1)
            save_file(tensors, out / name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, name)
        for line in summarize_kept((name, reason) for name, reason in stored.items() if isinstance(reason, str)):
            bar.write(line)
        if left:
            bar.write(f"not quantized: {some(left)} (no linear layer's)")
    _write_json(out / INDEX, {"metadata": {}, "weight_map": index})
    config = json.loads((source / "config.json").read_text())
    _write_json(out / "config.json", config | {"quantization_config": _quantization_config(recipe, linears, stored)})
    for file in source.iterdir():
        is_copied = file.suffix in (".json", ".jinja", ".model", ".txt") and file.name not in DESCRIBE_THE_SOURCE
        if is_copied and not (out / file.name).exists():
            shutil.copy(file, out)


def _quantization_config(recipe: Recipe, linears: Linears, stored: dict[str, Storage | str]) -> dict[str, Any]:
    """The entry of config.json: in compressed-tensors' words if it has any for every layer, else ours alone."""
    layers: dict[Storage, list[str]] = {}
    for name, storage in stored.items():
        if isinstance(storage, Storage):
            layers.setdefault(storage, []).append(name)
    schemes = {storage: _scheme(storage) for storage in layers}
    has_experts = any(isinstance(storage, Storage) and name not in linears.shapes for name, storage in stored.items())
    marks = ours.mark(recipe) | ({ours.EXPERTS: True} if has_experts else {})
    if not all(schemes.values()):
        return {"quant_method": f"ipex_{recipe.format.name}", **marks}
    ignored = [linears.head] if linears.is_tied and linears.head else []
    ignored += [name for name, storage in stored.items() if isinstance(storage, str)]
    groups: dict[str, Any] = {}
    # The most frequent way is that of all layers that no other group names.
    for storage in sorted(layers, key=lambda storage: -len(layers[storage])):
        targets = layers[storage] if groups else ["Linear"]
        if linears.head in layers[storage]:
            # vLLM's class for the output head is not called Linear, and its name has no prefix.
            targets = [*(name for name in targets if name != linears.head), "re:.*lm_head"]
        groups[f"group_{len(groups)}"] = {"targets": targets, **schemes[storage]}
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        **marks,
    }


def _scheme(storage: Storage) -> dict[str, Any]:
    """How compressed-tensors describes such a weight; empty if it cannot, or no kernel of vLLM's for CPUs takes it."""
    weights: dict[str, Any] = {"num_bits": storage.format.bits, "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}
    if storage.format.name == "sym_int4" and storage.group_size is not None:
        weights |= {"type": "int", "strategy": "group", "group_size": storage.group_size}
        return {"format": "pack-quantized", "weights": weights}
    if storage.format.name not in ("sym_int8", "fp8_e4m3") or storage.group_size is not None:
        return {}
    layout, kind = ("int-quantized", "int") if storage.format.kind == "integer" else ("float-quantized", "float")
    weights |= {"type": kind, "strategy": "channel"}
    return {"format": layout, "weights": weights, "input_activations": activations | {"type": kind}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
