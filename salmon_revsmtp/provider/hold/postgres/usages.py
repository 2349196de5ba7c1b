"""What is held for whom, as the event loop may ask: in memory, and as near to the truth as that
goes.

What this process does is counted at once.  What others do is read every now and then.  A number
that we change while it is read is left as it is until the next time; but not for long, or an
account that has mail all the time would never hear of what others hand over.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from salmon_revsmtp.provider.hold.store import Usage

__all__ = ["Usages"]

# Readings after each other that leave a number as it is.  The next one is taken, and is wrong by
# what is changed just then, until the one after it.
MOST_LEFT = 4


class Usages:
    """What is held, by account."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Usage] = {}
        self._changing: Counter[str] = Counter()
        self._changed: set[str] = set()  # since a reading began
        self._left: dict[str, int] = {}  # how often in a row each was left as it is

    def of(self, account: str) -> Usage:
        return self._known.get(account, Usage())

    def all(self) -> dict[str, Usage]:
        """Of all accounts that have anything."""
        known = self._known.copy()  # mail comes meanwhile, in other threads
        return {account: used for account, used in known.items() if used.messages}

    @contextlib.contextmanager
    def changing(self, accounts: Collection[str]) -> Iterator[None]:
        """While this lasts, no reading says how much these have."""
        with self._lock:
            self._changing.update(accounts)
        try:
            yield
        finally:
            with self._lock:
                self._changing.subtract(accounts)
                self._changing += Counter()
                self._changed.update(accounts)

    def add(self, messages: Mapping[str, int], octets: Mapping[str, int]) -> None:
        """So many more."""
        with self._lock:
            for account, number in messages.items():
                was = self.of(account)
                self._known[account] = Usage(was.messages + number, was.octets + octets[account])

    def begin_reading(self) -> None:
        """What is read from now on has all that was done before."""
        with self._lock:
            self._changed = set(self._changing)

    def read(self, found: Mapping[str, Usage]) -> None:
        """What a reading has found."""
        with self._lock:
            changed = self._changed | set(self._changing)
            kept = {one for one in changed if self._left.get(one, 0) < MOST_LEFT}
            self._left = {one: self._left.get(one, 0) + 1 for one in kept}
            known = {one: used for one, used in found.items() if one not in kept}
            known.update((one, self._known[one]) for one in kept if one in self._known)
            self._known = known
