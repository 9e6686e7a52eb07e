"""Loading checkpoints whose files are not those that vLLM reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ipex_vllm.low_bit.readers import ipex_llm


class IpexLlmLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads a local checkpoint that ipex-llm's `save_low_bit` wrote."""

    def download_model(self, model_config: Any) -> None:
        pass

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        return ipex_llm.read(Path(source.model_or_path))
