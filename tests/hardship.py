"""A service among hostile clients, and what that costs the others and itself. By hand, against one that runs:

    python -m tests.hardship --worker http://127.0.0.1:21002 --api http://127.0.0.1:8000 --pid PID --minutes 10

Fair clients send small requests one after the other, with a pause between, first alone and then, for `--minutes`,
beside `--hostile` others: readers that are slow or never read, prompts of 15 MiB, clients that leave, and requests
that are wrong. Those are in a process of their own, or the fair ones would wait for prompts of 15 MiB to be written,
and one that takes only what the others leave of the machine, where clients are not. Each goes by turns to the worker's
FastChat endpoint, to its /v1, and to FastChat's API server. Printed are the time to the first token that the fair ones
saw, what the worker counted beside what its clients saw, what is left behind (slots, KV cache), and whether memory and
descriptors of each process grow (tests/watch.py).

With few clients that pause it is a soak: `--fair 2 --fair-pause 2 --hostile 5 --pause 2 --minutes 60 --plot soak.png`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx

from tests.fuzz import WORKER_PATHS
from tests.watch import Watch

SAMPLE_INTERVAL_S = 2.0
LEAST_PRIORITY = 19
LARGE_PROMPT = "large " * (15 * (1 << 20) // 6)
WRONG = [{"prompt": None}, {"prompt": "p", "n": 65}, {"stop": ["s"] * 1000, "prompt": "p"}, [], {"prompt": "\ud800"}]
Kind = Callable[["Door"], Awaitable[None]]
HOSTILE_KINDS = ("slow", "large", "leaving", "wrong", "stalled")
REFUSED_STATUSES = {400: 40302, 404: 40301, 429: 42903}


@dataclass
class Door:
    """One of the ways to the model."""

    name: str
    url: str
    path: str

    def body(self, **changed: Any) -> dict[str, Any]:
        body = {"model": "demo", "prompt": "def chain(", "max_tokens": 16, "temperature": 0, "stream": True, **changed}
        if self.path.startswith("/worker"):
            body = {**body, "max_new_tokens": body.pop("max_tokens"), "echo": False}
        return body

    async def events(self, response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        """FastChat's frames, or a stream of events, or an answer that is neither, as objects."""
        separator = b"\0" if self.path.startswith("/worker") else b"\n\n"
        pending = b""
        async for part in response.aiter_bytes():
            *whole, pending = (pending + part).split(separator)
            for event in whole:
                content = event.removeprefix(b"data: ")
                if content.startswith(b"{"):
                    yield json.loads(content)
        if pending:
            yield json.loads(pending)


