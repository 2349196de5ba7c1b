"""A name server on loopback, for what is asked of DNS."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping

import dns.flags
import dns.message
import dns.rcode
import dns.resolver
import dns.rrset

__all__ = ["name_server"]


@contextlib.contextmanager
def name_server(zone: Mapping[tuple[str, str], list[str]]) -> Iterator[dns.resolver.Resolver]:
    """A resolver that asks it.  ``zone``: name with its dot and type, to values."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=_serve, args=(server, zone), daemon=True)
        thread.start()
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = server.getsockname()[1]
        yield resolver
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(60)


def _serve(server: socket.socket, zone: Mapping[tuple[str, str], list[str]]) -> None:
    with contextlib.suppress(OSError):
        while True:
            octets, client = server.recvfrom(4096)
            if not octets:
                return
            query = dns.message.from_wire(octets)
            [question] = query.question
            answer = dns.message.make_response(query)
            answer.flags |= dns.flags.RA
            name, kind = question.name.to_text(), dns.rdatatype.to_text(question.rdtype)
            if values := zone.get((name, kind)):
                answer.answer.append(dns.rrset.from_text_list(name, 60, "IN", kind, values))
            elif not any(one == name for one, _ in zone):
                answer.set_rcode(dns.rcode.NXDOMAIN)
            server.sendto(answer.to_wire(), client)
