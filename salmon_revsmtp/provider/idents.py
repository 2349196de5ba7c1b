"""What tells one message of a sender from another, for customers that know what they have had.

A sender that hears nothing sends its message again.  Between the two, this process may have died,
and the customer may have handled the first: so the ident of both is to be the same, and nothing but
the message can it be made of.  But some senders send the same octets twice and mean two messages.
These have heard the answer to the first: a command of theirs came after it.  So an ident has a
number beside the digest of what was sent, by whom, and to whom: the least that no one has heard the
answer to, and that is not under way at the same time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["Ident", "Idents"]

# Messages of which numbers are remembered; of one that is forgotten they begin anew.
REMEMBERED = 10_000


class Ident(NamedTuple):
    """The ident of a message: ``str`` of it has 64 hexadecimal digits, a dot, and a number."""

    digest: bytes
    number: int

    def __str__(self) -> str:
        return f"{self.digest.hex()}.{self.number}"


@dataclass
class _Numbers:
    """Those of one digest: taken are all below ``next``, and ``taken``."""

    next: int = 0
    taken: set[int] = field(default_factory=set)
    under_way: set[int] = field(default_factory=set)

    def take(self, number: int) -> None:
        self.taken.add(number)
        while self.next in self.taken:
            self.taken.remove(self.next)
            self.next += 1


class Idents:
    """Gives messages their idents.  Safe to use from several threads."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, _Numbers] = OrderedDict()
        self._lock = threading.Lock()

    def give(self, envelope: Envelope, content: bytes) -> Ident:
        """The ident of a message; ``content`` is the SHA-256 of its octets as they came."""
        who = "\0".join((envelope.reverse_path, *sorted(envelope.recipients)))
        digest = hashlib.sha256(content + who.encode("utf-8", "surrogateescape")).digest()
        with self._lock:
            numbers = self._numbers.setdefault(digest, _Numbers())
            self._numbers.move_to_end(digest)
            number = numbers.next
            while number in numbers.taken or number in numbers.under_way:
                number += 1
            numbers.under_way.add(number)
            if len(self._numbers) > REMEMBERED:
                self._numbers.popitem(last=False)
        return Ident(digest, number)

    def settle(self, ident: Ident, heard: bool) -> None:
        """Its sender is gone, or, ``heard``, has gone on after it was answered 2yz."""
        with self._lock:
            if (numbers := self._numbers.get(ident.digest)) is None:
                return
            numbers.under_way.discard(ident.number)
            if heard:
                numbers.take(ident.number)
            elif not (numbers.next or numbers.taken or numbers.under_way):
                del self._numbers[ident.digest]
