"""Several hosts under one model: a rank ends when the group does. Standard library only."""

from __future__ import annotations

import socket
import threading

INTERVAL_S = 5.0
TIMEOUT_S = 5.0
MAX_FAILURES = 3  # within half a minute, then


def until_gone(address: str, port: int, ended: threading.Event) -> bool:
    """Wait while a server accepts connections there; return whether it has gone, rather than `ended` been set."""
    failures = 0
    while failures < MAX_FAILURES:
        if ended.wait(INTERVAL_S):
            return False
        try:
            socket.create_connection((address, port), TIMEOUT_S).close()
            failures = 0
        except OSError:
            failures += 1
    return True
