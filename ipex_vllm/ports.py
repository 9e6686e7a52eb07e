"""A port to listen on, and how one that cannot be had is told."""

from __future__ import annotations

import socket

from ipex_vllm.errors import OptionError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the port, on which nothing listens yet. Raises OptionError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"cannot listen on {host}:{port}: {reason}") from error
    return sock


def check_port(host: str, port: int) -> None:
    """Raise OptionError when nothing could listen there now."""
    bind(host, port).close()
