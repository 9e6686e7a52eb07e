"""Hosts on this machine that are hosts to each other: network namespaces, and a cable between two of them.

The cable is two pairs of veth with a relay between them, which passes frames on after a while: not every kernel can
delay packets by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

CLONE_NEWNET = 0x40000000  # sched.h
ETH_P_ALL = 3  # linux/if_ether.h
PACKET_OUTGOING = 4  # linux/if_packet.h
SIOCETHTOOL = 0x8946  # linux/sockios.h
# linux/ethtool.h: checksums of what is received and sent, and packets larger than a frame, which a relay cannot pass on
OFFLOADS = (0x15, 0x17, 0x1F, 0x24, 0x2C)
MAX_FRAME = 1 << 16


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why there can be no hosts here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "namespaces take root and iproute2"
    try:
        with two_hosts():
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        return f"namespaces cannot be made: {getattr(error, 'stderr', error)}"


class Host:
    """A network namespace with one interface, `eth`, beside its loopback."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.command = ("nsenter", f"--net=/run/netns/{name}")  # before that of a program that runs there
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        self._pool = ThreadPoolExecutor(8, initializer=self._enter)

    def do(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on this host."""
        return self._pool.submit(work).result()

    def _enter(self) -> None:
        descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)

    def set_link(self, is_up: bool) -> None:
        ip("-n", self.name, "link", "set", "eth", "up" if is_up else "down")

    def remove(self) -> None:
        self._pool.shutdown()
        subprocess.run(["ip", "netns", "del", self.name], check=False)


class Relay:
    """Passes frames between the far ends of two cables, each after `delay_s`."""

    def __init__(self, host: Host, interfaces: tuple[str, str]) -> None:
        self.delay_s = 0.0
        self._is_ended = False
        sockets = [host.do(lambda name=name: open_interface(name)) for name in interfaces]  # type: ignore[misc]
        self._other = {sockets[0]: sockets[1], sockets[1]: sockets[0]}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._is_ended = True
        self._thread.join()
        for sock in self._other:
            sock.close()

    def _run(self) -> None:
        waiting: deque[tuple[float, socket.socket, bytes]] = deque()
        while not self._is_ended:
            until_next = waiting[0][0] - time.monotonic() if waiting else 0.1
            readable, _, _ = select.select(list(self._other), [], [], max(until_next, 0.0))
            for sock in readable:
                frame, address = sock.recvfrom(MAX_FRAME)
                if address[2] != PACKET_OUTGOING:
                    waiting.append((time.monotonic() + self.delay_s, self._other[sock], frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, sock, frame = waiting.popleft()
                with contextlib.suppress(OSError):  # that end is down
                    sock.send(frame)


def open_interface(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.bind((name, 0))
    return sock


def without_offloads(name: str) -> None:
    """Make an interface send frames as they are on a cable, with checksums."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", name.encode(), ctypes.addressof(value)).ljust(40, b"\0")
            with contextlib.suppress(OSError):  # what cannot be switched is not there
                fcntl.ioctl(sock, SIOCETHTOOL, request)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host, Relay]]:
    """Two hosts and the cable between them."""
    with contextlib.ExitStack() as stack:
        prefix = f"test{os.getpid()}"
        hosts = []
        for name, address in (("a", "10.77.0.1"), ("b", "10.77.0.2"), ("r", "")):
            hosts.append(Host(f"{prefix}{name}", address))
            stack.callback(hosts[-1].remove)
        first, second, between = hosts
        for host, end in ((first, "to_a"), (second, "to_b")):
            ip("-n", host.name, "link", "add", "eth", "type", "veth", "peer", "name", end, "netns", between.name)
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth")
            host.do(lambda: without_offloads("eth"))
            host.set_link(True)
            ip("-n", between.name, "link", "set", end, "up")
        relay = Relay(between, ("to_a", "to_b"))
        stack.callback(relay.end)
        yield first, second, relay
