"""Names and addresses of hosts as the settings have them."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import NamedTuple

from salmon_revsmtp.foreign import without_login
from salmon_revsmtp.smtp.addresses import AddressError, to_ascii

__all__ = [
    "ADDRESS",
    "ADDRESSES",
    "HostAndPort",
    "bare_address",
    "domain_name",
    "host_and_port",
    "host_name",
    "listed_addresses",
    "network",
]

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
        raise ValueError(f"that is not a host and a port{_meant(text)}")
    return HostAndPort(found[1] or found[2], int(found[3]))


def _meant(text: str) -> str:
    """What may have been meant by what is no host and port: one of the two is there."""
    if re.fullmatch(r"[0-9]{1,5}", text):
        return f"; did you mean '0.0.0.0:{text}'?"
    if "://" in text:
        return "; write no URL"
    if found := re.fullmatch(r"([0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f]*):([0-9]{1,5})", text):
        return f"; did you mean '[{found[1]}]:{found[2]}'?"
    host = text.strip("[]")
    with contextlib.suppress(ValueError):
        host = f"[{ipaddress.IPv6Address(host)}]"
    if re.fullmatch(r"[\w.-]+|\[[0-9a-f:.]+\]", host):
        return f"; the port is missing: {host}:PORT"
    return ""


def listed_addresses(value: object) -> object:
    """What a key for addresses has, as a list: one alone may stand without one.  Raises
    :class:`ValueError` for a number, which may be a port."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"the host is missing{_meant(str(value))}")
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def domain_name(text: str) -> str:
    """:func:`to_ascii` for what a person has written: the error says what may have been meant."""
    try:
        return to_ascii(text)
    except AddressError:
        meant = re.fullmatch(r"(?:\w+://|.*@|[*]?[.])?([\w.-]+)[/.]*", text.strip())
        if meant is not None and meant[1] != text:
            with contextlib.suppress(AddressError):
                to_ascii(meant[1])
                raise ValueError(
                    f"{without_login(text)!r} is no domain name; did you mean {meant[1]!r}?"
                ) from None
        if len(names := re.split(r"[\s,;]+", text)) > 1 and all("." in one for one in names):
            shown = f"{without_login(text)!r}: write each name by itself"
            raise ValueError(shown if "@" in text else f"{shown}: {names}") from None
        raise


def network(text: str) -> str:
    """A network in CIDR form, or one address.  Raises :class:`ValueError`.

    ``192.168.1.1/24`` names a host and its network, and access control cannot mean both.
    """
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        try:
            both = ipaddress.ip_interface(text)
        except ValueError:
            raise ValueError(f"{without_login(text)!r} is no network") from None
        raise ValueError(
            f"{text!r} is a host and its network; write '{both.network}' for the network, or "
            f"'{both.ip}' for that host alone"
        ) from None


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


def bare_address(host: str) -> str:
    """What to connect to: of an address literal, ``[192.0.2.1]`` or ``[IPv6:2001:db8::1]``, the
    address; a name as it is."""
    if not host.startswith("["):
        return host
    return host[1:-1].partition(":")[2] if host[:6].lower() == "[ipv6:" else host[1:-1]


def _address_literal(text: str) -> str:
    """RFC 5321 4.1.3."""
    found = re.fullmatch(r"\[(IPv6:)?([0-9A-Fa-f:.]+)\]", text, re.IGNORECASE)
    if not found:
        raise ValueError("that is no address in brackets")
    kind = ipaddress.IPv6Address if found[1] else ipaddress.IPv4Address
    return f"[{'IPv6:' if found[1] else ''}{kind(found[2])}]"
