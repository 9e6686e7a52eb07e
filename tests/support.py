"""What the tests share: a fake engine, a real HTTP server around it, and readers of frames."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.engine import Engine
from ipex_vllm.engines.generation import Delta, Generation, TokenLogprob
from ipex_vllm.engines.tokenization import PromptEncoder
from ipex_vllm.serving.conversation import ChatFormat
from ipex_vllm.serving.core import Core
from ipex_vllm.serving.fastchat import FastChatServer
from ipex_vllm.serving.slots import Slots

if TYPE_CHECKING:
    import openai


def free_port() -> int:
    """A port that nobody listens on. Each process of `pytest -n` has a range of its own, below those that the kernel
    gives to connections, so that nobody else is given the port before it is used."""
    first = 20_000 + 5_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.randrange(first, first + 5_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def openai_client(url: str) -> openai.OpenAI:
    """A client of the `/v1` at `url` that tries once; to be closed, or its socket warns in whatever test runs later."""
    import openai  # which the other environments lack

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


class CharacterTokenizer:
    """One token for each character."""

    bos_token = None
    eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class FakeEngine(Engine):
    """Yields `texts`, one token each, every `interval_s` seconds; an exception among them is raised there."""

    name = "fake"

    def __init__(
        self,
        texts: Sequence[str | Exception] = ("Hello", " world"),
        interval_s: float = 0.0,
        context_length: int = 1000,
    ) -> None:
        self.texts = texts
        self.interval_s = interval_s
        self.seen: list[Generation] = []
        self.num_running = 0
        self._context_length = context_length
        self.encoder = PromptEncoder(self.tokenizer, context_length)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None: ...

    @classmethod
    async def start(cls, *_: Any) -> FakeEngine:
        return cls()

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def tokenizer(self) -> Any:
        return CharacterTokenizer()

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        self.seen.append(generation)
        prompt_tokens = len(await self.encoder.encode_for_generation(generation))
        texts = self.texts[: generation.max_new_tokens]
        self.num_running += 1
        try:
            for position, text in enumerate(texts):
                await asyncio.sleep(self.interval_s)
                if isinstance(text, Exception):
                    raise text
                is_last = position == len(texts) - 1
                for index in range(generation.n):
                    yield Delta(
                        text=text,
                        num_tokens=1,
                        prompt_tokens=prompt_tokens,
                        finish_reason=("length" if len(texts) < len(self.texts) else "stop") if is_last else None,
                        logprobs=(TokenLogprob(text, -1.0, {text: -1.0}),) if generation.logprobs is not None else (),
                        index=index,
                    )
        finally:
            self.num_running -= 1

    async def count_tokens(self, prompt: str) -> int:
        return len(await self.encoder.encode(prompt))

    async def wait_dead(self) -> str:
        await asyncio.Event().wait()
        return "never"

    async def stop(self) -> None: ...


def make_server(engine: Engine, limit: int = 4, queue_limit: int = 4, **options: Any) -> FastChatServer:
    core = Core(engine, ("fake-model",), Slots(limit, queue_limit), options.pop("log_prompts", False))
    return FastChatServer(core, ChatFormat({"name": "test"}), **options)


@contextlib.contextmanager
def serving(server: FastChatServer) -> Iterator[str]:
    """Run the server's application under uvicorn on a thread; yield its URL."""
    port = free_port()
    http = uvicorn.Server(
        uvicorn.Config(server.app, host="127.0.0.1", port=port, log_config=None, lifespan="off", ws="none")
    )
    thread = threading.Thread(target=http.run)
    thread.start()
    try:
        while not http.started:
            thread.join(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        http.should_exit = http.force_exit = True
        thread.join()


def split_frames(content: bytes) -> list[dict[str, Any]]:
    """All frames of a finished stream, which must end with a complete one."""
    *frames, rest = content.split(b"\0")
    assert rest == b""
    return [json.loads(frame) for frame in frames if frame]  # an empty one is a sign of life


def stream(url: str, **params: Any) -> list[dict[str, Any]]:
    """The frames of one streamed generation."""
    response = httpx.post(f"{url}/worker_generate_stream", json=params, timeout=120, trust_env=False)
    assert response.status_code == 200
    return split_frames(response.content)


def generate(url: str, **params: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/worker_generate", json=params, timeout=120, trust_env=False)
    assert response.status_code == 200
    payload: dict[str, Any] = response.json()
    return payload


def raw_post(url: str, path: str, body: Any) -> socket.socket:
    """Send a request and return the connection, unread: a client with a small receive buffer that can stop or go."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    fields = f"Host: {host}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    head = f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + content)
    except BaseException:
        connection.close()
        raise
    return connection


def as_transformers_5_writes_it(folder: Path) -> Path:
    """The demo model with the spelling that Transformers 4 does not know."""
    shutil.copytree(MODEL_DIR, folder, dirs_exist_ok=True)
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    tokenizer_config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    tokenizer_config |= {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}
    for name, content in (
        ("chat_template.jinja", tokenizer_config.pop("chat_template")),
        ("config.json", json.dumps(config)),
        ("tokenizer_config.json", json.dumps(tokenizer_config)),
    ):
        (folder / name).write_text(content)
    return folder
