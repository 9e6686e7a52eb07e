"""Processes that end with the one that started them, however that one ends (Linux)."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)

_libc = ctypes.CDLL(None)  # loaded here: between a fork and an exec, little is allowed


def die_with_parent(signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process `signal_number` when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, int(signal_number))
