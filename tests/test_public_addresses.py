"""Which addresses are of the public network: by hand, and against a library that has the registries of its own."""

from __future__ import annotations

import ipaddress

import netaddr
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditrelay.server.public_addresses import is_public

DENIED = """
    127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.3.4 172.31.255.255
    192.168.1.1 169.254.169.254 100.64.0.1 100.127.255.255
    100.100.100.200 192.0.0.1 192.0.0.8 192.0.0.192 192.0.2.1 192.88.99.0 192.88.99.255 198.18.0.1 198.19.255.255
    198.51.100.7 203.0.113.7 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 ::127.0.0.1 ::10.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:168.63.129.16 ::ffff:0:127.0.0.1
    64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 64:ff9b:1::808:808 100::1 100:0:0:1::1 2001::1 2001:2::1 2001:10::1
    2001:20::1 2001:db8::1 2001:0:4136:e378:8000:63bf:f5ff:fffe 2002:7f00:1:: 2002:808:808::1 3fff::1 3fff:fff::1
    4000::1
    5f00::1 8000::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 2606:4700::1%eth0 fec0::1 feff::1 ff02::1 ff0e::1
    2606:4700::5efe:7f00:1 2606:4700::200:5efe:a00:1
""".split()
ALLOWED = """
    1.1.1.1 8.8.8.8 93.184.215.14 100.63.255.255 100.128.0.1 168.63.129.15 168.63.129.17 172.15.1.1 172.32.0.1 192.0.1.1
    192.88.98.1 192.88.100.1 198.17.1.1 198.20.1.1 223.255.255.254 ::ffff:1.1.1.1 64:ff9b::808:808 2001:200::1
    2001:4860:4860::8888 2606:4700:4700::1111 2a00:1450:4001:80b::200e 2003::1 3ffe:ffff::1 2606:4700::5efe:808:808
""".split()


@pytest.mark.parametrize("number", [*DENIED, "", "no number", "1.1.1", "127.1", "0x7f.0.0.1", "2130706433", "[::1]"])
def test_what_is_no_public_address_is_denied(number: str) -> None:
    assert not is_public(number)


@pytest.mark.parametrize("number", ALLOWED)
def test_public_addresses_may_be_reached_right_up_to_their_neighbours(number: str) -> None:
    assert is_public(number)


_NARROWER = ("192.0.0.9/32", "192.0.0.10/32", "192.88.99.0/24", "168.63.129.16/32")
REGISTERED = [netaddr.IPNetwork(text) for text in _NARROWER]
"""What we deny though the registry calls it reachable: nobody's pictures are there."""


@settings(max_examples=300, deadline=None)
@given(st.ip_addresses(v=4))
def test_of_ipv4_exactly_what_the_other_library_calls_global_is_public(address: ipaddress.IPv4Address) -> None:
    other = netaddr.IPAddress(str(address))
    expected = other.is_global() and not other.is_multicast() and not any(other in each for each in REGISTERED)
    assert is_public(str(address)) == expected


@settings(max_examples=300, deadline=None)
@given(st.ip_addresses(v=6) | st.integers(0x2000 << 112, (0x4000 << 112) - 1).map(ipaddress.IPv6Address))
def test_of_ipv6_nothing_is_public_that_the_other_library_does_not_call_global(address: ipaddress.IPv6Address) -> None:
    other = netaddr.IPAddress(str(address))
    if is_public(str(address)) and address in ipaddress.IPv6Network("2000::/3"):  # else it holds an IPv4 one
        assert other.is_global() and other.is_unicast() and not other.is_link_local()


@settings(max_examples=300, deadline=None)
@given(st.ip_addresses(v=4))
def test_an_address_that_holds_another_is_no_more_public_than_that(inner: ipaddress.IPv4Address) -> None:
    other, number = netaddr.IPAddress(str(inner)), int(inner)
    reachable = other.is_global() and not other.is_multicast() and not any(other in each for each in REGISTERED)
    mapped = [0xFFFF << 32 | number, 0x64FF9B << 96 | number]
    assert [is_public(str(ipaddress.IPv6Address(each))) for each in mapped] == [reachable] * 2
    elsewhere = [
        number,  # IPv4-compatible
        0xFFFF << 48 | number,  # translated
        0x64FF9B0001 << 80 | number,  # a network's own NAT64
        0x2002 << 112 | number << 80 | 1,  # 6to4
        0x20010000 << 96 | number << 64,  # Teredo's server
        0x20010000 << 96 | (number ^ 0xFFFFFFFF),  # Teredo's client
    ]
    assert not any(is_public(str(ipaddress.IPv6Address(each))) for each in elsewhere)
    isatap = 0x26064700 << 96 | 0x5EFE << 32 | number
    assert is_public(str(ipaddress.IPv6Address(isatap))) == reachable
