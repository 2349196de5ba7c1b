"""What has been delivered to whom, so that a repeat is answered as before and not handled again.

In memory: it knows what this process has done.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Served", "ServedMemory"]

# About 200 octets each: a provider's retry comes soon, and not behind this many others.
REMEMBERED = 100_000


@dataclass(frozen=True)
class Served:
    """One delivery: a message (by the SHA-256 of its octets) of a sender for a recipient."""

    service: str
    reverse_path: str
    recipient: str
    digest: bytes

    @staticmethod
    def digest_of(data: bytes) -> bytes:
        """What stands for a message: the hash of its octets as they came."""
        return hashlib.sha256(data).digest()


class ServedMemory:
    """Deliveries and their final replies (2yz and 5yz); the oldest are forgotten first.  Safe to
    use from several threads."""

    def __init__(self) -> None:
        self._served: OrderedDict[Served, Reply] = OrderedDict()
        self._lock = threading.Lock()

    def reply_to(self, served: Served) -> Reply | None:
        """What this delivery was answered when it was made, ``None`` if it was not."""
        with self._lock:
            return self._served.get(served)

    def record(self, served: Served, reply: Reply) -> None:
        """Remember a delivery; a 4yz is not one, the provider is to try again."""
        if reply.transient:
            return
        with self._lock:
            self._served[served] = reply
            if len(self._served) > REMEMBERED:
                self._served.popitem(last=False)
