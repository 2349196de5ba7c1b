"""What tells one message of a sender from another, for customers that know what they have had.

A sender that hears nothing sends its message again.  Between the two, this process may have died,
and the customer may have handled the first: so the ident of both is to be the same, and nothing but
the message can it be made of.  It is made of what was sent, and by whom; not of the recipients, for
a sender that has heard of some of them comes again for the others (PRDR), and the customer knows
each recipient by itself.

But some senders send the same octets twice and mean two messages.  These have heard the answer to
the first: a command of theirs came after it.  So an ident has a number beside the digest: the least
that, of none of the recipients, anyone has heard the answer to, and that is not under way at the
same time.  What is under way for a client that is gone is in no one's way: that client comes again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
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
        digest, recipients = hashlib.sha256(content + sender).digest(), set(envelope.recipients)
        with self._lock:
            of_each = [self._of(digest, one) for one in recipients]
            number = max(one.next for one in of_each)
            while not all(one.free(number) for one in of_each):
                number += 1
            for one in of_each:
                one.under_way.add(number)
            while len(self._numbers) > REMEMBERED:
                self._numbers.popitem(last=False)
        return Ident(digest, number, frozenset(recipients))

    def _of(self, digest: bytes, recipient: str) -> _Numbers:
        numbers = self._numbers.setdefault((digest, recipient), _Numbers())
        self._numbers.move_to_end((digest, recipient))
        return numbers

    def settle(self, ident: Ident, heard: bool) -> None:
        """Its sender is gone, or, ``heard``, has gone on after it was answered 2yz.  Once."""
        with self._lock:
            for recipient in ident.recipients:
                key = ident.digest, recipient
                if (numbers := self._numbers.get(key)) is None:
                    continue
                numbers.under_way.discard(ident.number)
                if heard:
                    numbers.take(ident.number)
                elif not (numbers.next or numbers.taken or numbers.under_way):
                    del self._numbers[key]
