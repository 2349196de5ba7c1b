"""Which messages several threads have in their hands, so that no two of them have the same.

A sender that heard nothing in time sends its message again, and the first may still be in its
handler.  The second then waits for the first, and is answered as the first was.  It waits in no
thread: a handler that hangs would hold up one more each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from salmon_revsmtp.journal.deliveries import MessageKey

__all__ = ["InHand"]

Item = TypeVar("Item")

#: A message for a recipient.
_One = tuple[MessageKey, str]


class InHand(Generic[Item]):
    """What the threads of a service have in their hands.  Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[Item, set[_One]] = {}
        # Who waits for each of those that are taken, and what is to be called then.
        self._waiting: dict[_One, dict[Item, Callable[[], None]]] = {}
        self._waits_for: dict[Item, _One] = {}

    def take(
        self, item: Item, key: MessageKey, recipients: tuple[str, ...], go_on: Callable[[], None]
    ) -> bool:
        """Take a message for its recipients.  If it is in hand already for one of them none is
        taken, and ``go_on`` is called when that is over: in the thread of the other, unless
        :meth:`forget` comes first."""
        wanted = {(key, recipient) for recipient in recipients}
        with self._lock:
            for one in wanted:
                if one in self._waiting:
                    self._waiting[one][item] = go_on
                    self._waits_for[item] = one
                    return False
            self._taken[item] = wanted
            self._waiting.update((one, {}) for one in wanted)
            return True

    def give_back(self, item: Item) -> None:
        """It is in hand no more; those that wait for it go on, in the order in which they came."""
        going_on: dict[Item, Callable[[], None]] = {}
        with self._lock:
            for one in self._taken.pop(item):
                going_on |= self._waiting.pop(one)
            for other in going_on:
                del self._waits_for[other]
        # Each goes to the front of a queue.
        for go_on in reversed(going_on.values()):
            go_on()

    def forget(self, item: Item) -> bool:
        """It waits no more; whether it did."""
        with self._lock:
            one = self._waits_for.pop(item, None)
            if one is not None:
                del self._waiting[one][item]
            return one is not None

    def close(self) -> None:
        """None waits any more: all go on now."""
        with self._lock:
            going_on = [go_on for waiting in self._waiting.values() for go_on in waiting.values()]
            for waiting in self._waiting.values():
                waiting.clear()
            self._waits_for.clear()
        for go_on in going_on:
            go_on()
