"""How long processes live: they end with the one that started them, and on the signals that ask for it (Linux)."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1  # prctl(2)

_libc = ctypes.CDLL(None)  # loaded here: between a fork and an exec, little is allowed


def die_with_parent(signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process `signal_number` when the thread that started it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, int(signal_number))


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a program to end in good order.

    A Ctrl-C or hang-up that whoever started the program had it ignore (`nohup`, a shell's `&`) stays ignored.
    """
    from_a_terminal = (signal.SIGINT, signal.SIGHUP)
    return (signal.SIGTERM, *(number for number in from_a_terminal if signal.getsignal(number) != signal.SIG_IGN))
