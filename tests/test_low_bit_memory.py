from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ipex_vllm.low_bit.memory import forget_pages, trim_heap


def resident_bytes(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(kind))


def test_the_memory_of_a_mapped_tensor_is_given_back_and_its_values_are_not_lost(tmp_path: Path) -> None:
    original = torch.arange(1 << 22)
    save_file({"small": original[:3].clone(), "large": original}, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as tensors:
        mapped, small = tensors.get_tensor("large"), tensors.get_tensor("small")
        total = mapped.sum()
        before = resident_bytes("RssFile")
        forget_pages(mapped)
        assert before - resident_bytes("RssFile") > 0.9 * mapped.nbytes
        assert mapped.sum() == total
        forget_pages(small)
        assert small.tolist() == [0, 1, 2]


def test_a_tensor_that_is_not_mapped_from_a_file_is_left_alone() -> None:
    tensor = torch.arange(1 << 20)
    forget_pages(tensor)
    assert torch.equal(tensor, torch.arange(1 << 20))


def test_what_was_freed_between_what_is_in_use_is_given_back() -> None:
    blocks = [torch.ones(1 << 14) for _ in range(2000)]
    size = sum(block.nbytes for block in blocks)
    del blocks[:-1]  # the last one keeps the heap from shrinking by itself
    before = resident_bytes("RssAnon")
    trim_heap()
    assert before - resident_bytes("RssAnon") > 0.8 * size
