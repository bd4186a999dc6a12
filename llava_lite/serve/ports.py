"""Say whether a port can be listened on, before a model is loaded for minutes."""

import errno
import socket


def check_port(host: str, port: int) -> None:
    """Raise OSError with one sentence if a server cannot listen on this port of this host; ValueError for no port."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: a port is a number from 0 to 65535.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as server:
            # As servers do: a port whose last connections are still closing is free.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {host} is in use; give another with --port.") from error
        raise OSError(f"cannot listen on port {port} of {host}: {error.strerror or error}.") from error
