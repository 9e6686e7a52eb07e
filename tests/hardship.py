"""A worker among hostile clients, and what it costs the others and itself. By hand, against a worker that runs:

    python -m tests.hardship --worker http://127.0.0.1:21002 --pid PID --minutes 10 --calm-minutes 2

Fair clients send small requests one after the other, first alone and then, for `--minutes`, beside `--hostile` others:
slow readers, prompts of 15 MiB, clients that vanish, and the bodies of tests/fuzz.py. It prints the time to the first
token that the fair ones saw in both, each process' slope of resident memory over the second half with the slope's
standard error, its file descriptors, and what is left behind: slots, KV cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable

import httpx
import psutil

from tests.fuzz import WORKER_PATHS

MIB = 1 << 20
NUM_FAIR = 4
SAMPLE_INTERVAL_S = 2.0
BODIES = [{"prompt": None}, {"prompt": "p", "n": 65}, {"stop": ["s"] * 1000, "prompt": "p"}, [], {"prompt": "\ud800"}]


async def fair(client: httpx.AsyncClient, first_tokens_s: list[float], errors: list[str]) -> None:
    started_at = time.monotonic()
    body = {"prompt": "def chain(", "max_new_tokens": 16, "temperature": 0, "echo": False}
    has_begun = False
    async with client.stream("POST", "/worker_generate_stream", json=body) as response:
        async for part in response.aiter_bytes():
            frame = json.loads(part.split(b"\0")[0] or b"{}")
            if frame.get("error_code"):
                errors.append(frame["text"])
            elif frame.get("text") and not has_begun:
                has_begun = True
                first_tokens_s.append(time.monotonic() - started_at)


async def slow_reader(client: httpx.AsyncClient) -> None:
    body = {"prompt": "def ", "max_new_tokens": 512, "ignore_eos": True, "logprobs": 5}
    async with client.stream("POST", "/worker_generate_stream", json=body) as response:
        async for _ in response.aiter_raw(1024):
            await asyncio.sleep(1)


async def large_prompt(client: httpx.AsyncClient) -> None:
    path = random.choice(("/worker_generate", "/count_token"))
    await client.post(path, json={"prompt": "large " * (15 * MIB // 6)})


async def vanishing(client: httpx.AsyncClient) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(random.random() * 2):
            await client.post("/worker_generate", json={"prompt": "def ", "max_new_tokens": 512, "ignore_eos": True})


async def wrong(client: httpx.AsyncClient) -> None:
    await client.post(random.choice(WORKER_PATHS), content=json.dumps(random.choice(BODIES)).encode())


HOSTILE: tuple[Callable[[httpx.AsyncClient], Awaitable[None]], ...] = (slow_reader, large_prompt, vanishing, wrong)


async def repeat(work: Callable[[], Awaitable[None]], until: float) -> None:
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            await work()
        await asyncio.sleep(0.01)


async def sample(
    pid: int, until: float, memory: dict[str, list[tuple[float, float]]], files: dict[str, list[int]]
) -> None:
    while time.monotonic() < until:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                name = f"{process.pid} {process.name()}"
                memory[name].append((time.monotonic(), process.memory_info().rss / MIB))
                files[name].append(process.num_fds())
        await asyncio.sleep(SAMPLE_INTERVAL_S)


def slope(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Least squares, MiB an hour, and its standard error."""
    times, sizes = [point[0] / 3600 for point in points], [point[1] for point in points]
    fitted = statistics.linear_regression(times, sizes)
    residuals = sum((y - fitted.slope * x - fitted.intercept) ** 2 for x, y in zip(times, sizes, strict=True))
    spread = sum((x - statistics.mean(times)) ** 2 for x in times)
    return fitted.slope, (residuals / max(len(points) - 2, 1) / spread) ** 0.5


def told(name: str, first_tokens_s: list[float]) -> str:
    p50, p99 = (statistics.quantiles(first_tokens_s, n=100)[i] for i in (49, 98))
    return f"{name}: {len(first_tokens_s)} requests, first token p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms"


async def run(options: argparse.Namespace) -> None:
    calm: list[float] = []
    hard: list[float] = []
    errors: list[str] = []
    memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
    files: dict[str, list[int]] = defaultdict(list)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=options.worker, timeout=600, trust_env=False, limits=limits) as client:
        until = time.monotonic() + 60 * options.calm_minutes
        await asyncio.gather(*(repeat(lambda: fair(client, calm, errors), until) for _ in range(NUM_FAIR)))
        until = time.monotonic() + 60 * options.minutes
        kinds = itertools.islice(itertools.cycle(HOSTILE), options.hostile)
        async with asyncio.TaskGroup() as group:
            group.create_task(sample(options.pid, until, memory, files))
            for _ in range(NUM_FAIR):
                group.create_task(repeat(lambda: fair(client, hard, errors), until))
            for kind in kinds:
                group.create_task(repeat(lambda kind=kind: kind(client), until))  # type: ignore[misc]
        await asyncio.sleep(5)
        metrics = (await client.get("/metrics")).text
    print(told("alone", calm))
    print(told(f"beside {options.hostile} hostile clients", hard))
    print(f"fair requests that were refused or failed: {len(errors)} {sorted(set(errors))[:3]}")
    for name, points in memory.items():
        late = points[len(points) // 2 :]
        if len(late) > 2:
            per_hour, error = slope(late)
            span = f"{min(files[name])} to {max(files[name])} files"
            print(f"{name}: {late[0][1]:.0f} to {late[-1][1]:.0f} MiB, {per_hour:+.0f} +- {error:.0f} MiB/h, {span}")
    for line in re.findall(r"^(?:ipex_vllm_\w+|vllm:kv_cache_usage_perc)(?:{.*})? \S+$", metrics, re.MULTILINE):
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True, help="URL of a worker")
    parser.add_argument("--pid", type=int, required=True, help="its process, whose tree is watched")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--calm-minutes", type=float, default=1.0)
    parser.add_argument("--hostile", type=int, default=40, help="clients; ten times the slots")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
