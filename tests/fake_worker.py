"""A worker on the fake engine: `python -m tests.fake_worker`, with a worker's own flags. Ready within two seconds.

FAKE_TEXTS is how many texts a request gets, FAKE_INTERVAL_S how long it waits for each, FAKE_START_S how long the
model loads. FAKE_SUSPENDED is an engine that does not let go of a request and stops when its process is killed.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncGenerator
from typing import Any

from ipex_vllm import worker
from ipex_vllm.engines.generation import Delta, Generation
from tests.fake_application import Application
from tests.support import FakeEngine


class SlowEngine(FakeEngine):
    @classmethod
    async def start(cls, *_: Any) -> SlowEngine:
        await asyncio.sleep(float(os.environ.get("FAKE_START_S", 0)))
        texts = ["word "] * int(os.environ.get("FAKE_TEXTS", 2))
        engine_class = SuspendedEngine if "FAKE_SUSPENDED" in os.environ else cls
        return engine_class(texts, float(os.environ.get("FAKE_INTERVAL_S", 0)), context_length=100_000)

    async def openai_application(self) -> Application:
        return Application()


class SuspendedEngine(SlowEngine):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._process = subprocess.Popen(["sleep", "1000"])

    async def stream(self, generation: Generation, request_id: str) -> AsyncGenerator[Delta, None]:
        try:
            async for delta in super().stream(generation, request_id):
                yield delta
        except (GeneratorExit, asyncio.CancelledError):
            await asyncio.Event().wait()

    async def stop(self) -> None:
        await asyncio.to_thread(self._process.wait)


if __name__ == "__main__":
    worker.main(load=lambda: SlowEngine)
