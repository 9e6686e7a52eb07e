"""A worker on the fake engine: `python -m tests.fake_worker`, with a worker's own flags. Ready within two seconds.

FAKE_TEXTS is how many texts a request gets, FAKE_INTERVAL_S how long it waits for each, FAKE_START_S how long the
model loads.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ipex_vllm import worker
from tests.support import FakeEngine


class SlowEngine(FakeEngine):
    @classmethod
    async def start(cls, *_: Any) -> SlowEngine:
        await asyncio.sleep(float(os.environ.get("FAKE_START_S", 0)))
        texts = ["word "] * int(os.environ.get("FAKE_TEXTS", 2))
        return cls(texts, float(os.environ.get("FAKE_INTERVAL_S", 0)), context_length=100_000)


if __name__ == "__main__":
    worker.main(load=lambda: SlowEngine)
