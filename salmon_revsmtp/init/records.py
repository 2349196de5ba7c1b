"""The DNS records that a provider needs, and whether they are there."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from salmon_revsmtp.net.address import host_and_port

if TYPE_CHECKING:
    from dns.resolver import Resolver

__all__ = ["PLACE", "Finding", "Record", "found", "own_addresses", "records"]

# Seconds for one question, over all name servers.
PATIENCE = 5.0

# Addresses that no one has (RFC 5737, RFC 3849): the way to them is the way out.
_OUT = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))

# With this begins what stands for an address that is not known.
PLACE = "<"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Record:
    """``name``, ``kind`` and ``value`` as a zone file has them; ``remark``: who sets it."""

    name: str
    kind: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Finding:
    """Whether a record is so; ``instead``: what was found where it is not."""

    record: Record
    right: bool
    instead: str = ""


def own_addresses() -> tuple[Address, ...]:
    """The public addresses that this machine goes out by; none where it is behind NAT."""
    addresses = []
    for family, nowhere in _OUT:
        with contextlib.suppress(OSError, ValueError):
            with socket.socket(family, socket.SOCK_DGRAM) as way_out:
                way_out.connect((nowhere, 9))  # sends nothing
                address = ipaddress.ip_address(way_out.getsockname()[0])
            if address.is_global:
                addresses.append(address)
    return tuple(addresses)


def records(
    hostname: str, domains: Sequence[str], listen: Sequence[str], own: Sequence[Address] = ()
) -> Iterator[Record]:
    """Those of a provider that takes mail on the addresses ``listen`` (``host:port``), on a machine
    with the public addresses ``own``."""
    host = f"{hostname}."
    for version, kind, kept in ((4, "A", "IPv4"), (6, "AAAA", "IPv6")):
        if version in _versions(listen):
            mine = [str(one) for one in own if one.version == version]
            for address in mine or [f"{PLACE}{kept} address of this machine>"]:
                yield Record(host, kind, address)
    for domain in domains:
        yield Record(f"{domain}.", "MX", f"10 {host}")
    pointers = [f"{one.reverse_pointer}." for one in own if one.version in _versions(listen)]
    for pointer in pointers or [f"{PLACE}that address, reversed>"]:
        yield Record(pointer, "PTR", host, "set by whoever rents you the address")
    yield Record(host, "TXT", '"v=spf1 a -all"')


def _versions(listen: Sequence[str]) -> set[int]:
    versions: set[int] = set()
    for one in listen:
        host = host_and_port(one).host
        if not host:
            return {4, 6}
        try:
            versions.add(ipaddress.ip_address(host).version)
        except ValueError:
            return {4, 6}
    return versions


def found(record: Record, hostname: str, resolver: Resolver | None = None) -> Finding:
    """Ask DNS whether a record is so.  Blocks for seconds where no name server answers."""
    import dns.exception
    import dns.resolver

    try:
        asked = resolver or dns.resolver.get_default_resolver()
        if record.kind == "PTR":
            return _pointer(record, hostname, asked)
        values = _values(record.name, record.kind, asked)
    except (dns.exception.DNSException, OSError) as error:
        return Finding(record, False, f"no answer: {error}")
    if record.kind == "TXT":
        values = [one for one in values if one.strip('"').lower().startswith("v=spf1")]
        # Whoever has one of their own knows better.
        return Finding(record, bool(values), "no SPF record")
    if record.kind == "MX":
        right = any(one.split()[-1].lower() == f"{hostname}." for one in values)
    else:
        right = record.value in values or (record.value.startswith(PLACE) and bool(values))
    return Finding(record, right, ", ".join(values) or "no record")


def _pointer(record: Record, hostname: str, resolver: Resolver) -> Finding:
    """The names of all addresses that the host has in DNS: this machine may not know its own."""
    import dns.reversename

    addresses = [one for kind in ("A", "AAAA") for one in _values(f"{hostname}.", kind, resolver)]
    if not addresses:
        return Finding(record, False, f"{hostname} has no address yet")
    wrong = []
    for address in addresses:
        names = _values(str(dns.reversename.from_address(address)), "PTR", resolver)
        if f"{hostname}." not in [one.lower() for one in names]:
            wrong.append(f"{address} is {', '.join(names) or 'no name'}")
    return Finding(record, not wrong, "; ".join(wrong))


def _values(name: str, kind: str, resolver: Resolver) -> list[str]:
    import dns.resolver

    try:
        answer = resolver.resolve(name, kind, lifetime=PATIENCE)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return []
    return sorted(str(one) for one in answer)
