"""Upstream vLLM's own OpenAI server, without our plugin unless VLLM_PLUGINS names it.

`python -m` because the `vllm` command of the CPU wheel dies looking for a distribution of that name.
"""

import sys
from pathlib import Path

from benchmarks.compare.systems.base import HOST, Launch, openai_server


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    options = ["--served-model-name", model.name, "--host", HOST, "--port", str(port)]
    return openai_server([*argv, *options, *flags], model.name, port, {"VLLM_PLUGINS": ""})
