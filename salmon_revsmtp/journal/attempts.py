"""How often the handling of a queued message has begun and not ended.

A message that kills the process each time would otherwise do so for ever.  The counts are in the
journal, because they have to survive the process.
"""

from __future__ import annotations

import sqlite3
from collections import Counter

from salmon_revsmtp.journal.connection import JournalConnection

__all__ = ["Attempts"]

_BEGIN = (
    "INSERT INTO attempts (queue, key, begun) VALUES (?, ?, 1) "
    "ON CONFLICT (queue, key) DO UPDATE SET begun = begun + 1"
)
_BEGUN = "SELECT begun FROM attempts WHERE queue = ? AND key = ?"
_END = "DELETE FROM attempts WHERE queue = ? AND key = ?"


class Attempts:
    """The counts of one queue, for its one consumer.  Never raises; without a disk it counts those
    of this process.

    ``queue``  the queue's folder.
    """

    def __init__(self, connection: JournalConnection, queue: str) -> None:
        self._connection = connection
        self._queue = queue
        self._here: Counter[str] = Counter()

    def begin(self, key: str) -> int:
        """Note that the handling of a message begins; returns how often it has begun and not ended,
        this time included."""

        def write(database: sqlite3.Connection) -> int:
            database.execute(_BEGIN, (self._queue, key))
            [begun] = database.execute(_BEGUN, (self._queue, key)).fetchone()
            return int(begun)

        self._here[key] += 1
        return max(self._connection.write(write) or 0, self._here[key])

    def end(self, key: str) -> None:
        """Note that it has ended, whatever came of it."""

        def write(database: sqlite3.Connection) -> None:
            database.execute(_END, (self._queue, key))

        del self._here[key]  # which a Counter allows for what it does not have
        self._connection.write(write)
