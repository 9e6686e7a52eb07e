"""Where file descriptors run out, clients are told, and the log stays short."""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from collections import Counter
from pathlib import Path

import pytest

from ipex_vllm.ports import bind
from ipex_vllm.serving.connections import ListeningSocket, raise_descriptor_limit
from tests.processes import ROOT, Program
from tests.support import free_port, split_frames

NUM_CLIENTS = 400
WORKER = "from ipex_vllm import worker\nfrom tests.support import FakeEngine\nworker.main(load=lambda: FakeEngine)\n"


@pytest.fixture
def limits():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_becomes_what_the_slots_need_and_what_cannot_be_is_said(limits, caplog):
    _, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    raise_descriptor_limit(100)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (420, hard)
    assert caplog.text == ""
    raise_descriptor_limit(50)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (420, hard)
    raise_descriptor_limit(hard)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert f"{hard} requests that run or wait need {hard + 320}, and this process may have {hard}" in caplog.text


async def test_what_is_written_to_a_client_is_sent_at_once():
    accepted = asyncio.get_running_loop().create_future()

    async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    port = free_port()
    async with await asyncio.start_server(note, sock=ListeningSocket(bind("127.0.0.1", port))):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await accepted
        writer.close()


async def ask(port: int, opened: asyncio.Barrier) -> str:
    """The outcome of one request, sent when every client has its connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await opened.wait()
    body = b'{"prompt": "hello"}'
    head = (
        f"POST /worker_generate_stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    frames = answer.partition(b"\r\n\r\n")[2]
    if b"transfer-encoding: chunked" in answer:
        return "stop" if b'"finish_reason":"stop"' in frames else "cut off"
    return str(split_frames(frames)[-1]["error_code"])


async def test_more_clients_than_descriptors_get_an_answer_each(tmp_path: Path) -> None:
    port = free_port()
    command = f'ulimit -n 256; exec "$0" -c "$1" --port {port} --no-register --no-preload --kv-cache-gib 0.1'
    with Program(
        tmp_path / "worker",
        "bash",
        "-c",
        command,
        sys.executable,
        WORKER,
        ready_at=f"http://127.0.0.1:{port}/ready",
        PYTHONPATH=str(ROOT),
    ) as running:
        barrier = asyncio.Barrier(NUM_CLIENTS)
        outcomes = Counter(await asyncio.gather(*(ask(port, barrier) for _ in range(NUM_CLIENTS))))
        assert set(outcomes) == {"stop", "42903"}, outcomes
        assert outcomes["stop"] >= 128
        assert "1280 requests that run or wait need 1600, and this process may have 256" in running.output
        assert running.output.count("no connection can be accepted") == 1
        assert "Traceback" not in running.output
