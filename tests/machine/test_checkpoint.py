"""A checkpoint whose files are not all there is told by what is missing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ipex_vllm.machine.checkpoint import check_files, weight_files


def write(path: Path, *names: str, cut: int = 0) -> None:
    """A safetensors file of tensors with four bytes each, without its last `cut` bytes."""
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    ).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4 * len(names))
    path.write_bytes(content[: len(content) - cut])


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_without_an_index_are_counted(tmp_path: Path) -> None:
    for number in (1, 3):
        write(tmp_path / f"model-{number:05d}-of-00003.safetensors", f"layer.{number}")
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00003\.safetensors: there are 2 of 3 shards"):
        check_files(tmp_path)
    write(tmp_path / "model-00002-of-00003.safetensors", "layer.2")
    check_files(tmp_path)


def test_pytorchs_shards_are_counted_as_well(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(ValueError, match=r"lacks pytorch_model-00002-of-00002\.bin"):
        check_files(tmp_path)


def test_what_the_index_names_has_to_be_there(tmp_path: Path) -> None:
    write(tmp_path / "one.safetensors", "a")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(ValueError, match=r"lacks two\.safetensors, which its index names: with it b"):
        check_files(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ValueError, match="lacks tensors that its index names: b"):
        check_files(tmp_path)


@pytest.mark.parametrize("cut", [1, 90])
def test_a_file_that_is_cut_off_is_told(cut: int, tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a", cut=cut)
    with pytest.raises(ValueError, match="is cut off"):
        check_files(tmp_path)


def test_no_weights_at_all_are_told(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").touch()
    with pytest.raises(ValueError, match="holds no weights"):
        check_files(tmp_path)


def test_of_two_layouts_transformers_is_read(tmp_path: Path) -> None:
    write(tmp_path / "consolidated.safetensors", "a")
    assert [file.name for file in weight_files(tmp_path)] == ["consolidated.safetensors"]
    write(tmp_path / "model.safetensors", "a")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]
