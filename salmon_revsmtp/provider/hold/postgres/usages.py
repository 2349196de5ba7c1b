"""What is held for whom, as the event loop may ask: in memory, and as near to the truth as that
goes.

What this process does is counted at once.  What others do is read every now and then.  A number
that we change while it is read is left as it is until the next time.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from salmon_revsmtp.provider.hold.store import Usage

__all__ = ["Usages"]


class Usages:
    """What is held, by account."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Usage] = {}
        self._changing: Counter[str] = Counter()
        self._changed: set[str] = set()  # since a reading began

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
            kept = self._changed | set(self._changing)
            known = {one: used for one, used in found.items() if one not in kept}
            known.update((one, self._known[one]) for one in kept if one in self._known)
            self._known = known
