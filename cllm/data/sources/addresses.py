"""Which addresses of the network a crawl may reach: public ones, and those that the user has allowed by name.

Pages choose what a crawler connects to, by links, redirects and the records of their own name servers, and a crawler runs inside networks that
trust it. So nothing that a page says is judged here, only the numeric address of each socket at the moment before it connects: `Guard.socket` is
the only place where the crawler makes one. A name that resolves to something else the second time (DNS rebinding), a redirect, a host in decimal,
hexadecimal or octal, and an IPv4 address inside an IPv6 one all come through it in the same form.

`ipaddress.is_global` does not suffice: multicast, NAT64, 6to4, IPv4-compatible addresses and Azure's 168.63.129.16 are global to it, and what it
says changes with the version of Python.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any

from cllm.runtime.errors import UserError
from cllm.runtime.printable import printable

# IANA's registry of special-purpose addresses (RFC 6890), with multicast and the reserved block, and what clouds answer on inside.
_NOT_PUBLIC_4 = tuple(
    (IPv4Network(network), words)
    for network, words in (
        ("0.0.0.0/8", "this machine"),
        ("10.0.0.0/8", "a private network"),
        ("100.64.0.0/10", "the inside of a provider's network"),
        ("127.0.0.0/8", "this machine"),
        ("168.63.129.16/32", "a cloud's own service"),
        ("169.254.0.0/16", "a link-local address, where clouds keep credentials"),
        ("172.16.0.0/12", "a private network"),
        ("192.0.0.0/24", "reserved for protocols"),
        ("192.0.2.0/24", "reserved for documentation"),
        ("192.88.99.0/24", "a relay of 6to4"),
        ("192.168.0.0/16", "a private network"),
        ("198.18.0.0/15", "reserved for benchmarks"),
        ("198.51.100.0/24", "reserved for documentation"),
        ("203.0.113.0/24", "reserved for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")  # all that has been given out as global unicast
_NOT_PUBLIC_6 = tuple(
    (IPv6Network(network), words)
    for network, words in (
        ("2001::/23", "reserved for protocols"),  # Teredo among them
        ("2001:db8::/32", "reserved for documentation"),
        ("2002::/16", "6to4, which leads to an IPv4 address"),
        ("3fff::/20", "reserved for documentation"),
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: how all of IPv4 looks in a network that has only IPv6
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214: the upper half of an interface identifier whose lower half is an IPv4 address
_NEVER = (IPv4Network("0.0.0.0/8"), IPv4Network("224.0.0.0/4"), IPv4Network("255.255.255.255/32"), IPv6Network("::/128"), IPv6Network("ff00::/8"))


class Refused(OSError):
    """A connection that was not made because of its address."""


class Guard:
    """Decides on addresses, and makes the sockets of a crawl.

    allow: addresses that may be reached although they are not public: "127.0.0.1" (every port of it), "127.0.0.1:8000" or "[::1]:8000" (that
    port alone). Each allows itself and no other. Raises UserError for anything else, ranges of addresses and names among it: what a name means
    is decided by others, later.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self._allowed = frozenset(_parsed(one) for one in allow)

    def refusal(self, address: str, port: int) -> str:
        """Why nothing may connect to an address; empty where it may."""
        try:
            real = _plain(address)
        except ValueError:
            return f"{printable(address)} is not an address"
        if (real, None) in self._allowed or (real, port) in self._allowed:
            return ""
        words = _special(real)
        return f"{real} is not a public address ({words})" if words else ""

    def socket(self, info: tuple[Any, ...]) -> socket.socket:
        """An unconnected socket for one entry of `getaddrinfo`, as `aiohttp.TCPConnector(socket_factory=...)` asks for. Raises Refused."""
        family, kind, protocol, _, place = info
        if family not in (socket.AF_INET, socket.AF_INET6):
            raise Refused(errno.EACCES, "only connections over IPv4 and IPv6 are made")
        words = self.refusal(place[0], place[1])
        if words:
            raise Refused(errno.EACCES, words)
        return socket.socket(family, kind, protocol)


def _plain(address: str) -> IPv4Address | IPv6Address:
    """An address without its zone. One of the form ::ffff:a.b.c.d is that IPv4 address: the system connects to it over IPv4."""
    found = ip_address(address.partition("%")[0])
    return found.ipv4_mapped or found if isinstance(found, IPv6Address) else found


def _special(address: IPv4Address | IPv6Address) -> str:
    """What an address that is not public stands for; empty for a public one."""
    if isinstance(address, IPv4Address):
        return next((words for network, words in _NOT_PUBLIC_4 if address in network), "")
    number = int(address)
    inner = IPv4Address(number & 0xFFFFFFFF)
    if address in _NAT64:
        return _special(inner)
    if address not in _PUBLIC_6:
        return "this machine" if address.is_loopback else "a private network" if address.is_private else "not global unicast"
    if (number >> 32) & 0xFFFFFFFF in _ISATAP and _special(inner):
        return f"ISATAP, which leads to {inner}"
    return next((words for network, words in _NOT_PUBLIC_6 if address in network), "")


def _parsed(text: str) -> tuple[IPv4Address | IPv6Address, int | None]:
    """The address and port that a user allows; no port stands for all of them."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::(\d{1,5}))?|([0-9.]+)(?::(\d{1,5}))?|([0-9A-Fa-f:.]+)", text.strip())
    try:
        if not found:
            raise ValueError
        address = _plain(found[1] or found[3] or found[5])
        port = int(found[2] or found[4] or 0) or None
        if (found[2] or found[4]) and not 1 <= (port or 0) <= 65535:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--allow-private must be one address, such as 127.0.0.1, 192.168.1.20:8080 or [::1]:8080, got {printable(text)!r}. Names and ranges are "
            "not taken, because they would allow more than one server. Repeat the option for each address."
        ) from None
    if any(address in network for network in _NEVER if network.version == address.version):
        raise UserError(f"--allow-private {printable(text)} is not the address of one server. Give one such as 127.0.0.1.")
    return address, port
