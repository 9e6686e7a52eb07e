"""llama.cpp's server, where LLAMA_SERVER names its binary. Flags must name the GGUF file: `-m FILE`."""

import os
from pathlib import Path

from benchmarks.compare.systems.base import HOST, Absent, Launch, openai_server


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    binary = os.environ.get("LLAMA_SERVER")
    if not binary:
        raise Absent("not installed: set LLAMA_SERVER to llama.cpp's llama-server binary")
    return openai_server([binary, "--host", HOST, "--port", str(port), *flags], model.name, port)
