"""What this machine is called where no one has said."""

from __future__ import annotations

import re
import socket

__all__ = ["machine_name"]

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# A last label of digits only is that of an IPv4 address.
_QUALIFIED = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)+(?![0-9]+\Z){_LABEL}", re.IGNORECASE)

# Names that some systems give a machine without one, and that no one else can look up.
_NOWHERE = (".arpa", ".localdomain")

# Addresses that no one has (RFC 5737, RFC 3849): the way to them is the way out.
_OUT = ((socket.AF_INET, "192.0.2.1", "[{}]"), (socket.AF_INET6, "2001:db8::1", "[IPv6:{}]"))


def machine_name() -> str:
    """The machine's fully qualified name, or an address literal where it has none (RFC 5321
    4.1.1.1).  May ask DNS, and block."""
    name = socket.getfqdn().rstrip(".")
    try:
        name = name.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if _QUALIFIED.fullmatch(name) and not name.lower().endswith(_NOWHERE):
        return name
    return _address_literal()


def _address_literal() -> str:
    for family, nowhere, literal in _OUT:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as way_out:
                way_out.connect((nowhere, 9))  # sends nothing
                return literal.format(way_out.getsockname()[0].partition("%")[0])
        except OSError:
            continue
    return "[127.0.0.1]"
