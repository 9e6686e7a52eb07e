"""One model over two hosts that are hosts: what happens when one of them, or the cable between them, fails.

By hand, since it takes minutes: `IPEX_VLLM_TEST_HOSTS=1 pytest tests/e2e/test_hosts.py -s`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.hosts import Host, Relay, two_hosts, why_not
from tests.processes import Program, eventually
from tests.support import generate, split_frames

if "IPEX_VLLM_TEST_HOSTS" not in os.environ:
    pytest.skip("by hand: it takes minutes", allow_module_level=True)
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

PORT = 21002
TOLD_WITHIN_S = 60.0
BACK_WITHIN_S = 240.0
QUESTION = "<|im_start|>user\nWhat is a deque?<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Group:
    hosts: tuple[Host, Host]
    relay: Relay
    services: tuple[Program, Program]

    @property
    def url(self) -> str:
        return f"http://{self.hosts[0].address}:{PORT}"

    def answer(self) -> str:
        """The greedy answer of a client on the first host."""
        asked = {"prompt": QUESTION, "temperature": 0, "max_new_tokens": 32, "echo": False}
        return str(self.hosts[0].do(lambda: generate(self.url, **asked))["text"])

    def begin_a_long_stream(self, pool: ThreadPoolExecutor) -> Future[list[dict[str, Any]]]:
        """Frames of what would take minutes, when a few of them have come."""
        begun: Future[None] = Future()

        def read() -> list[dict[str, Any]]:
            body = {"prompt": "def", "max_new_tokens": 2000, "ignore_eos": True}
            content = b""
            with httpx.stream(
                "POST", f"{self.url}/worker_generate_stream", json=body, timeout=300, trust_env=False
            ) as answer:
                for part in answer.iter_bytes():
                    content += part
                    if content.count(b"\0") > 2 and not begun.done():
                        begun.set_result(None)
            return split_frames(content)

        future = pool.submit(self.hosts[0].do, read)
        begun.result(120)
        return future

    def log_since(self, position: tuple[int, int]) -> list[str]:
        return [service.output[start:] for service, start in zip(self.services, position, strict=True)]

    @property
    def position(self) -> tuple[int, int]:
        first, second = (len(service.output) for service in self.services)
        return first, second

    def is_ready(self) -> bool:
        def ask() -> bool:
            try:
                return httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).is_success
            except httpx.HTTPError:
                return False

        return self.hosts[0].do(ask)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    folder = tmp_path_factory.mktemp("hosts")
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    with two_hosts() as (first, second, relay):
        services = []
        for rank, host in enumerate((first, second)):
            worker = {
                "model-path": "demo",
                "low-bit": "fp32",
                "kv-cache-gib": 0.25,
                "compile": False,
                "tensor-parallel-size": 2,
                "nnodes": 2,
                "node-rank": rank,
                "master-addr": first.address,
                "host": host.address,
                "port": PORT,
                "no-register": True,
                "cores": cores[-rank],
            }
            file = folder / f"{rank}.yaml"
            file.write_text(yaml.safe_dump({"workers": [worker]}))
            command = (*host.command, sys.executable, "-m", "ipex_vllm.up", "--only", "worker", "--config", str(file))
            services.append(Program(Path(folder / str(rank)), *command))
        running = Group((first, second), relay, (services[0], services[1]))
        try:
            services[0].wait_for_output("Ready:")
            yield running
            for service in reversed(services):
                assert service.stop() == 0
        finally:
            for number, service in enumerate(services):
                print(f"host {number}", service.output, sep="\n")
                service.kill()


@pytest.fixture(autouse=True)
def ready(group: Group) -> None:
    eventually(group.is_ready, "the group is ready", BACK_WITHIN_S)


@pytest.fixture(scope="module")
def said(group: Group) -> str:
    return group.answer()


def rank_of(service: Program) -> psutil.Process:
    (found,) = [process for process in service.tree() if "VLLM::Worker" in " ".join(process.cmdline())]
    return found


def comes_to_its_end(
    group: Group, future: Future[list[dict[str, Any]]], said: str, what: str, started_at: float
) -> None:
    """The client is told within a minute, and the group is back by itself."""
    last = future.result(TOLD_WITHIN_S)[-1]
    assert last["error_code"], last
    told_s = time.monotonic() - started_at
    eventually(lambda: not group.is_ready(), "it is not ready any more")
    group.relay.delay_s = 0
    group.hosts[1].set_link(True)
    eventually(group.is_ready, "the group is back", BACK_WITHIN_S)
    assert group.answer() == said
    print(
        f"\n{what}: the client was told after {told_s:.1f} s, the group answered again after "
        f"{time.monotonic() - started_at:.0f} s: {json.dumps(last['text'])}"
    )


def test_every_socket_listens_on_the_hosts_own_address(group: Group, said: str) -> None:
    assert said
    for host in group.hosts:  # on which nobody else runs
        lines = subprocess.run([*host.command, "ss", "-ltnH"], capture_output=True, text=True, check=True).stdout
        addresses = {line.split()[3].rpartition(":")[0] for line in lines.splitlines()}
        print(host.address, sorted(addresses))
        assert addresses
        assert addresses <= {host.address, "127.0.0.1"}


def test_a_slow_cable_makes_it_slow_and_nothing_else(group: Group, said: str) -> None:
    group.relay.delay_s = 0.01
    started_at = time.monotonic()
    assert group.answer() == said
    print(f"\nwith 10 ms more each way: {time.monotonic() - started_at:.1f} s for an answer of 32 tokens")
    group.relay.delay_s = 0


@pytest.mark.parametrize("number", [1, 0])
def test_a_killed_rank_ends_what_runs_and_the_group_comes_back(group: Group, said: str, number: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        stream = group.begin_a_long_stream(pool)
        started_at = time.monotonic()
        rank_of(group.services[number]).kill()
        comes_to_its_end(group, stream, said, f"rank {number} killed", started_at)


def test_a_cut_cable_ends_what_runs_and_the_group_comes_back(group: Group, said: str) -> None:
    position = group.position
    with ThreadPoolExecutor(1) as pool:
        stream = group.begin_a_long_stream(pool)
        started_at = time.monotonic()
        group.hosts[1].set_link(False)
        eventually(
            lambda: all("has ended or cannot be reached" in log for log in group.log_since(position)),
            "both hosts say so",
            TOLD_WITHIN_S,
        )
        comes_to_its_end(group, stream, said, "cable cut", started_at)
