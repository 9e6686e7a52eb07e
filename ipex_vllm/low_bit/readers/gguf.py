"""Reading models from GGUF files, as llama.cpp writes them.

The metadata become a model directory among the user's caches, with a configuration and a tokenizer as Transformers has
them and a link to each file; weights are read from the files themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ipex_vllm.low_bit.kernels import experts
from ipex_vllm.low_bit.readers import ggml
from ipex_vllm.low_bit.readers.base import ExistingQuantization
from ipex_vllm.low_bit.readers.gguf_config import config_of
from ipex_vllm.low_bit.readers.gguf_tokenizer import write_tokenizer
from ipex_vllm.low_bit.recipe import EXPERT_FORMATS, ROUTER
from ipex_vllm.low_bit.rounding import CHUNK_WEIGHTS
from ipex_vllm.machine.facts import user_cache
from ipex_vllm.machine.gguf import GgufHeader, GgufTensor, read_header

# vLLM's load format and quantization for these models, and what `quant_method` says in their config.json.
LOAD_FORMAT = METHOD = "ipex_gguf"
FILES = "files"
LAYOUT = 2  # a new number makes directories that older versions wrote be written again

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
GEMMA_LAYER = LAYER | {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GPT_OSS_LAYER = LAYER | {
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
}
LAYERS = {
    "gemma2": GEMMA_LAYER,
    "gemma3": GEMMA_LAYER,
    "phi3": LAYER | {"ffn_up": "mlp.gate_up_proj"},
    "gpt-oss": GPT_OSS_LAYER,
}
BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.(?P<end>weight|bias)")
EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<part>gate|up|down)_exps\.(?P<end>weight|bias)")
# What vLLM's class of an architecture does not let a quantization have.
PLAIN = {"gemma2": ("model.embed_tokens",), "gpt-oss": ("model.embed_tokens", "lm_head")}
# Read into the configuration.
ROPE = {"rope_freqs.weight": "", "rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}


def recognises(model_path: str, config: dict[str, Any]) -> ExistingQuantization | None:
    """What the model is, if `model_directory` wrote its directory."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        return None
    arguments = {"quantization": METHOD, "load_format": LOAD_FORMAT}
    return ExistingQuantization(None, f"GGUF: {quantization['summary']}", arguments, runs_on_xpu=False)


def model_directory(files: list[Path]) -> Path:
    """The directory of the model in these GGUF files, which is written the first time.

    Raises ValueError, in one line, for files that are broken, or of a model that is not read.
    """
    key = hashlib.sha256(f"{LAYOUT} {version('transformers')}".encode())
    for file in files:
        facts = file.stat()
        key.update(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    cache = user_cache() / "gguf"
    folder = cache / f"{files[0].stem[:64]}-{key.hexdigest()[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            written = Path(temporary) / "model"
            written.mkdir()
            try:
                _write_directory(files, written)
            except ValueError as error:
                message = str(error)
                raise ValueError(message if str(files[0]) in message else f"{files[0]}: {message}") from error
            if not folder.exists():  # another process may have been faster
                written.rename(folder)
    return folder


def _write_directory(files: list[Path], folder: Path) -> None:
    header = read_header(files)
    rope = {ROPE[name]: _rope_factors(header.tensors[name]) for name in ROPE if name in header.tensors}
    config = config_of(header, rope.pop("", []), rope)
    names = {name: hf_name(header, name) for name in header.tensors if name not in ROPE}
    check_complete(header, config, names)
    config["quantization_config"] = {
        "quant_method": METHOD,
        FILES: [str(file.resolve()) for file in files],
        "summary": summary(header),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    end_ids = sorted({index for index in ends if index is not None})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids} if end_ids else {}))
    write_tokenizer(header.metadata, folder)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def summary(header: GgufHeader) -> str:
    """What became of the weights, such as "210 q4_1 as asym_int4, 1 q8_0 as sym_int8, 61 f32 as they are"."""
    counts = Counter(tensor.kind for tensor in header.tensors.values())
    formats = {kind: ggml.format_of(kind) for kind in counts}
    return ", ".join(
        f"{count} {kind} " + ("as they are" if formats[kind] == "none" else f"as {formats[kind]}")
        for kind, count in counts.most_common()
    )


def check_complete(header: GgufHeader, config: dict[str, Any], names: dict[str, str]) -> None:
    """Raise ValueError where tensors of the model are missing, or in another shape than the metadata say."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "architectures"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if ".experts." not in name}
    found = {names[name]: header.tensors[name].shape for name in names if "_exps" not in name}
    if lost := sorted(shapes.keys() - found.keys()):
        raise ValueError(f"it lacks {len(lost)} of the model's tensors: {lost[0]}, ...")
    if other := sorted(found.keys() - shapes.keys()):
        raise ValueError(f"it holds tensors that are none of the model's: {other[0]}, ...")
    if wrong := [name for name in shapes if found[name] != shapes[name]]:
        raise ValueError(f"its {wrong[0]} is {found[wrong[0]]}, where its metadata say {shapes[wrong[0]]}")


def hf_name(header: GgufHeader, name: str) -> str:
    """Transformers' name of a tensor; with "{}" for the number where it holds all experts. ValueError for others."""
    stem, _, end = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{end}"
    parts = LAYERS.get(header.metadata["general.architecture"], LAYER)
    match = BLOCK.fullmatch(name)
    if match is None or match["part"] not in parts:
        raise ValueError(f"it holds the tensor {name}, which is not read")
    end = "" if match["part"] == "attn_sinks" else f".{match['end']}"
    return f"model.layers.{match['layer']}.{parts[match['part']]}{end}"


