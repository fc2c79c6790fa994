"""Where outgoing requests may go: the public internet, and what the operator listed. Pure.

Called by `egress`. Invariant: an address that is not surely public is refused unless the operator listed it with
its port; a name that was listed stands for whatever it resolves to.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from millpond.errors import InvalidInput, Permanent

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PORTS = {"https": 443, "http": 80}
_MAX_URL_CHARS = 2048
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?\.?")
# IANA's special-purpose registries, multicast and reserved space; and a cloud's host agent at a public address.
_CLOSED_V4 = [
    ipaddress.IPv4Network(one)
    for one in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]
# Global unicast alone is open. Closed in it: IETF protocols with Teredo, documentation, 6to4. Outside of it, and so
# closed: loopback, mapped IPv4, NAT64, unique local, link local, site local, multicast.
_OPEN_V6 = ipaddress.IPv6Network("2000::/3")
_CLOSED_V6 = [
    ipaddress.IPv6Network(one)
    for one in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where one request goes: an absolute address taken apart. `host` is lower-case, without a last dot."""

    scheme: str
    host: str
    port: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Exemption:
    """What the operator listed: a name or a network, at a port (None: any); `is_plain` lets HTTP pass too."""

    where: str | Network
    port: int | None
    is_plain: bool = False

    def names(self, host: str, port: int) -> bool:
        """Whether a host is listed by its name at this port."""
        return self.where == host and self.port in (None, port)

    def holds(self, address: Address, port: int) -> bool:
        """Whether an address lies in a listed network at this port."""
        if isinstance(self.where, str) or self.port not in (None, port):
            return False
        return address.version == self.where.version and address in self.where


class Rules:
    """Judges where requests may go."""

    def __init__(self, exemptions: Iterable[Exemption] = ()) -> None:
        self._exemptions = list(exemptions)

    @classmethod
    def of_text(cls, text: str) -> Rules:
        """Read `[http://]host-or-network:port,…`, `*` for any port; raises InvalidInput for another form."""
        return cls(_exemption(one.strip()) for one in text.split(",") if one.strip())

    def target(self, url: str) -> Target:
        """Take an address apart; raises Permanent (`egress_refused`) for what no request may go to."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise refused("the address is malformed") from error
        host = (parts.hostname or "").lower().rstrip(".")
        if len(url) > _MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url:
            raise refused("the address is too long, or has characters that do not belong there")
        if parts.scheme not in _PORTS or not host or port == 0:
            raise refused("the address is not one of HTTPS")
        if parts.username is not None or parts.password is not None:
            raise refused("the address holds a user name")
        if literal(host) is None and not _HOST.fullmatch(host):
            raise refused("the address has no proper host")
        target = Target(scheme=parts.scheme, host=host, port=port or _PORTS[parts.scheme])
        if target.scheme != "https" and not self._may_be_plain(target):
            raise refused("only HTTPS is allowed there")
        address = literal(host)
        if address is not None and not self.allows(host, address, target.port):
            raise refused("it is not on the public internet")
        return target

    def allows(self, host: str, address: Address, port: int) -> bool:
        """Whether a connection may be made to an address that a host resolved to."""
        return is_public(address) or any(
            one.names(host, port) or one.holds(address, port) for one in self._exemptions
        )

    def _may_be_plain(self, target: Target) -> bool:
        address = literal(target.host)
        return any(
            one.is_plain
            and (
                one.names(target.host, target.port)
                or (address is not None and one.holds(address, target.port))
            )
            for one in self._exemptions
        )


def is_public(address: Address) -> bool:
    """Whether an address is surely one of the public internet."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in closed for closed in _CLOSED_V4)
    if address.scope_id is not None or address not in _OPEN_V6:
        return False
    return not any(address in closed for closed in _CLOSED_V6)


def literal(host: str) -> Address | None:
    """Return the address that a host is written as, None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def refused(why: str) -> Permanent:
    """Make the refusal of a request: it names no address that a name resolved to."""
    return Permanent(
        f"This request may not be sent: {why}.",
        code="egress_refused",
        advice="the operator of this installation can allow a host and port by MILLPOND_EGRESS_ALLOW",
    )


def _exemption(entry: str) -> Exemption:
    is_plain = entry.startswith("http://")
    text = entry.removeprefix("http://").removeprefix("https://")
    where, _, port = text.rpartition(":")
    where = where.strip("[]") if where.startswith("[") else where
    is_port = port == "*" or (port.isdecimal() and 0 < int(port) < 65_536)
    if not where or not is_port or "/" in port:
        raise _unreadable(entry)
    number = None if port == "*" else int(port)
    try:
        return Exemption(where=ipaddress.ip_network(where), port=number, is_plain=is_plain)
    except ValueError as error:
        if "/" in where or ":" in where or not _HOST.fullmatch(where):
            raise _unreadable(entry) from error
    return Exemption(where=where.lower().rstrip("."), port=number, is_plain=is_plain)


def _unreadable(entry: str) -> InvalidInput:
    return InvalidInput(
        f"{entry!r} is not `[http://]host-or-network:port`", param="MILLPOND_EGRESS_ALLOW"
    )
