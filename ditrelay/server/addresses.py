"""Internet addresses, as they are written."""

from __future__ import annotations

import ipaddress


def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that ``text`` is: an IPv4 one also where it is written as IPv6 (``::ffff:127.0.0.1``), as sockets
    for both write it. ``None``: it is none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address
