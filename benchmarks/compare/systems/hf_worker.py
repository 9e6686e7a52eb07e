"""The baseline: plain `transformers` generation behind the same server. Flags as for `python -m workers.hf_worker`."""

import sys
from pathlib import Path

from benchmarks.compare.systems.base import Launch, fastchat_worker


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    return fastchat_worker([sys.executable, "-m", "workers.hf_worker", *flags], model, port)
