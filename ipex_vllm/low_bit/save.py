"""Writing a checkpoint with quantized weights, which opens without quantizing again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from ipex_vllm.low_bit.architecture import linear_shapes, local_directory
from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.layout import to_tensors
from ipex_vllm.low_bit.quantize import quantize, unsuitable_reason
from ipex_vllm.low_bit.readers import ours, quantized_in


def save(model_path: str, format: Format, out: Path) -> None:
    """Quantize the checkpoint at `model_path`, a directory or a Hugging Face name, into the new directory `out`.

    The weights of the linear layers are replaced one by one, so memory holds one file of the result at a time.
    sym_int4, sym_int8 and fp8_e4m3 are marked as compressed-tensors, which vLLM and others open without this package.
    Raises ValueError for a dtype format, a checkpoint that is quantized already, or an `out` that is not empty.
    """
    if format.kind == "dtype":
        raise ValueError(f"{format.name} quantizes nothing; there is nothing to save")
    if (existing := quantized_in(model_path)) is not None:
        raise ValueError(f"{model_path} is already quantized ({existing.description})")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    source = local_directory(model_path)
    shapes, tied_head = linear_shapes(source)
    out.mkdir(parents=True, exist_ok=True)
    ignored = [tied_head] if tied_head else []
    index: dict[str, str] = {}
    with tqdm(total=len(shapes), desc=f"Quantizing to {format.name}", unit="layer") as bar:
        for file in sorted(source.glob("*.safetensors")):
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in ours.tensors_of(file):
                layer, _, kind = name.rpartition(".")
                if kind != "weight" or layer not in shapes:
                    tensors[name] = tensor
                    continue
                bar.update()
                if reason := unsuitable_reason(format, tensor.shape[1]):
                    bar.write(f"{layer} stays in {tensor.dtype}: {reason}")
                    ignored.append(layer)
                    tensors[name] = tensor
                    continue
                for suffix, part in to_tensors(quantize(tensor, format)).items():
                    tensors[f"{layer}.{suffix}"] = part
            save_file(tensors, out / file.name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, file.name)
    _write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    config = json.loads((source / "config.json").read_text())
    _write_json(out / "config.json", config | {"quantization_config": _quantization_config(format, ignored)})
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not (out / file.name).exists():
            shutil.copy(file, out)


def _quantization_config(format: Format, ignored: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": format.bits, "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "symmetric": True, "dynamic": True, "strategy": "token"}
    if format.name == "sym_int4":
        layout = "pack-quantized"
        group = {"weights": weights | {"type": "int", "strategy": "group", "group_size": format.group_size}}
    elif format.name == "sym_int8":
        layout = "int-quantized"
        group = {
            "weights": weights | {"type": "int", "strategy": "channel"},
            "input_activations": activations | {"type": "int"},
        }
    elif format.name == "fp8_e4m3":
        layout = "float-quantized"
        group = {
            "weights": weights | {"type": "float", "strategy": "channel"},
            "input_activations": activations | {"type": "float"},
        }
    else:
        return {"quant_method": f"ipex_{format.name}", ours.MARK: format.name}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        # vLLM's class for the output head is not called Linear.
        "config_groups": {"group_0": {"targets": ["Linear", "re:.*lm_head"], **group}},
        "ignore": ignored,
        ours.MARK: format.name,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
