"""Other engines on the same text, each by its own reading of the same checkpoint, where its environment is there."""

from __future__ import annotations

import os
import pydoc_data.topics
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from benchmarks import make_gguf
from benchmarks.accuracy.score import TOPICS, WINDOW, Reference, Score
from benchmarks.accuracy.vllm_logits import score_vllm
from benchmarks.compare.systems import ZENTORCH, Absent, of_environment, python_with_zentorch
from ipex_vllm.engines.older_transformers import readable_model
from ipex_vllm.low_bit.formats import FORMATS
from ipex_vllm.low_bit.save import save

LLAMA_CPP = Path(".cache/llama-cpp/bin")


def openvino(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """OpenVINO as optimum-intel exports by default: int8, and int4 in groups of 64 and, like ours, of 32.

    Its own groups of 128 do not divide SmolLM2's rows of 576.
    """
    python, reference = of_environment("openvino")(), Reference(folder)
    script = Path(__file__).with_name("openvino_logits.py")
    for name, weight_format, *group_size in (("int8", "int8"), ("int4", "int4", 64), ("int4-32", "int4", 32)):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "logits.npy"
            # -P: this folder holds modules whose names are those of libraries.
            arguments = (script, path, weight_format, folder / "windows.npy", out, *group_size)
            subprocess.run([python, "-P", *map(str, arguments)], check=True)
            logits, score = np.load(out, mmap_mode="r"), Score()
            for index in range(len(logits)):
                reference.count(score, index, torch.from_numpy(np.array(logits[index])).float())
        yield name, score


def upstream(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """vLLM without this package: in two dtypes, and on the checkpoints that `save` writes."""
    for name in ("bf16", "fp32"):
        yield name, score_vllm(folder, {"model": path, "dtype": FORMATS[name].dtype}, plugin=False)
    for name in ("sym_int4", "sym_int8"):
        with tempfile.TemporaryDirectory() as temporary:
            saved = Path(temporary) / "saved"
            save(path, FORMATS[name], saved)
            yield name, score_vllm(folder, {"model": str(saved)}, plugin=False)


def zentorch(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """vLLM without this package, with AMD's operators, which it takes on AMD's CPUs with AVX-512."""
    python, search = python_with_zentorch(), os.pathsep.join([str(ZENTORCH), os.getcwd()])
    arguments = {"model": path, "dtype": FORMATS["bf16"].dtype}
    yield "bf16", score_vllm(folder, arguments, plugin=False, environ={"PYTHONPATH": search}, python=python)


def ipex_llm(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """ipex-llm 2.2.0's own layers in its own vLLM, in the checkpoint's dtype, as its worker has them."""
    python = of_environment("ipex-llm")()
    # It asks the first pip in PATH which vLLM is installed, and takes the cache's size in whole GiB.
    search = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
    environ = {"PATH": search, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": os.getcwd()}
    for name in ("sym_int4", "asym_int4", "sym_int8"):
        with tempfile.TemporaryDirectory() as temporary:
            arguments = {"model": readable_model(path, Path(temporary)), "load_in_low_bit": name}
            yield name, score_vllm(folder, arguments, plugin=False, environ=environ, python=python)


def llama_cpp(path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """llama.cpp on the same pages, by its own tool: against its own float32 file, in the second halves of windows."""
    if not (LLAMA_CPP / "llama-perplexity").exists():
        raise Absent("llama.cpp is not installed: run `make env-llama-cpp`")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as temporary:
        whole, text, logits = (Path(temporary) / name for name in ("whole.gguf", "text", "logits"))
        make_gguf.write(whole, "llama", model, make_gguf.read_vocabulary(Path(path)), lambda _: Kind.F32)
        text.write_text("\n".join(pydoc_data.topics.topics[topic] for topic in TOPICS))

        def perplexity(file: Path, *options: str) -> str:
            command = (LLAMA_CPP / "llama-perplexity", "-m", file, "--kl-divergence-base", logits, *options)
            done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
            return done.stdout

        perplexity(whole, "-f", str(text), "-c", str(WINDOW))
        for kind in ("Q8_0", "Q4_0", "Q4_K_M"):
            file = Path(temporary) / f"{kind}.gguf"
            subprocess.run([LLAMA_CPP / "llama-quantize", whole, file, kind], check=True, capture_output=True)
            yield kind.lower(), read_perplexity(perplexity(file, "--kl-divergence"))


def read_perplexity(output: str) -> Score:
    """The score whose parts `llama-perplexity --kl-divergence` prints: only means, hence as if of one token."""

    def number(pattern: str) -> float:
        found = re.search(pattern + r"\s*:\s*(-?[0-9.]+)", output)
        if found is None:
            raise SystemExit(f"error: llama-perplexity printed no {pattern!r}")
        return float(found[1])

    agreed = number("Same top p") / 100
    return Score(1, number("Mean +KLD"), agreed, nll=number(r"Mean ln\(PPL\(Q\)/PPL\(base\)\)"))


PEERS: dict[str, Callable[[str, Path], Iterator[tuple[str, Score]]]] = {
    "openvino": openvino,
    "upstream": upstream,
    "zentorch": zentorch,
    "ipex-llm": ipex_llm,
    "llama-cpp": llama_cpp,
}


def scores(peer: str, path: str, folder: Path) -> Iterator[tuple[str, Score]]:
    """Each of the peer's formats and its score against the reference in `folder`."""
    return PEERS[peer](path, folder)
