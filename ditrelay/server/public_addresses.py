"""Which addresses are of the public network: by a table, since Python's own list depends on its version.

Sources: IANA's IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890), and what they lack: RFC 3879
(``fec0::/10``), RFC 4291 (IPv4-compatible addresses), RFC 5214 (ISATAP), RFC 6052 (NAT64), RFC 7526 (6to4), and the
address at which Azure's machines find their host.
"""

from __future__ import annotations

import ipaddress

from ditrelay.server.addresses import address_of

_DENIED_4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # a provider's own
        "127.0.0.0/8",  # this machine
        "168.63.129.16/32",  # Azure: the host of this machine
        "169.254.0.0/16",  # this link, and what clouds tell a machine of itself
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # the nearest 6to4 relay, whosever it is
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # groups
        "240.0.0.0/4",  # nobody's, and everybody's on this network
    )
)
_GLOBAL_6 = ipaddress.IPv6Network("2000::/3")  # all that was ever given away for use in public
_DENIED_6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocols; among them Teredo, which holds an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which holds an IPv4 address
        "3fff::/20",  # documentation
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)  # before an IPv4 address, at the end of one


def is_public(number: str) -> bool:
    """Whether an address is one of the public network: not this machine's, not its network's, nobody's group.

    One that holds an IPv4 address is as public as that, where it may be used at all.
    """
    address = address_of(number)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_4)
    if address is None or address.scope_id is not None:
        return False
    last = str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address in _NAT64:
        return is_public(last)
    if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP and not is_public(last):
        return False
    return address in _GLOBAL_6 and not any(address in network for network in _DENIED_6)
