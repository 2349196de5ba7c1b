"""What tells one message of a sender from another, for customers that know what they have had.

A sender that hears nothing sends its message again.  Between the two, this process may have died,
and the customer may have handled the first: so the ident of both is to be the same, and nothing but
the message can it be made of.  It is made of what was sent, by whom, and from which network: a
stranger who knows the octets of a message cannot have it taken for one that he has sent before.  It
is not made of the recipients, for a sender that has heard of some of them comes again for the
others (PRDR), and the customer knows each recipient by itself.

But some senders send the same octets twice and mean two messages.  These have heard the answer to
the first: a command of theirs came after it.  So an ident has a number beside the digest: the least
that, of none of the recipients, anyone has heard the answer to, and that is not under way at the
same time.  What is under way for a client that is gone is in no one's way: that client comes again.
What was refused as a whole and comes again is another message, too, for the customer may say
something else now.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["Ident", "Idents"]

# Messages of which numbers are remembered, a recipient each; of one that is forgotten they begin
# anew.
REMEMBERED = 10_000


class Ident(NamedTuple):
    """The ident of a message: ``str`` of it has 64 hexadecimal digits, a dot, and a number."""

    digest: bytes
    number: int
    recipients: frozenset[str]

    def __str__(self) -> str:
        return f"{self.digest.hex()}.{self.number}"


@dataclass
class _Numbers:
    """Those of one digest and recipient: taken are all below ``next``, and ``taken``."""

    next: int = 0
    taken: set[int] = field(default_factory=set)
    under_way: set[int] = field(default_factory=set)

    def take(self, number: int) -> None:
        if number >= self.next:
            self.taken.add(number)
        while self.next in self.taken:
            self.taken.remove(self.next)
            self.next += 1

    def free(self, number: int) -> bool:
        return number >= self.next and number not in self.taken and number not in self.under_way


class Idents:
    """Gives messages their idents.  Safe to use from several threads."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[tuple[bytes, str], _Numbers] = OrderedDict()
        self._lock = threading.Lock()

    def give(self, envelope: Envelope, content: bytes) -> Ident:
        """The ident of a message; ``content`` is the SHA-256 of its octets as they came."""
        sender = envelope.reverse_path.encode("utf-8", "surrogateescape")
        network = _network(envelope.client.address) if envelope.client is not None else ""
        whole = b"\0".join((content, sender, network.encode()))
        digest, recipients = hashlib.sha256(whole).digest(), frozenset(envelope.recipients)
        with self._lock:
            of_each = [self._of(digest, one) for one in recipients]
            number = 0
            for one in of_each:
                number = max(number, one.next)
            while not all(one.free(number) for one in of_each):
                number += 1
            for one in of_each:
                one.under_way.add(number)
            while len(self._numbers) > REMEMBERED:
                self._numbers.popitem(last=False)
        return Ident(digest, number, recipients)

    def _of(self, digest: bytes, recipient: str) -> _Numbers:
        key = digest, recipient
        numbers = self._numbers.get(key)
        if numbers is None:
            numbers = self._numbers[key] = _Numbers()
        else:
            self._numbers.move_to_end(key)
        return numbers

    def refused(self, ident: Ident) -> None:
        """It has been refused for good, for all of its recipients."""
        with self._lock:
            for recipient in ident.recipients:
                if (numbers := self._numbers.get((ident.digest, recipient))) is not None:
                    numbers.take(ident.number)

    def settle(self, ident: Ident, heard: Collection[str]) -> None:
        """Its sender is gone, or has gone on after the answer, and so has heard what became of it
        for ``heard``.  Once."""
        with self._lock:
            for recipient in ident.recipients:
                key = ident.digest, recipient
                if (numbers := self._numbers.get(key)) is None:
                    continue
                numbers.under_way.discard(ident.number)
                if recipient in heard:
                    numbers.take(ident.number)
                elif not (numbers.next or numbers.taken or numbers.under_way):
                    del self._numbers[key]


@functools.lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """A sender may come again from another address of its site: a /24, or an IPv6 /48."""
    try:
        length = 24 if ipaddress.ip_address(address).version == 4 else 48
        return str(ipaddress.ip_network((address, length), strict=False))
    except ValueError:  # there is none
        return address
