"""A port to listen on, how one that cannot be had is told, and the URLs that name ports."""

from __future__ import annotations

import errno
import socket

from ipex_vllm.errors import OptionError

BACKLOG = 2048  # connections that wait to be accepted


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the port, which is nobody else's from now on; it listens with `listen`. Raises OptionError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        try:
            return _bound(family, host, port, is_shared=False)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            # A server that ended a moment ago leaves connections behind, which keep the port for a minute from all but
            # those who would share it. Two that share it can both be bound, so this is the second choice.
            return _bound(family, host, port, is_shared=True)
    except (OSError, OverflowError) as error:
        raise _cannot_listen(host, port, error) from error


def listen(sock: socket.socket) -> None:
    """Accept connections. Raises OptionError: another program can have come first where the port was shared."""
    # The connections of this server, once it has ended, must not keep the port from its successor.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _cannot_listen(host, port, error) from error


def check_port(host: str, port: int) -> None:
    """Raise OptionError when nothing could listen there now."""
    bind(host, port).close()


def http_url(host: str, port: int) -> str:
    """The URL of a server on that address; one of IPv6 stands in brackets."""
    return f"http://{_address(host, port)}"


def _bound(family: int, host: str, port: int, is_shared: bool) -> socket.socket:
    # With its protocol, by which asyncio knows connections of which every write is to be sent at once (TCP_NODELAY);
    # else the second part of an answer waits for the first one's acknowledgement, which clients delay by 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(is_shared))
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_listen(host: str, port: int, error: Exception) -> OptionError:
    reason = getattr(error, "strerror", None) or error
    return OptionError(f"cannot listen on {_address(host, port)}: {reason}")


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