@dataclass
class Seen:
    """What clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first_tokens_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def read(self, event: dict[str, Any], status: int) -> str | None:
        """The outcome that an event tells, if it is one."""
        if error := event.get("error_code") or event.get("code"):
            return f"error {error}"
        if "error" in event:
            return f"error {REFUSED_STATUSES.get(status, event['error']['message'])}"
        choice = event.get("choices", [event])[-1]
        return "finished" if choice.get("finish_reason") else None


class Clients:
    """The clients of a service, by kinds; each call is one request."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.worker_url = options.worker
        self.doors = [
            Door("FastChat's protocol", options.worker, "/worker_generate_stream"),
            Door("/v1 of the worker", options.worker, "/v1/completions"),
        ]
        if options.api:
            self.doors.append(Door("FastChat's API server", options.api, "/v1/completions"))
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(timeout=600, trust_env=False, limits=limits)
        self.client_timeout_s = options.client_timeout
        self.seen = Seen()
        self.lost = Counter[str]()

    async def repeat(self, kinds: Iterable[Kind], until: float, pause_s: float) -> None:
        """A client of each kind, which asks again and again, by turns at each door."""

        async def client(kind: Kind, doors: Iterator[Door]) -> None:
            while time.monotonic() < until:
                try:
                    await kind(next(doors))
                except (httpx.HTTPError, OSError) as error:
                    self.lost[type(error).__name__] += 1
                await asyncio.sleep(max(0.01, pause_s * random.uniform(0.5, 1.5)))

        async with asyncio.TaskGroup() as group:
            for index, kind in enumerate(kinds):
                first = index % len(self.doors)
                group.create_task(client(kind, itertools.cycle(self.doors[first:] + self.doors[:first])))

    async def fair(self, door: Door) -> None:
        started_at = time.monotonic()
        has_begun, outcome = False, "lost"
        async with self.http.stream("POST", door.url + door.path, json=door.body()) as response:
            async for event in door.events(response):
                outcome = self.seen.read(event, response.status_code) or outcome
                if not has_begun and is_token(event):
                    has_begun = True
                    self.seen.first_tokens_s[door.name].append(time.monotonic() - started_at)
        self.seen.outcomes[outcome] += 1

    async def leaving(self, door: Door) -> None:
        body = door.body(max_tokens=512, ignore_eos=True)
        async with self.http.stream("POST", door.url + door.path, json=body) as response:
            first = await anext(door.events(response))
            if outcome := self.seen.read(first, response.status_code):
                self.seen.outcomes[outcome] += 1
                return
            await asyncio.sleep(2 * random.random())
        self.seen.outcomes["left"] += 1

    async def large(self, door: Door) -> None:
        response = await self.http.post(door.url + door.path, json=door.body(prompt=LARGE_PROMPT))
        content = response.content.strip(b"\0").split(b"\0")[0]  # empty frames are a sign of life
        try:
            outcome = self.seen.read(json.loads(content), response.status_code) or "lost"
        except ValueError:
            outcome = f"not in the protocol's form: {response.status_code} {content[:200]!r}"
        self.seen.outcomes[outcome] += 1

    async def wrong(self, door: Door) -> None:
        path = random.choice(WORKER_PATHS)
        content = json.dumps(random.choice(WRONG)).encode()
        response = await self.http.post(self.worker_url + path, content=content)
        if code := json.loads(response.content.split(b"\0")[0]).get("error_code"):
            self.seen.outcomes[f"error {code}"] += 1

    async def slow(self, door: Door) -> None:
        await self._read_slowly(door, 1.0)

    async def stalled(self, door: Door) -> None:
        await self._read_slowly(door, 2 * self.client_timeout_s)

    async def _read_slowly(self, door: Door, interval_s: float) -> None:
        """Half a minute of a reader that takes 4 KiB now and then, by a connection that holds little."""
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            url = httpx.URL(door.url)
            await loop.sock_connect(connection, (url.host, url.port))
            body = door.body(
                max_tokens=256, temperature=1, ignore_eos=True, logprobs=5, n=1 if "API" in door.name else 8
            )
            content = json.dumps(body).encode()
            head = f"POST {door.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            await loop.sock_sendall(connection, f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            until = time.monotonic() + 30
            taken, outcome = b"", "left"
            try:
                while time.monotonic() < until and (part := await loop.sock_recv(connection, 4096)):
                    taken = (taken + part)[:16384]
                    await asyncio.sleep(interval_s)
            except ConnectionResetError:
                outcome = "given up"
        refused = re.search(rb'HTTP/1.1 (4\d\d)|"error_code": ?([1-9]\d+)', taken)
        self.seen.outcomes[f"error {(refused[1] or refused[2]).decode()}" if refused else outcome] += 1


def is_token(event: dict[str, Any]) -> bool:
    return bool(event.get("choices", [event])[0].get("text")) and not event.get("error_code")


def give_way() -> None:
    """Take only what others leave of the machine.

    Linux shares a CPU between sessions first (sched(7), the autogroup feature), and a session of a single process has
    as much as any other, however low that process' own priority: so the session is a new one, and its priority low too.
    """
    os.nice(LEAST_PRIORITY)
    os.setsid()
    with contextlib.suppress(FileNotFoundError):  # a kernel without it
        Path("/proc/self/autogroup").write_text(str(LEAST_PRIORITY))


def hostile_outcomes(options: argparse.Namespace) -> tuple[Counter[str], Counter[str]]:
    """What the hostile clients saw, and which connections they lost, in as many minutes as `options` has."""

    async def run() -> Clients:
        give_way()
        clients = Clients(options)
        kinds: list[Kind] = [getattr(clients, name) for name in options.kinds]
        until = time.monotonic() + 60 * options.minutes
        await clients.repeat(itertools.islice(itertools.cycle(kinds), options.hostile), until, options.pause)
        return clients

    clients = asyncio.run(run())
    return clients.seen.outcomes, clients.lost


