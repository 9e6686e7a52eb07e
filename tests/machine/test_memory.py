import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.memory import forget_pages, give_memory_back


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


def given_back() -> float:
    """The share of small freed blocks that the process no longer holds."""
    blocks = [torch.ones(1 << 14) for _ in range(2000)]
    size = sum(block.nbytes for block in blocks)
    del blocks[:-1]  # the last one keeps the heap from shrinking by itself
    before = resident_bytes("RssAnon")
    give_memory_back()
    return (before - resident_bytes("RssAnon")) / size


@pytest.mark.parametrize("allocator", ["the C library's", "tcmalloc"])
def test_what_was_freed_between_what_is_in_use_is_given_back(allocator: str) -> None:
    tcmalloc = MachineFacts.probe().tcmalloc
    if allocator == "tcmalloc" and tcmalloc is None:
        pytest.skip("tcmalloc is not installed")
    preload = {"LD_PRELOAD": tcmalloc or ""} if allocator == "tcmalloc" else {}
    code = "from tests.machine.test_memory import given_back; print(given_back())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | preload, capture_output=True, check=True)
    assert float(done.stdout) > 0.8
