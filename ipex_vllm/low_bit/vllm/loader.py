"""Loading checkpoints whose files are not those that vLLM reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ipex_vllm.low_bit.readers import FORMATS_OF_FILES


class FilesLoader(DefaultModelLoader):  # type: ignore[misc]
    """Loads a local directory through the reader whose load format vLLM was given."""

    def download_model(self, model_config: Any) -> None:
        pass

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        return FORMATS_OF_FILES[self.load_config.load_format].read(Path(source.model_or_path))
