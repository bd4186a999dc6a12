"""Write the name of a host in the one form in which names are compared: of --allow-host, and of addresses."""

import ipaddress
import re

from llava_lite.serve.api.addresses import is_public

WANTED = "expected a full name such as images.example.org, or with its port, images.example.org:8443"
# A name of at most 253 characters; underscores are in use, though no standard has them.
LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
# What resolvers take for an IP address.
NUMERIC = re.compile(r":|(^|\.)([0-9]+|0x[0-9a-f]*)$")


def read_host(text: str) -> str:
    """Return HOST or HOST:PORT of --allow-host in the form in which it is compared; ValueError for anything else."""
    if "://" in text or "/" in text:
        raise ValueError(f"{text!r} is an address, not the name of a host; {WANTED}.")
    if "*" in text:
        raise ValueError(f"{text!r} has a wildcard; each host is listed by its full name; {WANTED}.")
    host, port = split_port(text)
    name = normal_host(host)
    if name is None:
        raise ValueError(f"{text!r} is no name of a host; {WANTED}.")
    try:
        is_reached = is_public(name) if NUMERIC.search(name) else name != "localhost"
    except ValueError:
        raise ValueError(f"{text!r} is no name of a host; {WANTED}.") from None
    if not is_reached:
        raise ValueError(f"{text!r} is no public address, and the server fetches from no other; {WANTED}.")
    return name if port is None else with_port(name, port)


def split_port(text: str) -> tuple[str, int | None]:
    """Return (host, port) of HOST, HOST:PORT, [IPV6] or [IPV6]:PORT; ValueError for a port that is none."""
    found = re.fullmatch(r"(?:\[(.*)\]|([^:]*))(?::([^:]*))?", text)
    # An IPv6 address without brackets has no port.
    if found is None:
        return text, None
    host, port = found[1] or found[2] or "", found[3]
    if port is None:
        return host, None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) < 2**16:
        raise ValueError(f"{text!r}: {port!r} is no port, which is a number from 1 to 65535; {WANTED}.")
    return host, int(port)


def normal_host(name: str) -> str | None:
    """Return the name of a host in lower case, without a dot at its end and beyond ASCII as IDNA; None for none."""
    if ":" in name:
        try:
            return str(ipaddress.IPv6Address(name))
        except ValueError:
            return None
    name = name.removesuffix(".").lower()
    if not name.isascii():
        import idna

        try:
            name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError:
            return None
    labels = name.split(".")
    return name if len(name) <= 253 and all(map(LABEL.fullmatch, labels)) else None


def with_port(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
