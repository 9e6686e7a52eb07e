"""The header of a GGUF file: its metadata, and where its tensors lie. Standard library only.

Everything is held against the size of the file before it is used, so that a broken file is one line and never a read
outside of it. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf$")

# ggml's number of each type that can be read: its name, the weights in a block and the bytes of one.
BLOCKS = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    20: ("iq4_nl", 32, 18),
    23: ("iq4_xs", 256, 136),
    30: ("bf16", 1, 2),
    39: ("mxfp4", 32, 17),
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `num_bytes` from `start` of `file`. `shape` has the rows first; `kind` is ggml's type."""

    kind: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The metadata of a model, by GGUF's keys, and its tensors, by GGUF's names, of all of its files."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def find_files(model_path: str) -> list[Path]:
    """The GGUF files of the model at `model_path`: a file, one of several that it is split into, or their directory.

    Empty for anything else, such as a directory with another checkpoint. Raises ValueError for a directory with more
    than one model, and for a split file whose other parts are missing.
    """
    path = Path(model_path)
    if path.is_dir():
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            return []
        found = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))
        if not found:
            return []
        path = found[0]
        if others := [file.name for file in found if file not in _parts(path)]:
            raise ValueError(f"{model_path} holds several models ({path.name}, {others[0]}, ...): give one file's path")
    elif path.suffix != ".gguf" or not path.is_file():
        return []
    parts = _parts(path)
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(f"{path.parent} lacks {missing[0]}, one of the {len(parts)} files of this model")
    return parts


def _parts(path: Path) -> list[Path]:
    match = SPLIT.match(path.name)
    if match is None:
        return [path]
    total = int(match["total"])
    return [path.with_name(f"{match['stem']}-{number:05d}-of-{total:05d}.gguf") for number in range(1, total + 1)]


def read_header(files: Sequence[Path]) -> GgufHeader:
    """The header of a model in one file or split into several. Raises ValueError, in one line, for a broken file."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    for file in files:
        try:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                values, found = _Cursor(file, data).header()
        except (ValueError, OSError) as error:  # of an empty file as well, which cannot be mapped
            raise ValueError(f"{file} is no readable GGUF file: {error}") from error
        metadata = values | metadata  # the first file's, which has all of it
        tensors |= found
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError(f"{files[0]} is no readable GGUF file: it does not say its general.architecture")
    return GgufHeader(metadata, tensors)


class _Cursor:
    """Reads a file from its start, and nothing outside of it."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file = file
        self.data = data
        self.at = 0

    def header(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self.take(4) != MAGIC:
            raise ValueError("it does not start with GGUF")
        version, num_tensors, num_values = self.unpack("IQQ")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}; readable are {' and '.join(map(str, VERSIONS))}")
        metadata = {}
        for _ in range(self.count(num_values, 13)):
            key = self.string()
            metadata[key] = self.value(*self.unpack("I"))
        entries = [self.tensor() for _ in range(self.count(num_tensors, 32))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return metadata, {name: self.placed(name, start + at, shape, kind) for name, at, shape, kind in entries}

    def take(self, num_bytes: int) -> bytes:
        if self.at + num_bytes > len(self.data):
            raise ValueError(f"it ends after {len(self.data)} bytes, in the middle of its header")
        self.at += num_bytes
        return self.data[self.at - num_bytes : self.at]

    def unpack(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{codes}", self.take(struct.calcsize(f"<{codes}")))

    def count(self, number: int, least_bytes: int) -> int:
        """A number of things of at least so many bytes, for which the rest of the file must have room."""
        if number * least_bytes > len(self.data) - self.at:
            raise ValueError(f"it says that {number} entries follow, for which it is too short")
        return number

    def string(self) -> str:
        (length,) = self.unpack("Q")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            of, number = self.unpack("IQ")
            if of == STRING:
                return [self.string() for _ in range(self.count(number, 8))]
            if of in NUMBERS:
                return list(self.unpack(f"{self.count(number, struct.calcsize(NUMBERS[of]))}{NUMBERS[of]}"))
            kind = of
        if kind not in NUMBERS:
            raise ValueError(f"it holds metadata of the unknown type {kind}")
        return self.unpack(NUMBERS[kind])[0]

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self.string()
        if not name.isprintable():
            raise ValueError("the name of a tensor is no text")
        (dimensions,) = self.unpack("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = self.unpack(f"{dimensions}Q")[::-1]
        kind, offset = self.unpack("IQ")
        return name, offset, shape, kind

    def placed(self, name: str, start: int, shape: tuple[int, ...], number: int) -> GgufTensor:
        if number not in BLOCKS:
            known = ", ".join(kind for kind, *_ in BLOCKS.values())
            raise ValueError(f"{name} is of ggml's type {number}; readable are {known}")
        kind, weights, block_bytes = BLOCKS[number]
        if shape[-1] % weights:
            raise ValueError(f"{name} has rows of {shape[-1]} weights, no multiple of a block of {kind}")
        num_bytes = math.prod(shape) // weights * block_bytes
        if num_bytes == 0 or start + num_bytes > len(self.data):
            raise ValueError(f"{name} {shape} does not lie inside the file, which has {len(self.data)} bytes: cut off?")
        return GgufTensor(kind, shape, self.file, start, num_bytes)
