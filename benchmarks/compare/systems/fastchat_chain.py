"""FastChat's controller and OpenAI API server in front of our worker: what the chain costs beside the worker alone.

Flags are the worker's. The chain streams no usage, so output tokens are known from the limit that ended the request,
and it passes no `ignore_eos` on: a request that the model ends early counts as incomplete.
"""

import sys
from pathlib import Path

from benchmarks.compare.systems.base import HOST, Command, Launch


def launch(model: Path, port: int, flags: list[str]) -> Launch:
    api, controller, worker = (f"http://{HOST}:{port + offset}" for offset in range(3))

    def listen(module: str, offset: int) -> list[str]:
        return [sys.executable, "-m", module, "--host", HOST, "--port", str(port + offset)]

    worker_options = ["--model-path", str(model), "--controller-address", controller, "--worker-address", worker]
    return Launch(
        [
            Command(listen("fastchat.serve.controller", 1), ("POST", f"{controller}/list_models")),
            Command([*listen("ipex_vllm.worker", 2), *worker_options, *flags], ("POST", f"{worker}/worker_get_status")),
            Command(
                [*listen("ipex_vllm.fastchat_api", 0), "--controller-address", controller],
                ("GET", f"{api}/v1/models"),
            ),
        ],
        api,
        "openai",
        model.name,
    )
