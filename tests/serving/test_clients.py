"""What clients do to a connection is their own affair: the others are served, nothing hangs, the log stays short."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests import fake_application
from tests.processes import Server, eventually, fake_worker
from tests.support import generate, raw_post, split_frames

NUM_SLOTS = 4
NUM_TEXTS = 100
# Frames of 4 MB, more than the kernel keeps for a client that reads nothing.
LARGE = {"prompt": "p" * 60_000, "echo": True, "n": 64, "max_new_tokens": NUM_TEXTS}
LARGE_STREAM = {"tokens": NUM_TEXTS, "word": "w" * 200_000, "interval_s": 0.01, "stream": True}  # over /v1
CHAT = b'{"prompt": "p", "echo": false, "max_new_tokens": 1}'


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--limit-worker-concurrency", str(NUM_SLOTS), "--client-timeout", "3", "--limit-worker-queue", "4")
    with fake_worker(
        tmp_path_factory.mktemp("clients") / "worker", *flags, FAKE_TEXTS=str(NUM_TEXTS), FAKE_INTERVAL_S="0.01"
    ) as running:
        yield running
        assert running.stop() == 0
        assert "Traceback" not in running.output
        assert "Error" not in running.output


def metric(worker: Server, name: str) -> float:
    text = httpx.get(f"{worker.url}/metrics", trust_env=False).text
    (value,) = re.findall(rf"^ipex_vllm_{name} (\S+)", text, re.MULTILINE)
    return float(value)


def connect(worker: Server) -> socket.socket:
    host, port = worker.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def exchange(worker: Server, sent: bytes) -> bytes:
    """All that is answered until the connection is closed."""
    with connect(worker) as connection:
        connection.sendall(sent)
        return all_of(connection)


def all_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def head(*lines: str, path: str = "/worker_generate") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


@pytest.mark.parametrize(("path", "body"), [("/worker_generate_stream", LARGE), (fake_application.CHAT, LARGE_STREAM)])
def test_clients_that_read_nothing_keep_no_slot_and_are_given_up(worker: Server, path: str, body: object) -> None:
    stalled = metric(worker, "stalled_clients_total")
    assert generate(worker.url, prompt="p", max_new_tokens=1)["error_code"] == 0
    slow = [raw_post(worker.url, path, body) for _ in range(NUM_SLOTS)]
    eventually(lambda: metric(worker, "slots_in_use") == NUM_SLOTS - 2, "two slots are kept, as one small request came")
    assert generate(worker.url, prompt="p", max_new_tokens=1)["error_code"] == 0, "it waited for what is generated"
    eventually(lambda: metric(worker, "slots_in_use") == 0, "all is generated")
    eventually(lambda: metric(worker, "stalled_clients_total") == stalled + NUM_SLOTS, "given up")
    for connection in slow:
        with connection, pytest.raises(ConnectionResetError):
            all_of(connection)


def test_a_client_that_reads_slowly_gets_all_of_it(worker: Server) -> None:
    with raw_post(worker.url, "/worker_generate_stream", LARGE) as connection:
        eventually(lambda: metric(worker, "slots_in_use") == 1, "running")
        eventually(lambda: metric(worker, "slots_in_use") == 0, "all is generated")
        content = all_of(connection)
    assert content.count(f'"completion_tokens":{64 * NUM_TEXTS}'.encode()) == 2


@pytest.mark.parametrize("asked", ["websocket", "h2c", "h2c, websocket", "TLS/1.3"])
def test_an_upgrade_is_passed_over(worker: Server, asked: str) -> None:
    """Clients of HTTP/2 offer it with their first request (Java's); nothing here speaks another protocol."""
    lines = ("Connection: Upgrade, close", f"Upgrade: {asked}", f"Content-Length: {len(CHAT)}")
    key = ("Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "HTTP2-Settings: AAAA")
    answer = exchange(worker, head(*lines, *key) + CHAT)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["text"] == "word "


def test_an_upgrade_that_comes_in_pieces_is_refused(worker: Server) -> None:
    request = head("Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {len(CHAT)}") + CHAT
    middle = request.index(b"grade: h2c")
    with connect(worker) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (request[:middle], request[middle:]):
            connection.sendall(piece)
            time.sleep(0.2)
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"does not upgrade connections.")


BROKEN = {
    "a malformed chunk": head("Transfer-Encoding: chunked") + b"zz\r\n" + CHAT,
    "a chunk that is longer than it says": head("Transfer-Encoding: chunked") + b"2\r\n" + CHAT + b"\r\n0\r\n\r\n",
    "two lengths": head("Content-Length: 5", "Content-Length: 6") + CHAT,
    "a negative length": head("Content-Length: -1") + CHAT,
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "an upgrade in two parts": b"GET /health HTTP/1.1\r\nConnection: upgrade\r\nUp",
    "a tunnel": b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n",
    "no method": b"\r\n\r\n\r\n",
    "half a request": head("Content-Length: 1000") + CHAT,
    "half a head": b"POST /worker_generate HTTP/1.1\r\nHos",
    "nothing": b"",
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
def test_no_connection_hangs_whatever_comes_on_it(worker: Server, sent: bytes) -> None:
    with contextlib.suppress(ConnectionResetError):
        exchange(worker, sent)  # it ends: refused, answered, or given up after --client-timeout
    assert generate(worker.url, prompt="p", max_new_tokens=1)["error_code"] == 0


ABANDONED: list[Callable[[socket.socket], None]] = [
    lambda connection: connection.sendall(head("Content-Length: 1000") + b'{"prompt"'),
    lambda connection: connection.sendall(head("Content-Length: 1000", path="/worker_generate_stream") + b"{"),
    lambda connection: connection.sendall(head("Content-Length: 1000", path="/count_token") + b"{"),
    lambda connection: connection.sendall(head("Content-Length: 1000", path="/worker_get_embeddings") + b"{"),
    lambda connection: connection.sendall(head("Transfer-Encoding: chunked") + b"ff\r\n{"),
    lambda connection: connection.sendall(head(f"Content-Length: {len(CHAT)}") + CHAT),
    lambda connection: connection.sendall(
        head(f"Content-Length: {len(CHAT)}", path="/worker_generate_stream") + CHAT.replace(b"1}", b"1000}")
    ),
    lambda connection: connection.sendall(head()[:20]),
]


def test_a_storm_of_resets_is_no_traceback(worker: Server) -> None:
    lines = worker.output.count("\n")

    def abandon(number: int) -> None:
        connection = connect(worker)
        ABANDONED[number % len(ABANDONED)](connection)
        if number % 3:
            reset(connection)
        else:
            connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(abandon, range(400)))
    eventually(lambda: metric(worker, "slots_in_use") == metric(worker, "queue_length") == 0, "all gone")
    written = worker.output.splitlines()[lines:]
    assert [line for line in written if "INFO ipex_vllm.serving.core: request" not in line] == []
    assert generate(worker.url, prompt="p", max_new_tokens=1)["error_code"] == 0


def test_frames_of_a_stream_after_all_that(worker: Server) -> None:
    content = httpx.post(f"{worker.url}/worker_generate_stream", content=CHAT, trust_env=False).content
    assert split_frames(content)[-1]["text"] == "word "
