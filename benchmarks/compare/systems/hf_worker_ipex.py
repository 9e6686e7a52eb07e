"""The worker on Transformers with Intel's extension for PyTorch, in its own environment."""

from pathlib import Path

from benchmarks.compare.systems.base import Launch, fastchat_worker, python_of


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    python = python_of(".venv-ipex", "env-ipex")
    return fastchat_worker([python, "-m", "workers.hf_worker", "--ipex", *flags], model, port)
