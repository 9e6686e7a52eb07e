"""The hosts of a model notice each other's end. tests/e2e/test_hosts.py runs them as hosts."""

from __future__ import annotations

import time
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore

from ipex_vllm.engines import group
from ipex_vllm.engines.group import Group
from tests.processes import eventually

SILENCE_S = 1.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "BEAT_S", 0.05)
    monkeypatch.setattr(group, "SILENCE_S", SILENCE_S)


def client(server: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))


class Silent:
    """A store whose host can be cut off: then it neither answers nor fails."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store
        self.is_cut_off = False

    def add(self, key: str, amount: int) -> int:
        while self.is_cut_off:
            time.sleep(0.01)
        return int(self._store.add(key, amount))


@pytest.fixture
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_host_that_falls_silent_is_missed_by_the_others_and_misses_host_0(server: TCPStore) -> None:
    link = Silent(client(server))
    hosts = [Group(client(server), "10.0.0.1", 0, 3), Group(link, "10.0.0.1", 1, 3)]
    time.sleep(2 * SILENCE_S)
    assert [host.loss() for host in hosts] == [None, None], "host 2 is not there yet"
    hosts.append(Group(client(server), "10.0.0.1", 2, 3))
    time.sleep(2 * SILENCE_S)
    assert [host.loss() for host in hosts] == [None] * 3
    link.is_cut_off = True
    eventually(lambda: all(host.loss() for host in hosts), "all miss somebody", 30)
    assert [str(host.loss()).partition(" has ended or cannot be reached")[0] for host in hosts] == [
        "host 1",
        "host 0, 10.0.0.1,",
        "host 1",
    ]
    link.is_cut_off = False  # its thread goes on


def test_a_store_that_is_gone_is_host_0s_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "SILENCE_S", 1000.0)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    host = Group(client(server), "10.0.0.1", 1, 2)
    assert host.loss() is None
    del server
    eventually(lambda: host.loss() is not None, "it is missed", 30)
    assert str(host.loss()).startswith("host 0, 10.0.0.1, has ended")


def test_hosts_talk_over_the_interface_that_leads_to_host_0() -> None:
    (name,) = [name for name, found in psutil.net_if_addrs().items() if "127.0.0.1" in [a.address for a in found]]
    environ: dict[str, str] = {}
    group.choose_interface("127.0.0.2", environ)
    assert environ == {"GLOO_SOCKET_IFNAME": name, "VLLM_HOST_IP": "127.0.0.1"}
    chosen = {"GLOO_SOCKET_IFNAME": "eth7", "VLLM_HOST_IP": "10.0.0.1"}
    group.choose_interface("127.0.0.1", chosen)
    assert chosen == {"GLOO_SOCKET_IFNAME": "eth7", "VLLM_HOST_IP": "10.0.0.1"}, "the user's"
