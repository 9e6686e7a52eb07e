"""Which of a model directory's files hold its weights, and whether they are all there. Standard library only."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SAFETENSORS_INDEX, PYTORCH_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<suffix>\.(safetensors|bin))$")
# What training leaves beside the weights.
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin")
NUM_NAMED = 3


def weight_files(folder: Path) -> list[Path]:
    """The files that a model is read from, by name: those of the index, else all of the first kind that there is.

    Mistral's own layout (`consolidated.safetensors`) comes after Transformers'; some repositories hold both.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        indexed = set(read_index(folder / SAFETENSORS_INDEX).values())
        chosen = [file for file in files if file.name in indexed]
        return chosen or [file for file in files if not is_mistrals(file)] or files
    files = [file for file in sorted(folder.glob("*.bin")) if file.name not in NOT_WEIGHTS]
    return files or sorted(folder.glob("*.gguf"))


def stamps(folder: Path) -> list[str]:
    """The name, size and time of change of each file that a model directory's weights are made of."""
    files = ((file.name, file.stat()) for file in (*weight_files(folder), folder / "config.json"))
    return [f"{name} {facts.st_size} {facts.st_mtime_ns}" for name, facts in files]


def is_mistrals(file: Path) -> bool:
    return file.name.startswith("consolidated")


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index has it; empty without one. Raises ValueError for one that is no index."""
    try:
        weight_map: dict[str, str] = json.loads(path.read_text())["weight_map"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of a checkpoint") from error
    return weight_map


def check_files(folder: Path) -> None:
    """Raise ValueError, naming what is missing, for a checkpoint whose files are not all there and whole.

    Compared are the index with the files and with their headers, the numbering of the shards, and the sizes that the
    headers give with the sizes of the files. That the model has no other parameters is not seen here.
    """
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no weights: neither *.safetensors nor *.bin")
    tensors = {file.name: header_of(file) for file in files if file.suffix == ".safetensors"}
    check_numbering(folder, files)
    index = read_index(folder / (SAFETENSORS_INDEX if tensors else PYTORCH_INDEX))
    names = {file.name for file in folder.iterdir()}
    if lost := sorted({file for file in index.values() if file not in names}):
        of_them = sorted(name for name, file in index.items() if file in lost)
        raise ValueError(f"{folder} lacks {some(lost)}, which its index names: with it {some(of_them)}")
    if lost := sorted(name for name, file in index.items() if file in tensors and name not in tensors[file]):
        raise ValueError(f"{folder} lacks tensors that its index names: {some(lost)}")


def check_numbering(folder: Path, files: Sequence[Path]) -> None:
    shards: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := SHARD.match(file.name):
            numbers = shards.setdefault((match["stem"], match["total"], match["suffix"]), set())
            numbers.add(int(match["number"]))
    for (stem, total, suffix), numbers in shards.items():
        lost = sorted(set(range(1, int(total) + 1)) - numbers)
        if lost:
            names = [f"{stem}-{number:0{len(total)}d}-of-{total}{suffix}" for number in lost]
            raise ValueError(f"{folder} lacks {some(names)}: there are {len(numbers)} of {int(total)} shards")


def header_of(path: Path) -> Mapping[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file. Raises ValueError for one that is cut off, or is none.

    Format: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is cut off, or no safetensors file: its header cannot be read") from error
    if end > size:
        raise ValueError(f"{path} is cut off: it has {size} of {end} bytes")
    return shapes


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many there are beside them."""
    names = list(names)
    others = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + others
