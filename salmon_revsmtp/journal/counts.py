"""What is counted in windows of time, and has to survive the process.

There is one row per name.  Where the file cannot be used, what this process has counted is in
memory.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from salmon_revsmtp.journal.clock import SteadyClock, since_boot
from salmon_revsmtp.journal.connection import JournalConnection

__all__ = ["Change", "CountJournal", "Window"]

# Names of which the counts are kept in memory.
REMEMBERED = 10_000

_SELECT = "SELECT began, messages, octets, suppressed FROM counts WHERE name = ?"
_INSERT = (
    "INSERT OR REPLACE INTO counts (name, began, messages, octets, suppressed) "
    "VALUES (?, ?, ?, ?, ?)"
)
_PRUNE = "DELETE FROM counts WHERE abs(began - ?) > ?"


class Window(NamedTuple):
    """What has been counted of a name since ``began``: how many messages and octets went through,
    and how many messages were held back."""

    began: float
    messages: int = 0
    octets: int = 0
    suppressed: int = 0


#: Given the counts that there are and the time in seconds, those that are new.
Change = Callable[[Mapping[str, Window], float], Mapping[str, Window]]


class CountJournal:
    """The counts.  Safe to use from several threads and processes; never raises.

    ``keep``  seconds after which a window that has begun may be forgotten.
    """

    def __init__(self, connection: JournalConnection | None = None, keep: float = 7200) -> None:
        self._connection = connection or JournalConnection()
        self._keep = keep
        self._clock = SteadyClock()
        self._lock = threading.Lock()
        self._here: dict[str, Window] = {}

    def update(self, names: Iterable[str], change: Change) -> None:
        """Change the counts of these names, with no one between reading and writing.  ``change``
        is called again, with what this process knows, if the journal does not take its result."""
        names = tuple(names)

        def write(database: sqlite3.Connection) -> Mapping[str, Window]:
            database.execute("BEGIN IMMEDIATE")
            if not self._clock.known:
                self._clock.read(database)
            now = since_boot() + self._clock.ahead
            changed = change(self._read(database, names), now)
            database.executemany(_INSERT, [(name, *one) for name, one in changed.items()])
            database.execute(_PRUNE, (now, self._keep))
            self._clock.note(database)
            database.execute("COMMIT")
            return changed

        with self._lock:
            changed = self._connection.write(write)
            if changed is None:
                changed = change(dict(self._here), since_boot() + self._clock.ahead)
            self._remember(changed)

    def _read(self, database: sqlite3.Connection, names: Iterable[str]) -> dict[str, Window]:
        found = {}
        for name in names:
            if row := database.execute(_SELECT, (name,)).fetchone():
                found[name] = Window(*row)
        return found

    def _remember(self, changed: Mapping[str, Window]) -> None:
        for name, window in changed.items():
            self._here.pop(name, None)
            self._here[name] = window
        while len(self._here) > REMEMBERED:
            del self._here[next(iter(self._here))]

    def close(self) -> None:
        """Close the file.  The next use opens it again."""
        self._connection.close()
