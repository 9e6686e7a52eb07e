"""Who gets a port, and how it is written."""

import socket

import pytest

from ipex_vllm.errors import OptionError
from ipex_vllm.ports import bind, http_url, listen
from tests.support import free_port


def test_a_port_that_is_bound_is_taken_before_anyone_listens() -> None:
    port = free_port()
    with bind("127.0.0.1", port) as sock:
        with pytest.raises(OptionError, match=f"127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)
        listen(sock)
        with pytest.raises(OptionError):
            bind("127.0.0.1", port)


def test_a_server_that_has_just_ended_leaves_its_port_to_the_next() -> None:
    port = free_port()
    with bind("127.0.0.1", port) as first:
        listen(first)
        with socket.create_connection(("127.0.0.1", port)) as client:
            connection, _ = first.accept()
            connection.close()  # by the server, whose end of it now lingers
            assert client.recv(1) == b""
    with bind("127.0.0.1", port) as second:
        listen(second)


def test_urls_and_errors_write_an_ipv6_address_in_brackets() -> None:
    assert http_url("::1", 21002) == "http://[::1]:21002"
    assert http_url("localhost", 21002) == "http://localhost:21002"
    with pytest.raises(OptionError, match=r"\[2001:db8::1\]:21002"):
        bind("2001:db8::1", 21002)  # an address of documentation, nobody's own
