"""Our worker on vLLM. Flags: `--low-bit FORMAT` and whatever else `python -m ipex_vllm.worker --help` lists."""

import sys
from pathlib import Path

from benchmarks.compare.systems.base import Launch, fastchat_worker


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    return fastchat_worker([sys.executable, "-m", "ipex_vllm.worker", *flags], model, port)
