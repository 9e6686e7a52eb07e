"""A worker for one model, as `python -m ipex_vllm.worker` runs it, and what it answers over HTTP.

The worker's program is forked instead of started, as its engine's process always is, so that what they import is there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.models import questions
from benchmarks.models.architecture import Architecture, Task

FORK = multiprocessing.get_context("fork")
START_TIMEOUT_S = 300
FLAGS = (
    *("--no-register", "--no-preload", "--no-compile", "--kv-cache-gib", "0.0625", "--max-model-len", "128"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "128"),
)


@dataclass(frozen=True)
class Answer:
    """What the worker answers for a model.

    Attributes:
        prompt: the ids of the tokens that the model read, where it wrote some.
        greedy: the ids of those that it wrote.
        values: the log probability of each of these tokens but the first; of each text its vector; scores.
    """

    values: list[Any]
    prompt: list[int] | None = None
    greedy: list[int] | None = None


def ask(
    architecture: Architecture, folder: Path, format_name: str | None, quantized: Path, verbose: bool = False
) -> Answer:
    """Serve a model directory and ask it. Raises RuntimeError with the last line of a worker that does not start.

    The weights of what is quantized are added to the file `quantized`, as float32 [out_features, in_features]. What a
    verbose worker says goes to stderr when it has ended.
    """
    flags = ["--model-path", str(folder), "--dtype", architecture.dtype, *FLAGS, *architecture.flags]
    if format_name is not None:
        flags += ["--low-bit", format_name]
    if verbose:
        flags.append("--verbose")
    with worker(flags, quantized) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        return QUESTIONS[architecture.task](client, architecture)


@contextlib.contextmanager
def worker(flags: list[str], quantized: Path) -> Iterator[str]:
    """The URL of a worker that is ready, and ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, url = quantized.with_suffix(".log"), f"http://127.0.0.1:{port}"
    process = FORK.Process(target=run, args=([*flags, "--host", "127.0.0.1", "--port", str(port)], quantized, log))
    process.start()
    try:
        wait_until_ready(process, url, log)
        yield url
    finally:
        # At once: an engine that ends in good order waits for a second.
        for each in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.join()
        if "--verbose" in flags:
            print(log.read_text(errors="replace"), file=sys.stderr)


def wait_until_ready(process: Any, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", trust_env=False).is_success:
                return
        time.sleep(0.05)
    lines = log.read_text(errors="replace").splitlines()
    raise RuntimeError(lines[-1] if lines else "the worker did not start")


def run(flags: list[str], quantized: Path, log: Path) -> None:
    """Be the worker."""
    from ipex_vllm import worker
    from ipex_vllm.low_bit.kernels import experts
    from ipex_vllm.low_bit.linear import make_linear
    from ipex_vllm.low_bit.vllm import linear

    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    vars(linear)["make_linear"] = noting(make_linear, quantized)
    vars(experts)["pack"] = noting(experts.pack, quantized)
    worker.main(flags)


def noting(function: Callable[..., Any], quantized: Path) -> Callable[..., Any]:
    """`function` of a quantized weight, which is added to a file first."""
    import numpy as np

    from ipex_vllm.low_bit.quantize import dequantize

    def noted(weight: Any, *arguments: Any) -> Any:
        with quantized.open("ab") as file:
            np.save(file, dequantize(weight).float().numpy())
        return function(weight, *arguments)

    return noted


def generate(client: httpx.Client, architecture: Architecture) -> Answer:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": questions.NUM_GREEDY, "ignore_eos": True}
    asked |= {"prompt_logprobs": 0, "return_token_ids": True}
    if architecture.picture is None:
        choice = post(client, "/v1/completions", {**asked, "prompt": questions.token_ids(), "logprobs": 0})["choices"][
            0
        ]
        prompt, of_prompt = choice["prompt_token_ids"], choice["prompt_logprobs"]
        of_greedy = choice["logprobs"]["token_logprobs"]
    else:
        content = [
            {"type": "image_url", "image_url": {"url": questions.picture_url()}},
            {"type": "text", "text": f"{architecture.picture.mark} {questions.text(questions.token_ids())}"},
        ]
        asked |= {"messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": 0}
        answer = post(client, "/v1/chat/completions", asked)
        prompt, of_prompt, choice = answer["prompt_token_ids"], answer["prompt_logprobs"], answer["choices"][0]
        of_greedy = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    of_prompt = [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], of_prompt[1:], strict=True)]
    return Answer([*of_prompt, *of_greedy], prompt, choice["token_ids"])


def embed(client: httpx.Client, architecture: Architecture) -> Answer:
    answer = post(client, "/v1/embeddings", {"model": "tiny", "input": questions.texts()})
    return Answer([item["embedding"] for item in answer["data"]])


def score(client: httpx.Client, architecture: Architecture) -> Answer:
    query, *documents = questions.texts()
    asked = {"model": "tiny", "text_1": query, "text_2": documents, "use_activation": False}
    return Answer([item["score"] for item in post(client, "/score", asked)["data"]])


QUESTIONS: dict[Task, Callable[[httpx.Client, Architecture], Answer]] = {
    "generate": generate,
    "embed": embed,
    "score": score,
}


def post(client: httpx.Client, path: str, asked: dict[str, Any]) -> Any:
    response = client.post(path, json=asked)
    if not response.is_success:
        raise RuntimeError(f"{path}: {response.status_code} {response.text[:300]}")
    return response.json()
