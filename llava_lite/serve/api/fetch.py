"""Fetch what an address names, from listed hosts alone, and within one time for all of it.

A server that fetches what strangers name can be made to ask its own network (server-side request forgery). Here a host
must be on a list, every address of it must be public, the connection goes to the address that was checked, and each
redirect is checked again.
"""

import socket
import ssl
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, IncompleteRead
from threading import Thread, Timer
from urllib.parse import urljoin, urlsplit

from llava_lite.media.image import shorten
from llava_lite.serve.api.addresses import is_public
from llava_lite.serve.api.hosts import normal_host, with_port

PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)


class Refused(Exception):
    """An address or an image that is not taken, and why."""


@dataclass(frozen=True)
class Deadline:
    """When a time is over. timeout_s: how long it was; end: on the monotonic clock."""

    timeout_s: float
    end: float

    @classmethod
    def after(cls, timeout_s: float) -> "Deadline":
        """Return a time that begins now."""
        return cls(timeout_s, time.monotonic() + timeout_s)

    @property
    def left_s(self) -> float:
        """Seconds that are left, 0 where there are none."""
        return max(self.end - time.monotonic(), 0.0)

    def check(self, host: str) -> None:
        """Raise Refused where the time is over."""
        if not self.left_s:
            raise Refused(f"{host} did not send the image within {self.timeout_s:g} s.")


def fetch(url: str, hosts: frozenset[str], max_bytes: int, timeout_s: float) -> bytes:
    """Return the bytes at an http or https address; Refused if it is not allowed, fails, or takes too long.

    hosts: those that may be asked, as `read_host` writes them. At most one byte more than max_bytes is read.
    timeout_s: for looking names up, for all redirects and for the bytes together.
    """
    deadline, asked = Deadline.after(timeout_s), url
    for _ in range(MAX_REDIRECTS + 1):
        scheme, host, port, target = check_url(url, hosts)
        address = public_address(host, port, deadline)
        deadline.check(host)
        connection = PinnedConnection(scheme, host, port, address, deadline.left_s)
        # A server that sends a byte at a time keeps each single wait short.
        timer = Timer(deadline.left_s, connection.abort)
        timer.start()
        try:
            data, location = read_response(connection, target, max_bytes)
        except (OSError, HTTPException, ValueError) as error:
            deadline.check(host)
            raise Refused(f"{host} {reason_of(error)}.") from error
        finally:
            timer.cancel()
            connection.close()
        deadline.check(host)
        if location is None:
            return data
        url = urljoin(url, location)
    raise Refused(f"{shorten(asked)!r} is redirected more than {MAX_REDIRECTS} times.")


def read_response(connection, target: str, max_bytes: int) -> tuple[bytes, str | None]:
    """Return (bytes, None) of the response to a request, or (b"", address) where it is a redirect."""
    connection.request("GET", target, headers={"User-Agent": "llava_lite", "Accept": "image/*"})
    response = connection.getresponse()
    if response.status in REDIRECTS:
        location = response.headers.get("Location")
        if not location:
            raise Refused(f"{connection.host} answered with status {response.status}, a redirect without an address.")
        return b"", location
    if response.status != 200:
        raise Refused(f"{connection.host} answered with status {response.status}.")
    data = response.read(max_bytes + 1)
    if response.length and len(data) <= max_bytes:
        raise IncompleteRead(data, response.length)
    return data, None


def reason_of(error: Exception) -> str:
    """Return what went wrong with a connection, as the end of a sentence that begins with the host."""
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"has a certificate that is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return f"could not be asked by https ({error})"
    # BadStatusLine's child RemoteDisconnected is an error of the connection too.
    if isinstance(error, (ConnectionError, IncompleteRead)):
        return "ended the connection before the image was complete"
    if isinstance(error, OSError):
        return f"could not be reached ({error.strerror or error})"
    return f"sent what is no response of HTTP ({type(error).__name__})"


def check_url(url: str, hosts: frozenset[str]) -> tuple[str, str, int, str]:
    """Return (scheme, host, port, target) of an address; Refused if its host is not on the list."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, normal_host(parts.hostname or ""), parts.port
    except ValueError as error:
        raise Refused(f"{shorten(url)!r} is no address ({error}).") from error
    target = (parts.path or "/").replace(" ", "%20") + (f"?{parts.query}" if parts.query else "")
    if scheme not in PORTS or not host or parts.username is not None or not target.isascii() or not url.isprintable():
        raise Refused(f"{shorten(url)!r} is no data URL and no address such as https://host/image.png.")
    port = port or PORTS[scheme]
    names = {with_port(host, port)} | ({host} if port == PORTS[scheme] else set())
    if not names & hosts:
        # Which hosts are listed is the operator's knowledge.
        what = "does not fetch from it" if hosts else "fetches no images"
        raise Refused(f"{with_port(host, port)} is not allowed: this server {what}. Send the image as a data URL.")
    return scheme, host, port, target


def public_address(host: str, port: int, deadline: Deadline) -> str:
    """Return an address of a host; Refused unless all its addresses are public."""
    try:
        found = look_up(host, port, deadline.left_s)
    except NotDone as error:
        raise Refused(f"the addresses of {host} were not found within {deadline.timeout_s:g} s.") from error
    except (OSError, UnicodeError) as error:
        raise Refused(f"{host} has no address ({getattr(error, 'strerror', None) or error}).") from error
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused(f"{host} has an address in a private network, which this server does not ask.")
    return addresses[0]


def look_up(host: str, port: int, timeout_s: float) -> list:
    """Return what getaddrinfo returns; concurrent.futures.TimeoutError where that takes longer."""
    answer = Future()

    def run():
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            answer.set_exception(error)

    # Nothing ends a look-up: its thread goes on for as long as the system's resolver tries, and ends with the process.
    Thread(target=run, name="lookup", daemon=True).start()
    return answer.result(timeout_s)


class PinnedConnection(HTTPConnection):
    """A connection to an address that was checked, under the name of its host."""

    def __init__(self, scheme: str, host: str, port: int, address: str, timeout_s: float):
        super().__init__(host, port, timeout=timeout_s)
        self.scheme, self.address = scheme, address
        # HTTPConnection forgets its socket where a response lasts until the connection is closed.
        self._open: socket.socket | None = None

    def connect(self):
        """Connect to the address; the name is not looked up again."""
        # Known before the handshake, which may take for ever too.
        self.sock = self._open = socket.create_connection((self.address, self.port), self.timeout)
        if self.scheme == "https":
            context = ssl.create_default_context()
            self.sock = self._open = context.wrap_socket(self.sock, server_hostname=self.host)

    def abort(self):
        """End a connection that another thread waits for."""
        # It may have ended meanwhile.
        with suppress(OSError, AttributeError):
            self._open.shutdown(socket.SHUT_RDWR)
