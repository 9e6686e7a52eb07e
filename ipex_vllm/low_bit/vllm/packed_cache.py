"""The weights that a start has quantized, as the kernels have them, kept for the next start (`--low-bit-cache`).

A folder for each model and way to quantize it, and in it a file for each layer. What was made of other files, or by
another version, is made anew: the folder's `identity.json` says of what it is, and is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import vllm
from safetensors import safe_open
from safetensors.torch import save_file
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ipex_vllm.low_bit import LOW_BIT_CACHE, library_digest
from ipex_vllm.machine.checkpoint import stamps

IDENTITY = "identity.json"
LAYOUT = 2  # a new number makes what older versions have kept be made again

# vLLM configures the loggers below its own name only.
logger = init_logger(f"vllm.{__name__}")


class PackedCache:
    """What is kept of one rank's layers: read where it is whole and of these very weights, else written.

    Attributes:
        is_whole: there is something to read.
    """

    def __init__(self, parent: Path, name: str, identity: Mapping[str, Any]) -> None:
        self._folder = parent / name
        self._part = parent / f"{name}.part-{os.getpid()}"
        self._identity = json.loads(json.dumps(identity))
        self._remove_parts()
        fault = self._fault()
        self.is_whole = fault is None
        if self.is_whole:
            logger.info("low-bit cache: read from %s", self._folder)
            return
        try:
            self._part.mkdir(parents=True)
            logger.info("low-bit cache: %s; written to %s", fault, self._folder)
        except OSError as error:
            self._give_up(error)

    @classmethod
    def of_the_model(cls, recipe: object, importance_file: Path | None) -> PackedCache | None:
        """That of the model being built, where the user wants one and the model's files are at hand."""
        config = get_current_vllm_config()
        checkpoint = Path(config.model_config.model)
        if not os.environ.get(LOW_BIT_CACHE) or not checkpoint.is_dir():
            return None
        parallel = config.parallel_config
        rank = f"{get_tensor_model_parallel_rank()}-{parallel.rank}"
        way = (recipe, config.model_config.dtype, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        key = hashlib.sha256(f"{checkpoint.resolve()} {way} {parallel.enable_expert_parallel} {rank}".encode())
        identity = {
            "layout": LAYOUT,
            "versions": [version("ipex-vllm"), vllm.__version__, torch.__version__],
            "kernels": library_digest(),
            "files": stamps(checkpoint),
            "importance": None if importance_file is None else importance_file.name,
        }
        name = f"{checkpoint.resolve().name[:64]}-{key.hexdigest()[:16]}"
        return cls(Path(os.environ[LOW_BIT_CACHE]).expanduser(), name, identity)

    def read(self, layer: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """What `write` was given for a layer, its tensors mapped from the file; None where there is nothing."""
        path = self._folder / file_name(layer)
        if not self.is_whole or not path.exists():
            return None
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(self, layer: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a layer: what is said of it, for JSON, and its tensors."""
        if self._part.exists():
            try:
                save_file(dict(tensors), self._part / file_name(layer), {"about": json.dumps(about)})
            except OSError as error:
                self._give_up(error)

    def finish(self) -> None:
        """All layers are written: from now on they can be read."""
        if self._part.exists():
            try:
                sizes = {file.name: file.stat().st_size for file in self._part.iterdir()}
                (self._part / IDENTITY).write_text(json.dumps({**self._identity, "sizes": sizes}))
                shutil.rmtree(self._folder, ignore_errors=True)
                self._part.rename(self._folder)
            except OSError as error:
                self._give_up(error)

    def _fault(self) -> str | None:
        """Why what is there cannot be read; None where it can."""
        if not self._folder.exists():
            return "nothing is kept of this model in this format yet"
        try:
            kept = json.loads((self._folder / IDENTITY).read_text())
            sizes = kept.pop("sizes")
            are_whole = all((self._folder / name).stat().st_size == size for name, size in sizes.items())
        except (OSError, ValueError, KeyError, AttributeError):
            are_whole, kept = False, {}
        if not are_whole:
            return "what is kept is not whole, and is made anew"
        changed = [name for name, value in self._identity.items() if kept.get(name) != value]
        return f"what is kept is of other {' and '.join(changed)}, and is made anew" if changed else None

    def _remove_parts(self) -> None:
        """What starts have left that were ended while they wrote."""
        for part in self._folder.parent.glob(f"{self._folder.name}.part-*"):
            if not Path("/proc", part.name.rpartition("-")[2]).exists():
                shutil.rmtree(part, ignore_errors=True)

    def _give_up(self, error: OSError) -> None:
        logger.warning("low-bit cache: nothing is kept in %s (%s)", self._folder, error.strerror or error)
        shutil.rmtree(self._part, ignore_errors=True)


def file_name(layer: str) -> str:
    return f"{layer.replace('/', '_')}.safetensors"
