"""What a model directory tells before it is loaded. Standard library only."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ipex_vllm.machine.kv_cache import KvCache, number, read_kv_cache, text_part


@dataclass(frozen=True)
class ModelFacts:
    """What a model directory tells before it is loaded; None where it does not (a name to be fetched, say).

    Attributes:
        weight_bytes: the checkpoint's size.
        embedding_bytes: the share of it that stays as it is when the rest is quantized.
        is_quantized: the checkpoint holds quantized weights, which are loaded as they are.
        kv_cache: what all layers keep of a sequence, in 16 bits.
        max_position: the longest context that the model was made for, in tokens.
        tensors: of each tensor, its shape and the bytes of an element; empty where no safetensors header says.
        is_tied: the output head is the embedding.
        model_type: the configuration's name of the architecture.
        is_gated_linear: some layers are linear attention of the gated delta kind (Qwen3-Next, Qwen3.5).
        dtype: what the configuration says that it computes in, by PyTorch's name.
        quantization: what the quantized weights are, where the configuration says it in words.
        draft: the model that drafts for this one, whose cache is in `kv_cache`, too.
        num_hosts: the sizes above are for one of so many hosts, `tensors` is for all.
    """

    weight_bytes: int | None = None
    embedding_bytes: int = 0
    is_quantized: bool = False
    kv_cache: KvCache | None = None
    max_position: int | None = None
    tensors: Mapping[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    is_tied: bool = False
    model_type: str | None = None
    is_gated_linear: bool = False
    dtype: str | None = None
    quantization: str = ""
    draft: ModelFacts | None = None
    num_hosts: int = field(default=1, compare=False)

    @classmethod
    def read(cls, model_path: str) -> ModelFacts:
        folder = Path(model_path)
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            config = None
        if not isinstance(config, dict):
            return cls()
        # Some repositories hold the weights twice, under the second name as well.
        patterns = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "*.gguf")
        files = next((files for pattern in patterns if (files := list(folder.glob(pattern)))), [])
        text = text_part(config)
        tensors = read_headers([file for file in files if file.suffix != ".gguf"])
        return cls(
            weight_bytes=sum(file.stat().st_size for file in files) or None,
            embedding_bytes=2 * (number(text, "vocab_size") or 0) * (number(text, "hidden_size") or 0),
            is_quantized=text.get("quantization_config") is not None,
            dtype=text.get("dtype") or text.get("torch_dtype"),  # Transformers 5 and before
            quantization=str((text.get("quantization_config") or {}).get("summary", "")),
            kv_cache=read_kv_cache(text),
            max_position=number(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
            tensors=tensors,
            model_type=text.get("model_type"),
            is_gated_linear=number(text, "linear_num_key_heads") is not None,
            is_tied=bool(text.get("tie_word_embeddings", bool(tensors) and "lm_head.weight" not in tensors)),
        )

    def beside(self, draft: ModelFacts) -> ModelFacts:
        """This model with one that drafts for it."""
        both = self.kv_cache and draft.kv_cache and self.kv_cache.plus(draft.kv_cache)
        return replace(self, draft=draft, kv_cache=both)

    def share_of(self, num_hosts: int) -> ModelFacts:
        """What one of the hosts holds, when they divide the model among them."""
        return replace(
            self,
            weight_bytes=self.weight_bytes and self.weight_bytes // num_hosts,
            embedding_bytes=self.embedding_bytes // num_hosts,
            kv_cache=self.kv_cache and self.kv_cache.times(1 / num_hosts),
            draft=self.draft and self.draft.share_of(num_hosts),
            num_hosts=num_hosts,
        )


def read_headers(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of an element of every tensor in some safetensors files; nothing if one of them is none.

    Format: https://github.com/huggingface/safetensors#format
    """
    tensors = {}
    for path in files:
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length)) if length < path.stat().st_size else {}
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    tensors[name] = tuple(entry["shape"]), (end - start) // max(math.prod(entry["shape"]), 1)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return {}
    return tensors