async def sample(watch: Watch, until: float) -> None:
    while time.monotonic() < until:
        watch.look()
        await asyncio.sleep(SAMPLE_INTERVAL_S)


def told(name: str, first_tokens_s: list[float]) -> str:
    if len(first_tokens_s) < 2:
        return f"  {name}: {len(first_tokens_s)} requests"
    p50, p99 = (statistics.quantiles(first_tokens_s, n=100)[i] * 1000 for i in (49, 98))
    return f"  {name}: {len(first_tokens_s)} requests, first token p50 {p50:.0f} ms, p99 {p99:.0f} ms"


async def counted(clients: Clients) -> dict[str, float]:
    """The worker's own counts and gauges."""
    text = (await clients.http.get(f"{clients.worker_url}/metrics")).text
    found = re.findall(r"^(ipex_vllm_\w+|vllm:kv_cache_usage_perc)({.*})? (\S+)$", text, re.MULTILINE)
    return {name + (labels if name.startswith("ipex") else ""): float(value) for name, labels, value in found}


def summed(counts: dict[str, float], name: str) -> float:
    return sum(value for key, value in counts.items() if key.startswith(f"ipex_vllm_{name}"))


async def run(options: argparse.Namespace) -> None:
    clients, watch = Clients(options), Watch(options.pid)
    before = await counted(clients)

    async def phase(minutes: float) -> None:
        until = time.monotonic() + 60 * minutes
        async with asyncio.TaskGroup() as group:
            group.create_task(clients.repeat([clients.fair] * options.fair, until, options.fair_pause))
            group.create_task(sample(watch, until))

    await phase(options.calm_minutes)
    print(f"{options.fair} fair clients alone")
    print(*(told(*item) for item in clients.seen.first_tokens_s.items()), sep="\n")
    clients.seen.first_tokens_s.clear()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        others = asyncio.get_running_loop().run_in_executor(pool, hostile_outcomes, options)
        await phase(options.minutes)
        for mine, theirs in zip((clients.seen.outcomes, clients.lost), await others, strict=True):
            mine.update(theirs)
    print(f"beside {options.hostile} hostile clients, {options.minutes:g} minutes")
    print(*(told(*item) for item in clients.seen.first_tokens_s.items()), sep="\n")
    await asyncio.sleep(2 * clients.client_timeout_s)
    after = await counted(clients)
    change = {name: value - before.get(name, 0) for name, value in after.items()}
    seen = clients.seen.outcomes
    print(f"clients saw {dict(sorted(seen.items()))}, connections lost {dict(clients.lost)}")
    ended = summed(change, "requests_total") + summed(change, "disconnects_total")
    print(f"  ended or left: worker {ended:.0f}, clients {seen['finished'] + seen['left'] + seen['given up']}")
    errors = sum(count for outcome, count in seen.items() if outcome.startswith("error"))
    print(f"  errors: worker {summed(change, 'errors_total'):.0f}, clients {errors}")
    for name, value in sorted(after.items()):
        if "_created" not in name and "bytes" not in name:
            print(f"  {name} {value:g}")
    print(*watch.report(), sep="\n")
    if options.plot:
        watch.plot(options.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True, help="URL of a worker that serves `demo`")
    parser.add_argument("--api", help="URL of FastChat's API server in front of it")
    parser.add_argument("--pid", type=int, required=True, help="the process whose tree is watched")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--calm-minutes", type=float, default=1.0)
    parser.add_argument("--fair", type=int, default=3, help="clients; as many as slots are kept for small requests")
    parser.add_argument("--hostile", type=int, default=40, help="clients; ten times the slots is an overload")
    parser.add_argument("--kinds", nargs="+", choices=HOSTILE_KINDS, default=HOSTILE_KINDS, help="of hostile clients")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between a hostile client's requests")
    parser.add_argument("--fair-pause", type=float, default=0.5, help="the same of a fair client, on average too")
    parser.add_argument("--client-timeout", type=float, default=5.0, help="the worker's, in seconds")
    parser.add_argument("--plot", type=Path, help="write memory and descriptors over time there")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
