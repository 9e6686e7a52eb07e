"""The engine in this process, where its scheduler can be watched."""

import argparse
import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from ipex_vllm.demo import MODEL_DIR
from ipex_vllm.engines.generation import Delta, Generation
from ipex_vllm.engines.ipex_llm import IpexLlmEngine
from ipex_vllm.machine.facts import MachineFacts
from ipex_vllm.machine.model import ModelFacts
from ipex_vllm.options import WorkerOptions
from ipex_vllm.plan import cpu


async def start_engine() -> IpexLlmEngine:
    options = WorkerOptions(model_path=str(MODEL_DIR), kv_cache_gib=0.25)
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    IpexLlmEngine.add_arguments(parser)
    args = parser.parse_args([])
    plan = cpu.choose(MachineFacts.probe(), options, ModelFacts.read(options.model_path), IpexLlmEngine.demands(args))
    return await IpexLlmEngine.start(replace(plan, engine_args=args))


async def test_a_closed_stream_aborts_its_request_and_stop_leaves_nothing() -> None:
    engine = await start_engine()
    request = Generation(prompt="import", max_new_tokens=1000, ignore_eos=True)
    streams: list[AsyncGenerator[Delta, None]] = [engine.stream(request, f"request-{i}") for i in range(4)]
    for deltas in streams:
        await anext(deltas)
    scheduler = engine._llm.engine
    assert scheduler.get_num_unfinished_requests() == 4
    await streams[0].aclose()
    waiting = asyncio.create_task(anext(streams[1]))
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    for deltas in streams[2:]:
        await deltas.aclose()
    async with asyncio.timeout(30):
        while scheduler.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
    assert has_model_copy(engine)
    await engine.stop()
    assert not has_model_copy(engine)


def has_model_copy(engine: IpexLlmEngine) -> bool:
    return Path(engine._model_copy.name).exists()
