"""The PROXY protocol: what a load balancer says before anything else about the client behind it.

https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt, called "the specification" here.
Version 1 is a line of text, version 2 a block of octets; which of them it is tells the first octet.
No I/O: octets in, what they say out.  :func:`read_header` looks at all that has come, so however a
header is cut into pieces on its way, what it says is the same.

What is vouched for by the balancer (checksums, certificates, names; "TLVs") is skipped.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import NamedTuple

__all__ = ["ProxyHeader", "ProxyHeaderError", "read_header"]

# Octets of a line of version 1, with its CRLF (the specification, 2.1).
LINE = 107
# Octets of a version 2 header after the first 16.  Addresses take 216 at most; what balancers add
# to them (a certificate's name, an identifier) has room in the rest.  The specification has 65,535.
BLOCK = 4096

_FIRST = b"PROXY "
_NUMBER = r"(0|[1-9][0-9]{0,4})"
_LINE = re.compile(
    rf"PROXY TCP(4|6) ([0-9A-Fa-f.:]+) ([0-9A-Fa-f.:]+) {_NUMBER} {_NUMBER}", re.ASCII
)

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = struct.Struct("!12sBBH")
_VERSION, _LOCAL, _PROXY = 2, 0, 1
# The families (0 is "unspecified") with the octets that their addresses take, and TCP.
_FAMILIES = {0: 0, 1: 12, 2: 36, 3: 216}
_TRANSPORTS = range(3)
_STREAM = 1


class ProxyHeaderError(ValueError):
    """What came is no such header; the text says why, and has nothing in it of what came."""


class ProxyHeader(NamedTuple):
    """What a balancer said.

    ``client``  the address and the port of the client; ``None``: the balancer speaks for itself, or
                for one that has no address, and its own is the client's.
    ``octets``  how many of what came are the header.
    """

    client: tuple[str, int] | None
    octets: int


def read_header(data: bytes) -> ProxyHeader | None:
    """The header that ``data`` begins with; ``None``: it is not whole yet.

    Raises :class:`ProxyHeaderError` where it is none, and no more octets change that.
    """
    if data[:1] == _SIGNATURE[:1]:
        return _version_2(data)
    if not data.startswith(_FIRST[: len(data)]):
        raise ProxyHeaderError("it does not begin with a PROXY header")
    return _version_1(data)


def _version_1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, LINE)
    if end < 0:
        if len(data) >= LINE:
            raise ProxyHeaderError(f"its PROXY line has more than {LINE} octets")
        return None
    line = data[:end].decode("latin-1")
    if line == "PROXY UNKNOWN" or line.startswith("PROXY UNKNOWN "):  # and whatever follows
        return ProxyHeader(None, end + 2)
    found = _LINE.fullmatch(line)
    if found is None:
        raise ProxyHeaderError("its PROXY line is malformed")
    source, _ = (_address(found[1], address) for address in found.group(2, 3))
    port, _ = (_port(text) for text in found.group(4, 5))
    return ProxyHeader((source, port), end + 2)


def _address(version: str, text: str) -> str:
    try:
        kind = ipaddress.IPv4Address if version == "4" else ipaddress.IPv6Address
        return _plain(kind(text))
    except ValueError:
        raise ProxyHeaderError("an address in its PROXY line is malformed") from None


def _port(text: str) -> int:
    if int(text) > 65535:
        raise ProxyHeaderError("a port in its PROXY line is above 65535")
    return int(text)


def _version_2(data: bytes) -> ProxyHeader | None:
    if not data.startswith(_SIGNATURE[: len(data)]):
        raise ProxyHeaderError("it does not begin with a PROXY header")
    if len(data) < _FIXED.size:
        return None
    _, kind, family, size = _FIXED.unpack_from(data)
    command, transport = kind & 15, family & 15
    if kind >> 4 != _VERSION or command not in (_LOCAL, _PROXY):
        raise ProxyHeaderError("its PROXY header is of a version or command that is not known")
    if size > BLOCK:
        raise ProxyHeaderError(f"its PROXY header is longer than {BLOCK} octets")
    whole = _FIXED.size + size
    if command == _LOCAL:  # its addresses are to be skipped, whatever they are
        return ProxyHeader(None, whole) if len(data) >= whole else None
    addresses = _FAMILIES.get(family >> 4)
    if addresses is None or transport not in _TRANSPORTS:
        raise ProxyHeaderError("its PROXY header has a kind of address that is not known")
    if size < addresses:
        raise ProxyHeaderError("its PROXY header is too short for its addresses")
    if len(data) < whole:
        return None
    return ProxyHeader(_source(family >> 4, transport, data[_FIXED.size : whole]), whole)


def _source(family: int, transport: int, block: bytes) -> tuple[str, int] | None:
    if transport != _STREAM:  # a receiver may take those that it does not know for none
        return None
    if family == 1:
        address, _, port = struct.unpack_from("!4s4sH", block)
        return _plain(ipaddress.IPv4Address(address)), port
    if family == 2:
        address, _, port = struct.unpack_from("!16s16sH", block)
        return _plain(ipaddress.IPv6Address(address)), port
    return None


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """An IPv4 address as such, also where it is written as one of IPv6."""
    return str(getattr(address, "ipv4_mapped", None) or address)
