"""Listen at a port, or say in a sentence why that is not possible, before a model is loaded for minutes."""

import errno
import socket


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at a port of a host, 0 for a free one.

    Raises OSError with one sentence if that is not possible, ValueError for a number that is no port.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: a port is a number from 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}. Name another --host.") from error
    try:
        # As servers do: a port whose last connections are still closing is free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        reasons = {errno.EADDRINUSE: "another program uses it", errno.EACCES: "ports below 1024 are for root"}
        reason = reasons.get(error.errno, error.strerror or error)
        raise OSError(f"cannot listen at {host}:{port}: {reason}. Name another --port or --host.") from error
    return listener
