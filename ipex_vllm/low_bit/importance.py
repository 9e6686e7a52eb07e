"""Which inputs of each linear layer matter: what rounding weighs the error of a weight's columns by.

The importance of an input is its mean square. A hundred random token ids, sent once through the model in float32, give
it as well as text does (docs/low-bit.md has the figures), so no data is needed. A checkpoint is read layer by layer,
with one layer in memory at a time, and the result, a few MB, is kept beside the user's other caches.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ipex_vllm.machine.checkpoint import stamps, weight_files
from ipex_vllm.machine.facts import user_cache
from ipex_vllm.machine.memory import give_memory_back

logger = logging.getLogger(__name__)

NUM_TOKENS = 128
# What Transformers stacks an expert's matrices in, and which.
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
METHOD = 1  # a new number makes what older versions have kept be measured again


def measure(model: nn.Module, token_ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The importance, float32 [in_features], of each `nn.Linear` of a Transformers `model` that is reached, by name.

    `token_ids` int64 [batch, tokens]; by default `NUM_TOKENS` random ones, always the same.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, rows: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + rows.square().sum(0)
        counts[name] = counts.get(name, 0) + len(rows)

    if token_ids is None:
        token_ids = random_token_ids(model.config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.inference_mode(), inputs_given_to(linears, add):
        model(input_ids=token_ids, use_cache=False)
    return {name: (total / counts[name]).cpu() for name, total in sums.items() if total.isfinite().all()}


def of_model(model: nn.Module) -> dict[str, torch.Tensor]:
    """`measure`, or nothing, with one line that says why, for a model that takes no token ids."""
    try:
        return measure(model)
    except Exception as error:  # whatever the model raises
        _say_unknown(error)
        return {}


def random_token_ids(config: Any) -> torch.Tensor:
    """int64 [1, `NUM_TOKENS`], evenly distributed over the vocabulary."""
    size = config.get_text_config().vocab_size
    return torch.randint(0, size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))


def of_checkpoint(model_path: str) -> Path | None:
    """The file with the importance of the inputs of the checkpoint at `model_path`, a directory or Hugging Face name.

    It is measured now if it is not in the cache. None, with one line that says why, for a model that Transformers
    cannot run.
    """
    try:
        checkpoint = _folder_of(model_path)
        path = _cache_file(checkpoint)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                save_file(_measure_checkpoint(checkpoint, folder), Path(folder) / "importance")
                gc.collect()  # Transformers' hooks and modules refer to each other
                give_memory_back()
                (Path(folder) / "importance").replace(path)
        return path
    except Exception as error:  # whatever Transformers raises: weights are rounded without it
        _say_unknown(error)
        return None


def read(path: Path | None) -> dict[str, torch.Tensor]:
    """What `of_checkpoint` keeps, by the names of Transformers' modules; nothing for None."""
    return {} if path is None else load_file(path)


def find(importance: Mapping[str, torch.Tensor], name: str, merged: Mapping[str, list[str]]) -> torch.Tensor | None:
    """The importance of the inputs of vLLM's layer `name`, or None.

    `merged` names the layers of the checkpoint that one of vLLM's holds. A model of several parts can have other
    prefixes there than in Transformers, so the longest common end of the name decides.
    """
    parent, _, last = name.rpartition(".")
    first = merged.get(last, [last])[0]
    wanted = f"{parent}.{first}" if parent else first
    found = importance.get(wanted)
    if found is None:
        ends = [key for key in importance if f".{key}".endswith(f".{_from_layers(wanted)}")]
        found = importance[ends[0]] if len(ends) == 1 else None
    return found


def _say_unknown(error: Exception) -> None:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    logger.warning("weights are rounded without knowing which inputs matter: Transformers cannot run it (%s)", reason)


def _from_layers(name: str) -> str:
    """The name from "layers." on, which is where Transformers and vLLM agree."""
    start = name.find("layers.")
    return name if start < 0 else name[start:]


def _measure_checkpoint(checkpoint: Path, folder: str) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = _with_stacked_experts(checkpoint)
    if model is None:
        # "disk": Transformers reads each module's weights from the checkpoint's own files when it is called.
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, device_map={"": "disk"}, offload_folder=folder
        )
    model.eval()
    layers = getattr(model.get_decoder(), "layers", [])
    with tqdm(total=len(layers), desc="Measuring which inputs matter", unit="layer") as bar:
        hooks = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers]
        result = measure(model)
        for hook in hooks:
            hook.remove()
    return result


class StackingWeights(Mapping[str, torch.Tensor]):
    """A checkpoint's tensors by the names of Transformers' parameters, each read from its file when it is asked for.

    Transformers keeps the experts of a layer in one tensor, which most checkpoints do not: it is stacked here.
    """

    def __init__(self, folder: Path) -> None:
        files: list[Any] = [safe_open(file, "pt") for file in weight_files(folder) if file.suffix == ".safetensors"]
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def parts(self, name: str) -> list[list[str]]:
        """The names in the checkpoint of what `name` is stacked of: for each of its parts, those of all experts."""
        experts, _, stacked = name.rpartition(".")
        named = ((f"{experts}.{number}.{part}.weight" for number in count()) for part in STACKED.get(stacked, ()))
        return [list(takewhile(self._files.__contains__, names)) for names in named]

    def __contains__(self, name: object) -> bool:
        return name in self._files or any(self.parts(str(name)))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._files:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
            return tensor
        parts = [torch.stack([self[each] for each in of_part]) for of_part in self.parts(name)]
        return torch.cat(parts, dim=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _with_stacked_experts(checkpoint: Path) -> Any:
    """The model on a checkpoint that has a tensor for each expert; None where that is not what is special about it.

    Transformers would first write all of such a model, in float32, to the disk.
    """
    from accelerate import cpu_offload, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    weights = StackingWeights(checkpoint)
    if not any(".experts.0." in name for name in weights):
        return None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint), dtype=torch.float32)
    if not all(name in weights for name, _ in model.named_parameters(remove_duplicate=False)):
        return None
    return cpu_offload(model, torch.device("cpu"), state_dict=weights)


@contextmanager
def inputs_given_to(modules: Mapping[str, nn.Module], add: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within it, what one of `modules` is called with goes to `add`, too, as float32 [rows, in_features]."""

    def hook(name: str) -> Any:
        return lambda _, inputs: add(name, inputs[0].detach().flatten(0, -2).float())

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cache_file(folder: Path) -> Path:
    """Where the importance of these very files is kept."""
    key = hashlib.sha256(f"{METHOD} {NUM_TOKENS} {version('transformers')}".encode())
    for stamp in stamps(folder):
        key.update(f"{stamp}\n".encode())
    return user_cache() / "importance" / f"{folder.resolve().name[:64]}-{key.hexdigest()[:16]}.safetensors"


def _folder_of(model_path: str) -> Path:
    """The directory of the checkpoint at `model_path`, a directory or Hugging Face name, which is downloaded."""
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_path, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