def expert_kinds(header: GgufHeader, layer: int | str) -> tuple[str, str, str] | None:
    """ggml's types of a layer's gate, up and down; None where its experts have to be written out."""
    names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    if experts.unavailable_reason() is not None or not header.tensors.keys() >= {*names}:
        return None
    gate, up, down = (header.tensors[name].kind for name in names)
    formats = [ggml.format_of(kind) for kind in (gate, up, down)]
    return (gate, up, down) if formats[0] == formats[1] and {*formats} <= EXPERT_FORMATS.keys() else None


def read(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's tensors, under Transformers' names, over the memory of the mapped files.

    What multiplies or embeds comes as the blocks that are in the file, uint8 [rows, bytes of a row], under the name of
    its module and `blocks_name` of its type, an expert's under its own name; norms, biases, routers, experts that are
    written out and an embedding to which vLLM gives no quantization in a float dtype.
    """
    config = json.loads((directory / "config.json").read_text())
    files = [Path(file) for file in config["quantization_config"][FILES]]
    header = read_header(files)
    mapped = {file: torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8) for file in files}
    architecture = header.metadata["general.architecture"]
    for name, tensor in header.tensors.items():
        if name in ROPE:
            continue
        if (match := EXPERTS.fullmatch(name)) is not None:
            yield from _experts(header, mapped, match)
            continue
        wanted = hf_name(header, name)
        rows = _rows(tensor, mapped[tensor.file])
        if architecture == "llama" and ".attn_q." in name:
            rows = as_transformers_rotates(rows, config["num_attention_heads"])
        elif architecture == "llama" and ".attn_k." in name:
            rows = as_transformers_rotates(rows, config["num_key_value_heads"])
        if wanted.removesuffix(".weight") in PLAIN.get(architecture, ()):
            yield wanted, written_out(tensor.kind, rows)
        elif len(tensor.shape) == 2 and not ROUTER.search(wanted.removesuffix(".weight")):
            yield f"{wanted.removesuffix('.weight')}.{blocks_name(tensor.kind)}", rows
        else:
            values = ggml.dequantize(tensor.kind, rows)
            values = values.view(tensor.shape)
            # Gemma's norms multiply by one more than their weight, and the file has what they multiply by.
            yield wanted, values - 1 if architecture in ("gemma2", "gemma3") and "norm" in name else values


def _experts(
    header: GgufHeader, mapped: dict[Path, torch.Tensor], match: re.Match[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What comes of a tensor of all experts of a layer, one by one."""
    layer, part, is_bias = match["layer"], match["part"], match["end"] == "bias"

    def stacked(part: str) -> torch.Tensor:
        tensor = header.tensors[f"blk.{layer}.ffn_{part}_exps.{match['end']}"]
        rows = _rows(tensor, mapped[tensor.file])
        if is_bias:
            return ggml.dequantize(tensor.kind, rows).view(tensor.shape)
        return rows.view(*tensor.shape[:2], -1)

    kinds = expert_kinds(header, layer)
    if header.metadata["general.architecture"] == "gpt-oss":
        # vLLM's class takes gate and up together: biases in turn, as its checkpoints do, and rows of both at once.
        if part == "up":
            return
        prefix = f"model.layers.{layer}.mlp.experts"
        both = (stacked("gate"), stacked("up")) if part == "gate" else (stacked("down"),)
        if is_bias:
            name = "gate_up_proj_bias" if part == "gate" else "down_proj_bias"
            yield f"{prefix}.{name}", torch.stack(both, dim=-1).flatten(1)
            return
        if kinds is None:
            raise ValueError("gpt-oss' experts are read in blocks alone, and there is no kernel for these")
        name = "w13_weight" if part == "gate" else "w2_weight"
        for number, parts in enumerate(zip(*both, strict=True)):
            for rows in parts:  # the gate's, then up's: side by side they would be a copy
                yield f"{prefix}.{number}.{name}", rows
        return
    wanted, kind = hf_name(header, match[0]), header.tensors[match[0]].kind
    for number, rows in enumerate(stacked(part)):
        yield wanted.format(number), rows if kinds is not None else written_out(kind, rows)


def written_out(kind: str, rows: torch.Tensor) -> torch.Tensor:
    """A weight in PyTorch's default dtype, which is the served one while vLLM loads."""
    dtype = torch.get_default_dtype()
    parts = torch.split(rows, max(1, CHUNK_WEIGHTS // rows.shape[1]))
    return torch.cat([ggml.dequantize(kind, part).to(dtype) for part in parts])


def blocks_name(kind: str) -> str:
    """The name of the parameter that takes blocks of ggml's type `kind`."""
    return f"blocks_{kind}"


def _rows(tensor: GgufTensor, data: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [rows, bytes of a row]; a vector has rows of one number."""
    lies = data[tensor.start : tensor.start + tensor.num_bytes]
    num_rows = tensor.shape[0] if len(tensor.shape) < 3 else tensor.shape[0] * tensor.shape[1]
    rows = lies.view(num_rows, -1)
    return rows if tensor.start % 4 == 0 else rows.clone()  # what floats are read from has to be aligned


def as_transformers_rotates(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rows of a query or key projection in Transformers' order: llama.cpp has a head's two halves interleaved."""
    return rows.view(num_heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _rope_factors(tensor: GgufTensor) -> list[float]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        rows = torch.frombuffer(bytearray(file.read(tensor.num_bytes)), dtype=torch.uint8).view(1, -1)
    return [float(value) for value in ggml.dequantize(tensor.kind, rows).flatten()]
