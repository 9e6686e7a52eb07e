"""ipex-llm's own vLLM engine behind the same server, in its own environment."""

from pathlib import Path

from benchmarks.compare.systems.base import Launch, fastchat_worker, python_of


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    python = python_of(".venv-ipex-llm", "env-ipex-llm")
    return fastchat_worker([python, "-m", "ipex_vllm.worker", "--engine", "ipex-llm", *flags], model, port)
