"""A rank of another host notices the end of host 0."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ipex_vllm.engines import group


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "INTERVAL_S", 0.05)


def test_it_waits_while_host_0_answers_and_returns_when_it_is_gone() -> None:
    with ThreadPoolExecutor(1) as pool:
        with socket.create_server(("127.0.0.1", 0), backlog=1000) as host:
            gone = pool.submit(group.until_gone, "127.0.0.1", host.getsockname()[1], threading.Event())
            with pytest.raises(TimeoutError):
                gone.result(0.5)
        assert gone.result(30) is True


def test_it_ends_with_its_own_host() -> None:
    ended = threading.Event()
    ended.set()
    assert group.until_gone("127.0.0.1", 1, ended) is False
