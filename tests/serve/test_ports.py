"""A port that cannot be listened on is one sentence."""

import socket

import pytest

from llava_lite.serve.ports import check_port


def test_a_port_in_use_is_named_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"^port {port} of 127.0.0.1 is in use; give another with --port.$"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_host_or_a_port_that_is_none_is_named():
    with pytest.raises(OSError, match=r"^cannot listen on port 8000 of 192\.0\.2\.1: "):
        check_port("192.0.2.1", 8000)
    with pytest.raises(ValueError, match="--port 70000: a port is a number from 0 to 65535"):
        check_port("127.0.0.1", 70000)
    with pytest.raises(OSError, match=r"^cannot listen on port 8000 of no\.such\.host\.invalid: "):
        check_port("no.such.host.invalid", 8000)
