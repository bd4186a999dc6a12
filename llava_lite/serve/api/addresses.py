"""Tell addresses of the public Internet from those of private networks."""

import ipaddress

# Networks that hold IPv4 addresses in their last 32 bits: NAT64, and IPv4-compatible addresses.
EMBEDDING = [ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")]


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
