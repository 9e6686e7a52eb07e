"""Quantized checkpoints: what a directory holds already, and writing one that opens without quantizing again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ipex_vllm.low_bit.formats import Format
from ipex_vllm.low_bit.quantize import QuantizedWeight, pack_nibbles, quantize, unpack_nibbles, unsuitable_reason

# The entry of config.json's `quantization_config` that marks a checkpoint as written here.
MARK = "ipex_vllm_format"
# The entry of config.json by which ipex-llm's `save_low_bit` names its format.
IPEX_LLM_MARK = "bigdl_transformers_low_bit"
# ipex-llm's checkpoints whose blocks can be read, and vLLM's load format for them.
IPEX_LLM_FORMATS = ("sym_int4", "asym_int4", "sym_int8")
IPEX_LLM_LOAD_FORMAT = "ipex_llm_low_bit"


@dataclass(frozen=True)
class ExistingQuantization:
    """How a checkpoint is quantized. `format_name` is None if that is none of ours."""

    format_name: str | None
    description: str
    vllm_arguments: dict[str, Any] = field(default_factory=dict)


def read_config(model_path: str) -> dict[str, Any]:
    """The config.json of a directory or a Hugging Face name; ValueError if there is none to read."""
    from transformers import PretrainedConfig

    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(model_path)[0]
    except OSError as error:
        raise ValueError(f"cannot read the configuration of {model_path}: {str(error).splitlines()[0]}") from error
    return config


def quantized_in(model_path: str) -> ExistingQuantization | None:
    """Say how the checkpoint at `model_path`, a directory or a Hugging Face name, is quantized; None if it is not.

    Raises ValueError if there is no configuration to read, or if ipex-llm wrote it in a format that cannot be read.
    """
    config = read_config(model_path)
    if name := config.get(IPEX_LLM_MARK):
        if name not in IPEX_LLM_FORMATS:
            readable = ", ".join(IPEX_LLM_FORMATS)
            raise ValueError(f"{model_path} was saved by ipex-llm in {name}; readable are {readable}")
        arguments = {"quantization": f"ipex_{name}", "load_format": IPEX_LLM_LOAD_FORMAT}
        return ExistingQuantization(name, f"{name}, saved by ipex-llm", arguments)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization is None:
        return None
    if name := quantization.get(MARK):
        return ExistingQuantization(name, name, {"quantization": f"ipex_{name}"})
    method = str(quantization.get("quant_method"))
    return ExistingQuantization(_format_of(method, quantization), method)


def _format_of(method: str, quantization: dict[str, Any]) -> str | None:
    """Our name for what another tool's `quantization_config` describes, or None."""
    if method == "fp8":
        return "fp8_e4m3"
    if method == "compressed-tensors":
        weights = next(iter(quantization["config_groups"].values()))["weights"]
        kind, bits, symmetric = weights["type"], weights["num_bits"], weights["symmetric"]
    else:
        kind, bits = "int", quantization.get("bits", quantization.get("w_bit"))
        symmetric = quantization.get("sym", not quantization.get("zero_point", False))
    names = {
        ("int", 4, True): "sym_int4",
        ("int", 4, False): "asym_int4",
        ("int", 8, True): "sym_int8",
        ("float", 8, True): "fp8_e4m3",
    }
    return names.get((kind, bits, symmetric))


def to_tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors that stand for a linear layer's weight in a checkpoint, by the ends of their names.

    4-bit codes are packed as compressed-tensors' "pack-quantized" wants them: `weight_packed` int32 [out, in / 8],
    `weight_scale` [out, in / group] and `weight_shape` [2]; wider codes are `weight` [out, in] and `weight_scale`.
    """
    if weight.format.bits == 4:
        tensors = {"weight_packed": pack_nibbles(weight.codes), "weight_shape": torch.tensor(weight.codes.shape)}
    else:
        tensors = {"weight": weight.codes}
    tensors["weight_scale"] = weight.scales
    if weight.mins is not None:
        tensors["weight_min"] = weight.mins
    return tensors


def from_tensors(format: Format, tensors: dict[str, torch.Tensor]) -> QuantizedWeight:
    """The inverse of `to_tensors`."""
    codes = unpack_nibbles(tensors["weight_packed"]) if format.bits == 4 else tensors["weight"]
    return QuantizedWeight(format, codes, tensors["weight_scale"], tensors.get("weight_min"))


def meta_tensors(format: Format, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    """Tensors on the meta device, shaped and typed as `to_tensors` makes them for such a layer."""
    with torch.device("meta"):
        groups = in_features // (format.group_size or in_features)
        scales = torch.empty((out_features, groups), dtype=torch.float16 if format.group_size else torch.float32)
        shape = (out_features, in_features)
        if format.bits == 4:
            codes = {"weight_packed": torch.empty((out_features, in_features // 8), dtype=torch.int32)}
            codes["weight_shape"] = torch.empty(2, dtype=torch.int64)
        elif format.values is not None:
            codes = {"weight": torch.empty(shape, dtype=torch.uint8)}
        else:
            codes = {"weight": torch.empty(shape, dtype=getattr(torch, format.dtype or "int8"))}
    return codes | {"weight_scale": scales} | ({} if format.symmetric else {"weight_min": scales})


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
    source = _local_directory(model_path)
    shapes, tied_head = linear_shapes(source)
    out.mkdir(parents=True, exist_ok=True)
    ignored = [tied_head] if tied_head else []
    index: dict[str, str] = {}
    with tqdm(total=len(shapes), desc=f"Quantizing to {format.name}", unit="layer") as bar:
        for file in sorted(source.glob("*.safetensors")):
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in _read(file):
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
        return {"quant_method": f"ipex_{format.name}", MARK: format.name}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        # vLLM's class for the output head is not called Linear.
        "config_groups": {"group_0": {"targets": ["Linear", "re:.*lm_head"], **group}},
        "ignore": ignored,
        MARK: format.name,
    }


def _local_directory(model_path: str) -> Path:
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model_path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
    )


def linear_shapes(source: Path) -> tuple[dict[str, tuple[int, int]], str | None]:
    """The (out_features, in_features) of the model's linear layers, by name, and the name of a tied output head.

    A tied head shares the embedding's weight, so that a checkpoint has none for it; it is not among the shapes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items() if linear is not head}
    return shapes, next((name for name, linear in linears.items() if linear is head), None)


def _read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            yield name, tensors.get_tensor(name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
