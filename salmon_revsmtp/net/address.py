"""Names and addresses of hosts as the settings have them."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from salmon_revsmtp.smtp.addresses import to_ascii

__all__ = ["ADDRESS", "ADDRESSES", "HostAndPort", "host_and_port", "host_name"]

#: What is allowed, for a person.
ADDRESS = "'host:port' such as '192.0.2.1:25' or '[::]:25', or None"
ADDRESSES = "'host:port' such as '0.0.0.0:25' or '[::]:25', a list of such, or None"

_HOST_AND_PORT = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]*)):([0-9]{1,5})")


class HostAndPort(NamedTuple):
    """A host, by name or address, and a TCP port; the empty host is every address of ours."""

    host: str
    port: int


def host_and_port(text: str) -> HostAndPort:
    """``host:port``, an IPv6 address in brackets.  Raises :class:`ValueError`."""
    found = _HOST_AND_PORT.fullmatch(text)
    if not found or int(found[3]) > 65535:
        raise ValueError("that is not a host and a port")
    return HostAndPort(found[1] or found[2], int(found[3]))


def host_name(text: str) -> str:
    """A host name, or an address literal, in the form for SMTP.  Raises :class:`ValueError`."""
    if text.startswith("["):
        return _address_literal(text)
    name = to_ascii(text)
    # RFC 5321 4.1.2: unlike other names in DNS, those of hosts have no underscores.
    if "_" in name or re.search(r"(?:^|[.])-|-(?:[.]|$)", name):
        raise ValueError("a host name has letters, digits and hyphens, and dots between them")
    if name.rpartition(".")[2].isdigit():
        raise ValueError("an address stands in brackets")
    return name


def _address_literal(text: str) -> str:
    """RFC 5321 4.1.3."""
    found = re.fullmatch(r"\[(IPv6:)?([0-9A-Fa-f:.]+)\]", text, re.IGNORECASE)
    if not found:
        raise ValueError("that is no address in brackets")
    kind = ipaddress.IPv6Address if found[1] else ipaddress.IPv4Address
    return f"[{'IPv6:' if found[1] else ''}{kind(found[2])}]"
