"""Several hosts under one model: each shows the others that it is there, and ends when one of them is not.

The processes of a host notice neither that another host has ended nor that it cannot be reached: they wait for what it
sends. So each host counts up a number of its own in the store on host 0, by which the group has found together
(PyTorch's TCPStore at --master-addr and --master-port), and looks at those of the others.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Protocol

import psutil

BEAT_S = 5.0
SILENCE_S = 20.0  # after which a host has ended or cannot be reached
KEY = "ipex_vllm/host/"


class Store(Protocol):
    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first, and return it. Raises where the store cannot be reached."""


class Group:
    """The hosts of a model as one of them sees them, from when the group has been formed.

    Args:
        store: the one on host 0.
        address: of host 0.
        rank: this host's.
        num_hosts: all of them.
    """

    def __init__(self, store: Store, address: str, rank: int, num_hosts: int) -> None:
        self._store = store
        self._address = address
        self._rank = rank
        self._counts = [0] * num_hosts
        self._changed_at = [time.monotonic()] * num_hosts
        self._heard_at = time.monotonic()  # from the store
        threading.Thread(target=self._beat, daemon=True).start()

    def loss(self) -> str | None:
        """Which host has ended or cannot be reached, in a sentence; None while all are there."""
        now = time.monotonic()
        if now - self._heard_at > SILENCE_S:
            return f"host 0, {self._address}, {LOST}"
        for rank, (count, changed_at) in enumerate(zip(self._counts, self._changed_at, strict=True)):
            if count and now - changed_at > SILENCE_S:  # the first time can take as long as compiling does
                return f"host {rank} {LOST}"
        return None

    def _beat(self) -> None:
        while True:
            for rank in range(len(self._counts)):
                try:
                    count = self._store.add(f"{KEY}{rank}", int(rank == self._rank))
                except RuntimeError:  # the connection is closed: host 0 has ended
                    self._heard_at = -SILENCE_S
                    return
                self._heard_at = time.monotonic()
                if count != self._counts[rank]:
                    self._counts[rank], self._changed_at[rank] = count, self._heard_at
            time.sleep(BEAT_S)


LOST = "has ended or cannot be reached; start all of them again"


def join(address: str, port: int, rank: int, num_hosts: int) -> Group:
    """The group that has formed itself at this address."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SILENCE_S))
    return Group(store, address, rank, num_hosts)


def choose_interface(address: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Make what the hosts tell each other go by the way that leads to host 0, where the user has chosen none.

    Otherwise Gloo takes the interface of this host's own name, which is often the loopback, and vLLM the one to the
    Internet, which may be none.
    """
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((address, 9))  # no packet is sent
        except OSError:  # there is no way: what cannot connect will say so
            return
        own = sock.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if own in [entry.address for entry in addresses]:
            environ.setdefault("GLOO_SOCKET_IFNAME", name)
            environ.setdefault("VLLM_HOST_IP", own)
