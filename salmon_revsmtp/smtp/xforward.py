"""XFORWARD: the host that a message came from, told to the next one (Postfix's XFORWARD_README).

A client that is believed says so before MAIL, in one command or several::

    XFORWARD NAME=mail.example.net ADDR=203.0.113.9 PORT=41234 PROTO=ESMTP HELO=mail.example.net

Values are xtext, of 255 octets at most.  One that is not known is ``[UNAVAILABLE]``, and so are all
that are not said.  The host itself is a stranger, and what it called itself is in here: what has no
place in a header or in a log line becomes "?" at both ends, as at Postfix.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from salmon_revsmtp.smtp.envelope import Client
from salmon_revsmtp.smtp.xtext import decode_xtext, encode_xtext

__all__ = ["ATTRIBUTES", "command_lines", "told", "words"]

#: What EHLO lists.
ATTRIBUTES = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT")

UNAVAILABLE = "[UNAVAILABLE]"

# Octets of a value on the wire (XFORWARD_README, note 1), and of a protocol's name.
VALUE, PROTOCOL = 255, 64
# Octets of a command with its CRLF (note 2).
LINE = 512

_COMMAND = "XFORWARD"
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# Something in it is no digit: four numbers are an address.
_HOST_NAME = re.compile(rf"(?=.{{1,255}}\Z)(?=.*[^0-9.]){_LABEL}(?:\.{_LABEL})*")
_PORT = re.compile(r"[0-9]{1,5}")
# What no one can see, what is not ASCII, and what means something in a header.
_SPECIAL = re.compile(r"[^!-~]|[\"()<>;@\\]")


# -- as they are read -----------------------------------------------------------------------------


def told(said: str) -> dict[str, Any]:
    """What the argument of an XFORWARD says, as fields of a :class:`Client`.

    Raises :class:`ValueError` with a text for a reply, in which nothing of ``said`` is.
    """
    fields: dict[str, Any] = {}
    for word in filter(None, said.split(" ")):  # and not at what Unicode calls a space
        key, _, value = word.partition("=")
        key = key.upper()
        if not value:
            raise ValueError("attribute=value is expected")
        if key not in _FIELDS:
            raise ValueError("an attribute that is not known")
        if len(value) > VALUE:
            raise ValueError(f"{key} has more than {VALUE} octets")
        field, nothing, read = _FIELDS[key]
        if "+" in value:
            value = decode_xtext(value)
        try:
            unavailable = value[:1] == "[" and value.upper() == UNAVAILABLE
            fields[field] = nothing if unavailable else read(value)
        except ValueError:
            raise ValueError(f"{key} has a wrong value") from None
    if not fields:
        raise ValueError("attribute=value is expected")
    fields.pop(_SOURCE, None)
    return fields


def _host_name(value: str) -> str:
    if not _HOST_NAME.fullmatch(value):
        raise ValueError
    return value


@functools.lru_cache(maxsize=1024)  # a handful of hosts send most mail
def _address(value: str) -> str:
    """With or without the prefix, as Postfix takes it."""
    prefixed = value[:5].upper() == "IPV6:"
    # A zone means something on that host only, and may be any text.
    address = ipaddress.ip_address(value[5 * prefixed :].partition("%")[0])
    if prefixed and address.version == 4:
        raise ValueError
    return str(getattr(address, "ipv4_mapped", None) or address)


def _port(value: str) -> int:
    if not _PORT.fullmatch(value) or int(value) > 65535:
        raise ValueError
    return int(value)


def _protocol(value: str) -> str:
    if len(value) > PROTOCOL:
        raise ValueError
    return _harmless(value)


def _harmless(value: str) -> str:
    return _SPECIAL.sub("?", value)


def _source(value: str) -> str:
    """It says whether the host before is one of the sender's own.  Nothing here asks."""
    if value.upper() not in ("LOCAL", "REMOTE"):
        raise ValueError
    return value


_SOURCE = "source"
# Attribute -> the client's field, what that is where it is not known, and how it is read.
_FIELDS: Mapping[str, tuple[str, Any, Callable[[str], Any]]] = {
    "NAME": ("name", "", _host_name),
    "ADDR": ("address", "", _address),
    "PORT": ("port", 0, _port),
    "PROTO": ("protocol", "", _protocol),
    "HELO": ("helo", "", _harmless),
    "IDENT": ("ident", "", _harmless),
    "SOURCE": (_SOURCE, "", _source),
}


# -- as they are written --------------------------------------------------------------------------


def command_lines(client: Client, listed: Collection[str]) -> list[bytes]:
    """The commands, without CRLF, that tell a peer of ``client``; as few as their length allows.

    ``listed``  those of :data:`ATTRIBUTES` that the peer lists.
    """
    lines: list[str] = []
    line = _COMMAND
    for word in words(client, listed):
        if len(line) + 1 + len(word) + 2 > LINE:
            lines.append(line)
            line = _COMMAND
        line = f"{line} {word}"
    if line != _COMMAND:
        lines.append(line)
    return [one.encode() for one in lines]


def words(client: Client, listed: Collection[str] = ATTRIBUTES) -> Iterator[str]:
    """``KEY=VALUE`` of each, in ASCII and without a space.  IDENT is there only if it says
    something."""
    for key, value in _values(client):
        if key in listed and (value or key != "IDENT"):
            yield f"{key}={value or UNAVAILABLE}"


def _values(client: Client) -> Iterable[tuple[str, str]]:
    """Values for the wire, empty where they are not known or cannot be said."""
    name = client.name.removesuffix(".")
    return (
        ("NAME", name if _HOST_NAME.fullmatch(name) else ""),
        ("ADDR", _said_address(client.address)),
        ("PORT", str(client.port) if 0 < client.port <= 65535 else ""),
        ("PROTO", _said(client.protocol, PROTOCOL)),
        ("HELO", _said(client.helo)),
        ("IDENT", _said(client.ident)),
    )


@functools.lru_cache(maxsize=1024)
def _said_address(address: str) -> str:
    try:
        found = _address(address)
    except ValueError:
        return ""
    return f"IPv6:{found}" if ":" in found else found


def _said(value: str, most: int = VALUE) -> str:
    """As xtext.  Half a name would be another name, so one that is too long is not known."""
    text = encode_xtext(_harmless(value[: most + 1]))
    return text if len(text) <= most else ""
