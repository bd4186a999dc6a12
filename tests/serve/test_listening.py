"""A port that cannot be listened at is one sentence."""

import socket

import pytest

from llava_lite.serve.listening import listen


def test_a_port_in_use_is_named_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(OSError, match=f"^cannot listen at 127.0.0.1:{port}: another program uses it. "):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


def test_a_host_or_a_port_that_is_none_is_named():
    with pytest.raises(OSError, match=r"^cannot listen at 192\.0\.2\.1:8000: "):
        listen("192.0.2.1", 8000)
    with pytest.raises(ValueError, match="--port 70000: a port is a number from 0 to 65535"):
        listen("127.0.0.1", 70000)
    with pytest.raises(OSError, match=r"^cannot listen at no\.such\.host\.invalid:8000: .*Name another --host\.$"):
        listen("no.such.host.invalid", 8000)
