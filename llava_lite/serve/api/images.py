"""Turn the address of an image in a request into an image, within limits; only listed hosts are asked.

A server that fetches what strangers name can be made to ask its own network (server-side request forgery). Here a host
must be on a list, every address of it must be public, the connection goes to the address that was checked, and each
redirect is checked again.
"""

import base64
import binascii
import io
import ipaddress
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from threading import Timer
from urllib.parse import urljoin, urlsplit

from PIL import Image

from llava_lite.media.image import IMAGE_FORMATS, ImageError, shorten, upright_image
from llava_lite.serve.api.chat_request import ImageURL
from llava_lite.serve.api.errors import RequestError

PORTS = {"http": 80, "https": 443}
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
# Networks that hold IPv4 addresses in their last 32 bits: NAT64, and IPv4-compatible addresses.
EMBEDDING = [ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")]


@dataclass(frozen=True)
class ImageLimits:
    """What a request may show. hosts: those from which images are fetched; timeout_s: of one image."""

    max_images: int = 8
    max_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    hosts: frozenset[str] = frozenset()
    timeout_s: float = 10.0


def read_image(image: ImageURL, limits: ImageLimits) -> Image.Image:
    """Return an image upright and as RGB; RequestError if it is not allowed, too large or broken."""
    try:
        data = decode(image.url, limits) if image.url.startswith("data:") else fetch(image.url, limits)
        check_size(data, limits)
        return upright_image(data)
    except (ImageError, Refused) as error:
        reason = error.reason if isinstance(error, ImageError) else str(error)
        message = f"{image.place}: cannot use the image: {reason}"
        raise RequestError(message, param=image.place, code="invalid_image") from error


class Refused(Exception):
    """An address or an image that is not taken, and why."""


def decode(url: str, limits: ImageLimits) -> bytes:
    """Return the bytes of a data URL."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Refused(f"the data URL begins with {head[:40]!r}; expected data:image/png;base64,...")
    # Before decoding: 4 letters are 3 bytes.
    check_bytes(len(data) * 3 // 4 - 2, limits)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"it is not base64 ({error}).") from error


def check_bytes(size: int, limits: ImageLimits) -> None:
    """Raise Refused for an image of too many bytes."""
    if size > limits.max_bytes:
        raise Refused(f"it has more than {limits.max_bytes:,} bytes. Make it smaller.")


def check_size(data: bytes, limits: ImageLimits) -> None:
    """Raise Refused for too many bytes or pixels; the size is read from the header, before pixels are decoded."""
    check_bytes(len(data), limits)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
    # Pillow raises nearly every kind of error for a broken file.
    except Exception as error:
        raise Refused(f"it is no image that can be read ({type(error).__name__}).") from error
    if width * height > limits.max_pixels:
        raise Refused(f"it has {width} x {height} pixels, more than {limits.max_pixels:,}. Make it smaller.")


def fetch(url: str, limits: ImageLimits) -> bytes:
    """Return the bytes at an http or https address of a listed host; Refused for any other, and for what fails."""
    for _ in range(MAX_REDIRECTS + 1):
        scheme, host, port, target = check_url(url, limits)
        address = public_address(host, port)
        connection = PinnedConnection(scheme, host, port, address, limits.timeout_s)
        # Of the whole image: a server that sends a byte at a time keeps each single wait short.
        timer = Timer(limits.timeout_s, connection.abort)
        timer.start()
        try:
            connection.request("GET", target, headers={"User-Agent": "llava_lite", "Accept": "image/*"})
            response = connection.getresponse()
            if response.status in REDIRECTS:
                url = urljoin(url, response.headers.get("Location", ""))
                continue
            if response.status != 200:
                raise Refused(f"{host} answered with status {response.status}.")
            data = response.read(limits.max_bytes + 1)
            if response.length and len(data) <= limits.max_bytes:
                raise Refused(f"{host} sent {len(data):,} bytes and then nothing for too long.")
            return data
        except (OSError, HTTPException, ValueError) as error:
            raise Refused(
                f"{host} could not be read within {limits.timeout_s:g} s ({type(error).__name__})."
            ) from error
        finally:
            timer.cancel()
            connection.close()
    raise Refused(f"{shorten(url)!r} is redirected more than {MAX_REDIRECTS} times.")


def check_url(url: str, limits: ImageLimits) -> tuple[str, str, int, str]:
    """Return (scheme, host, port, target) of an address; Refused if its host is not on the list."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise Refused(f"{shorten(url)!r} is no address ({error}).") from error
    if scheme not in PORTS or not host or parts.username is not None or not url.isascii() or not url.isprintable():
        raise Refused(f"{shorten(url)!r} is no data URL and no address such as https://host/image.png.")
    port = port or PORTS[scheme]
    names = {f"{host}:{port}"} | ({host} if port == PORTS[scheme] else set())
    if not names & limits.hosts:
        known = f"fetches from {', '.join(sorted(limits.hosts))} alone" if limits.hosts else "fetches no images"
        raise Refused(f"{host}:{port} is not allowed: this server {known}. Send the image as a data URL.")
    return scheme, host, port, (parts.path or "/").replace(" ", "%20") + (f"?{parts.query}" if parts.query else "")


def public_address(host: str, port: int) -> str:
    """Return an address of a host; Refused unless all its addresses are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Refused(f"{host} has no address ({error}).") from error
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused(f"{host} has an address in a private network, which this server does not ask.")
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an address is of the public Internet, and so is each IPv4 address within it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = []
    if ip.version == 6:
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(ip in network for network in EMBEDDING):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    inner = [one for one in inner if one is not None]
    if any(not one.is_global or one.is_multicast for one in inner):
        return False
    return bool(inner) or (ip.is_global and not ip.is_multicast)


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
