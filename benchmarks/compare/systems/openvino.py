"""OpenVINO GenAI's continuous batching, behind a thin OpenAI-like server of ours, in its own environment.

Flags: `--weight-format fp16|int8|int4`. The model is exported by optimum-intel at the first start and kept.
"""

from pathlib import Path

from benchmarks.compare.systems.base import Launch, openai_server, python_of


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    python = python_of(".venv-openvino", "env-openvino")
    server = str(Path(__file__).with_name("openvino_server.py"))
    # -P: the script's own directory has a module named openvino, this one, which would hide the library.
    argv = [python, "-P", server, "--model-path", str(model), "--port", str(port), *flags]
    return openai_server(argv, model.name, port)
