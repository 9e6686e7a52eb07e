"""A thin OpenAI-like server over OpenVINO GenAI's ContinuousBatchingPipeline: a peer to measure, not to serve with.

It streams `/v1/completions` with the usage in every chunk, and nothing else. It runs in OpenVINO's environment, so it
imports nothing of this project.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openvino_genai
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

CACHE = Path(__file__).parents[2] / ".cache" / "openvino"
FINISH_REASONS = {"STOP": "stop", "LENGTH": "length"}


def export(model: Path, weight_format: str, group_size: int | None) -> Path:
    """Export a Transformers model directory to OpenVINO's format, once."""
    groups = "" if group_size is None else f"-{group_size}"
    target = CACHE / f"{model.name}-{weight_format}{groups}"
    if not (target / "openvino_tokenizer.xml").exists():
        options = ["--task", "text-generation-with-past", "--weight-format", weight_format]
        options += [] if group_size is None else ["--group-size", str(group_size)]
        command = Path(sys.executable).with_name("optimum-cli")
        subprocess.run([command, "export", "openvino", "--model", model, *options, target], check=True)
    return target


class Engine:
    """Steps the pipeline in a thread of its own and hands each request's new tokens to its queue."""

    def __init__(self, model: Path, cache_gib: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gib
        scheduler.enable_prefix_caching = True
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU")
        self.tokenizer = self.pipeline.get_tokenizer()
        self.ids = itertools.count()
        self.running: list[tuple[Any, asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = []
        self.wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: str, max_tokens: int, ignore_eos: bool) -> tuple[Any, asyncio.Queue[Any]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = ignore_eos
        config.do_sample = False
        config.apply_chat_template = False
        queue: asyncio.Queue[Any] = asyncio.Queue()
        with self.wake:
            handle = self.pipeline.add_request(next(self.ids), prompt, config)
            self.running.append((handle, asyncio.get_running_loop(), queue))
            self.wake.notify()
        return handle, queue

    def _run(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.running)
            self.pipeline.step()
            with self.wake:
                for entry in list(self.running):
                    handle, loop, queue = entry
                    while handle.can_read():
                        (output,) = handle.read().values()
                        loop.call_soon_threadsafe(queue.put_nowait, output)
                    if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                        self.running.remove(entry)
                        loop.call_soon_threadsafe(queue.put_nowait, None)


def create_app(engine: Engine, name: str) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(events(body), media_type="text/event-stream")

    async def events(body: dict[str, Any]) -> AsyncIterator[str]:
        prompt_tokens = engine.tokenizer.encode(body["prompt"]).input_ids.shape[1]
        handle, queue = engine.submit(body["prompt"], body["max_tokens"], bool(body.get("ignore_eos")))
        ids: list[int] = []
        sent = ""
        try:
            while (output := await queue.get()) is not None:
                ids += output.generated_ids
                text = engine.tokenizer.decode(ids)
                reason = FINISH_REASONS.get(output.finish_reason.name)
                # Half a character decodes to U+FFFD; it waits for its other half unless the text ends here.
                if reason is None and text.endswith("\N{REPLACEMENT CHARACTER}"):
                    text = sent
                chunk = {
                    "choices": [{"index": 0, "text": text[len(sent) :], "finish_reason": reason}],
                    "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids)},
                }
                sent = text
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            handle.stop()

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True)
    parser.add_argument("--weight-format", default="int8", choices=["fp16", "int8", "int4"])
    parser.add_argument("--group-size", type=int, help="weights that share a scale; default: OpenVINO's own")
    parser.add_argument("--cache-gib", type=int, default=1, help="GiB for the KV cache")
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    engine = Engine(export(args.model_path, args.weight_format, args.group_size), args.cache_gib)
    uvicorn.run(create_app(engine, args.model_path.name), port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
