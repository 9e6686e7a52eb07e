"""Write a model directory's linear layers as AWQ, GPTQ, AutoRound, compressed-tensors, fp8 and MXFP4 checkpoints do.

    python -m benchmarks.checkpoints --model-path DIR --layout awq --out OUT

Weights are rounded to the nearest, without calibration: for tests, and for benchmarks of speed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ipex_vllm.low_bit.quantize import pack_nibbles
from ipex_vllm.low_bit.readers.ours import read

# What the tools leave as it is, beside all that is no matrix.
KEPT = re.compile(r"(^|\.)(lm_head|embed_tokens|gate|router|shared_expert_gate)\.weight$")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs in the nibbles of a word, from the lowest


@dataclass(frozen=True)
class Rounded:
    """A weight as (codes - zeros) * scales: codes uint8 [out, in], scales float16 and zeros uint8 [out, groups].

    The i-th input belongs to the group `groups[i]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor

    def values(self) -> torch.Tensor:
        """The weight, float32 [out, in]."""
        return (self.codes.float() - self.zeros.float()[:, self.groups]) * self.scales.float()[:, self.groups]


# What a tool makes of a weight [out, in] and a group size: its tensors, by the ends of their names, and what they stand
# for, float32 [out, in].
Store = Callable[[torch.Tensor, int], tuple[dict[str, torch.Tensor], torch.Tensor]]


@dataclass(frozen=True)
class Layout:
    """A tool's way of storing weights, the `quantization_config` that says so, and our format of the same codes.

    `of_experts` is of those whose linear layers stay as they are.
    """

    format: str
    store: Store
    config: Callable[[int], dict[str, Any]]
    of_experts: bool = False


def awq_tensors(rounded: Rounded) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_nibbles(rounded.codes.t(), AWQ_ORDER),
        "qzeros": pack_nibbles(rounded.zeros.t(), AWQ_ORDER),
        "scales": rounded.scales.t(),
    }


def gptq_tensors(zero_offset: int) -> Callable[[Rounded], dict[str, torch.Tensor]]:
    """GPTQ's first version stores zero points less one (offset 1), its second as they are (0)."""

    def tensors(rounded: Rounded) -> dict[str, torch.Tensor]:
        return {
            "qweight": pack_nibbles(rounded.codes).t(),
            "qzeros": pack_nibbles(((rounded.zeros - zero_offset) & 15).t()),
            "scales": rounded.scales.t(),
            "g_idx": rounded.groups.int(),
        }

    return tensors


def without_order(rounded: Rounded) -> dict[str, torch.Tensor]:
    """As AutoRound: the first version of GPTQ's."""
    tensors = gptq_tensors(1)(rounded)
    del tensors["g_idx"]
    return tensors


def compressed_tensors(rounded: Rounded) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import (  # type: ignore[import-untyped]
        pack_to_int32,
    )

    def signed(codes: torch.Tensor) -> torch.Tensor:
        return (codes.to(torch.int16) - 8).to(torch.int8)

    tensors = {
        "weight_packed": pack_to_int32(signed(rounded.codes), 4),
        "weight_scale": rounded.scales,
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    if bool((rounded.zeros != 8).any()):
        tensors["weight_zero_point"] = pack_to_int32(signed(rounded.zeros), 4, packed_dim=0)
    return tensors


def gptq_config(
    is_symmetric: bool, is_reordered: bool = False, version: str = "gptq"
) -> Callable[[int], dict[str, Any]]:
    common = {"quant_method": "gptq", "bits": 4, "sym": is_symmetric, "desc_act": is_reordered}
    return lambda group_size: {**common, "group_size": group_size, "checkpoint_format": version}


def awq_config(group_size: int) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def auto_round_config(group_size: int) -> dict[str, Any]:
    packing = {"packing_format": "auto_round:auto_gptq", "data_type": "int", "autoround_version": "0.9.2"}
    return {"quant_method": "auto-round", "bits": 4, "group_size": group_size, "sym": True, **packing}


def compressed_config(is_symmetric: bool) -> Callable[[int], dict[str, Any]]:
    def config(group_size: int) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "symmetric": is_symmetric, "strategy": "group"}
        group = {"targets": ["Linear"], "weights": {**weights, "group_size": group_size}}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*mlp.gate$"],
        }

    return config


def round_weight(weight: torch.Tensor, group_size: int, is_symmetric: bool, is_reordered: bool = False) -> Rounded:
    """Round to the nearest; `is_reordered` makes the groups of inputs that do not lie side by side."""
    outputs, inputs = weight.shape
    order = torch.arange(inputs)
    if is_reordered:  # the same for all layers of so many inputs, among them those that are computed as one
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
    grouped = weight.float()[:, order].view(outputs, -1, group_size)
    if is_symmetric:
        scales = (grouped.abs().amax(2) / 7.5).half()
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float().clamp(min=1e-8)).round().clamp(0, 15).to(torch.uint8)
    steps = grouped / scales.float().clamp(min=1e-8).unsqueeze(2) + zeros.unsqueeze(2)
    codes = torch.empty(outputs, inputs, dtype=torch.uint8)
    codes[:, order] = steps.round().clamp(0, 15).to(torch.uint8).flatten(1)
    groups = torch.empty(inputs, dtype=torch.long)
    groups[order] = torch.arange(inputs) // group_size
    return Rounded(codes, scales, zeros, groups)


def integers(
    tensors: Callable[[Rounded], dict[str, torch.Tensor]], is_symmetric: bool, is_reordered: bool = False
) -> Store:
    """Round to 4 bits, and store that as `tensors` does."""

    def store(weight: torch.Tensor, group_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rounded = round_weight(weight, group_size, is_symmetric, is_reordered)
        return tensors(rounded), rounded.values()

    return store


def fp8(rows: int, scale_name: str) -> Store:
    """Round to 8-bit floats in blocks of `rows` x the group size; 0 rows are one, and all of its inputs."""

    def store(weight: torch.Tensor, group_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        outputs, inputs = weight.shape
        height, width = (rows, group_size) if rows else (1, inputs)
        padded = torch.nn.functional.pad(weight.float(), (0, -inputs % width, 0, -outputs % height))
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448

        def spread(scales: torch.Tensor) -> torch.Tensor:
            whole = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
            return whole[:outputs, :inputs]

        codes = (weight.float() / spread(scales)).to(torch.float8_e4m3fn)
        return {"weight": codes, scale_name: scales}, codes.float() * spread(scales)

    return store


def fp8_config(group_size: int) -> dict[str, Any]:
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(100)]
    common = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head", *routers]}
    return {**common, "weight_block_size": [group_size, group_size]}


def int8(is_dynamic: bool) -> Store:
    """Round to 8-bit integers with a scale an output; or with one for all, and one and a zero point for activations."""

    def store(weight: torch.Tensor, _: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        largest = weight.float().abs().amax(1, keepdim=True)
        scales = (largest if is_dynamic else largest.max().reshape(1)).clamp(min=1e-12) / 127
        codes = (weight.float() / scales).round().to(torch.int8)
        tensors = {"weight": codes, "weight_scale": scales}
        if not is_dynamic:
            tensors |= {"input_scale": torch.tensor([0.05]), "input_zero_point": torch.tensor([-3], dtype=torch.int8)}
        return tensors, codes.float() * scales

    return store


def compressed_config_of_8_bits(
    type_name: str, format: str, is_dynamic: bool = True
) -> Callable[[int], dict[str, Any]]:
    """Weights have a scale an output and activations one a token; or both one for all, and activations a zero point."""

    def config(_: int) -> dict[str, Any]:
        common = {"num_bits": 8, "type": type_name}
        weights = {**common, "strategy": "channel" if is_dynamic else "tensor", "symmetric": True, "dynamic": False}
        own = {"strategy": "token" if is_dynamic else "tensor", "symmetric": is_dynamic, "dynamic": is_dynamic}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": {**common, **own}}
        return {
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*mlp.gate$"],
        }

    return config


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def round_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round [..., in] to 4-bit floats whose largest exponent is that of the block's largest number.

    Returns codes uint8 [..., in / 32, 16], the first of two in the low half, exponents [..., in / 32], and the values.
    """
    blocks = weight.float().reshape(*weight.shape[:-1], -1, 32)
    # 6 is 1.5 * 2^2.
    exponents = torch.frexp(blocks.abs().amax(-1).clamp(min=2.0**-100)).exponent - 1 - 2 + 127
    scales = (exponents << 23).view(torch.float32).unsqueeze(-1)
    scaled = blocks / scales
    numbers = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    codes = (numbers + 8 * (scaled < 0)).to(torch.uint8)
    values = E2M1[numbers] * scaled.sign() * scales
    return codes[..., 0::2] | codes[..., 1::2] << 4, exponents.to(torch.uint8), values.flatten(-2)


def mxfp4_tensors(weight: torch.Tensor, _: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, exponents, values = round_mxfp4(weight)
    return {"weight_packed": codes.flatten(-2), "weight_scale": exponents}, values


def gpt_oss_tensors(weight: torch.Tensor, _: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of stacked experts [experts, in, out], whose inputs come last in the file."""
    codes, exponents, values = round_mxfp4(weight.transpose(1, 2))
    return {"_blocks": codes, "_scales": exponents}, values.transpose(1, 2)


def compressed_mxfp4_config(_: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def gpt_oss_config(_: int) -> dict[str, Any]:
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": kept}


SYMMETRIC, ASYMMETRIC = "sym_int4", "asym_int4"
LAYOUTS = {
    "awq": Layout(ASYMMETRIC, integers(awq_tensors, False), awq_config),
    "gptq": Layout(SYMMETRIC, integers(gptq_tensors(1), True), gptq_config(True)),
    "gptq-asym": Layout(ASYMMETRIC, integers(gptq_tensors(1), False), gptq_config(False)),
    "gptq-v2": Layout(ASYMMETRIC, integers(gptq_tensors(0), False), gptq_config(False, version="gptq_v2")),
    "gptq-act-order": Layout(SYMMETRIC, integers(gptq_tensors(1), True, True), gptq_config(True, True)),
    "auto-round": Layout(SYMMETRIC, integers(without_order, True), auto_round_config),
    "compressed-tensors": Layout(SYMMETRIC, integers(compressed_tensors, True), compressed_config(True)),
    "compressed-tensors-asym": Layout(ASYMMETRIC, integers(compressed_tensors, False), compressed_config(False)),
    "fp8-blocks": Layout("fp8_e4m3", fp8(128, "weight_scale_inv"), fp8_config),
    "fp8-channels": Layout("fp8_e4m3", fp8(0, "weight_scale"), compressed_config_of_8_bits("float", "float-quantized")),
    "int8-channels": Layout("sym_int8", int8(True), compressed_config_of_8_bits("int", "int-quantized")),
    "int8-static": Layout("sym_int8", int8(False), compressed_config_of_8_bits("int", "int-quantized", False)),
    "mxfp4": Layout("fp4", mxfp4_tensors, compressed_mxfp4_config),
    "gpt-oss": Layout("fp4", gpt_oss_tensors, gpt_oss_config, of_experts=True),
}


def write(source: Path, out: Path, layout: Layout, group_size: int = 128, values: Path | None = None) -> None:
    """Write the model directory `source` to the new directory `out`, and to `values` what its tensors stand for.

    That is in float32, for Transformers to read. What is not rounded is in float16.
    """
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in read(source):
        if not is_stored(name, tensor, layout):
            stored[name] = tensor.half()
            meant[name] = stored[name].float()
            continue
        parts, value = layout.store(tensor, group_size)
        for end, part in parts.items():
            stored[name + end if layout.of_experts else f"{name.removesuffix('.weight')}.{end}"] = part.contiguous()
        if values is not None:
            meant[name] = value
    write_directory(source, out, stored, {"dtype": "float16", "quantization_config": layout.config(group_size)})
    if values is not None:
        write_directory(source, values, meant, {"dtype": "float32"})


def is_stored(name: str, tensor: torch.Tensor, layout: Layout) -> bool:
    """Whether the layout has a way of its own for this tensor."""
    if layout.of_experts:
        return tensor.dim() == 3
    return tensor.dim() == 2 and name.endswith(".weight") and not KEPT.search(name)


def write_directory(source: Path, out: Path, tensors: dict[str, torch.Tensor], changes: dict[str, Any]) -> None:
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name:
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint in the layout of another tool.")
    parser.add_argument("--model-path", type=Path, required=True, help="a directory in full precision")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True, help="the new directory")
    args = parser.parse_args()
    write(args.model_path, args.out, LAYOUTS[args.layout], args.group_size)
    print(args.out)


if __name__ == "__main__":
    main()
