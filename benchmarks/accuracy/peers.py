"""Other engines on the same text, each by its own reading of the same checkpoint, where its environment is there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.accuracy.score import Reference, Score
from benchmarks.accuracy.vllm_logits import score_vllm
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.save import save

OPENVINO_PYTHON = Path(".venv-openvino/bin/python")


def openvino(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """OpenVINO as optimum-intel exports by default: int8, and int4 in groups of 64."""
    if not OPENVINO_PYTHON.exists():
        raise SystemExit(f"error: {OPENVINO_PYTHON} is not there: run `make env-openvino`")
    reference = Reference(folder)
    script = Path(__file__).with_name("openvino_logits.py")
    for weight_format in ("int8", "int4"):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "logits.npy"
            # -P: this folder holds modules whose names are those of libraries.
            arguments = (script, path, weight_format, folder / "windows.npy", out)
            subprocess.run([str(OPENVINO_PYTHON), "-P", *map(str, arguments)], check=True)
            logits, score = np.load(out, mmap_mode="r"), Score()
            for index in range(len(logits)):
                reference.count(score, index, torch.from_numpy(np.array(logits[index])).float())
        yield weight_format, score


def upstream(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """vLLM without this package, on the checkpoints that `save` writes."""
    for name in ("sym_int4", "sym_int8"):
        with tempfile.TemporaryDirectory() as temporary:
            saved = Path(temporary) / "saved"
            save(path, FORMATS[name], saved)
            yield name, score_vllm(folder, {"model": str(saved)}, plugin=False)


PEERS: dict[str, Callable[[str, Path], Iterator[tuple[str, Score]]]] = {"openvino": openvino, "upstream": upstream}


def scores(peer: str, path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """Each of the peer's formats and its score against the reference in `folder`."""
    return PEERS[peer](path, folder)
