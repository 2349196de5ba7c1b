"""What has been delivered to whom, so that a repeat is answered as before and not handled again.

This is the journal's record of deliveries: one row per message (by the SHA-256 of its octets),
service, reverse-path and recipient, with the reply.  The order that loses nothing is: handled,
recorded, answered.  A process that dies between the first two handles the message again when the
provider sends it again; one that dies between the last two does not.

Each delivery is a commit of its own, without a sync.  It survives the death of the process; after
a power cut the last of them may be missing, and then a message is handled twice, which is cheaper
than a sync per message.  Where the file cannot be written the rows stay in memory, with a warning,
and go into the file when that works again.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from salmon_revsmtp.journal.file import JournalFile
from salmon_revsmtp.smtp.replies import Reply, without_surrogates

__all__ = ["WEEK", "DeliveryJournal", "DeliveryRecord", "MessageKey"]

#: Seconds in which a repeat is known: providers give up after four or five days (RFC 5321 4.5.4.1).
WEEK = 7 * 86400.0

# Messages kept in memory while the file cannot be written, about 500 octets each.
REMEMBERED = 100_000
# Seconds until a file that could not be used is tried again.
RETRY = 10.0
# Seconds between two looks whether somebody has deleted the file.
LOOK_EVERY = 1.0
# Seconds between two looks for rows that are too old, and how many go at a time.
PRUNE_EVERY = 3600.0
PRUNE_ROWS = 1000
# SQLite copies its write-ahead log into the file, and syncs both, when it has that many pages of
# 4 KiB: every few thousand deliveries.
CHECKPOINT_PAGES = 4000

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class MessageKey(NamedTuple):
    """What stands for a message of a sender in a service."""

    service: str
    reverse_path: str
    digest: bytes

    @classmethod
    def of(cls, service: str, reverse_path: str, data: bytes) -> MessageKey:
        """The key of a message by its octets as they came."""
        return cls(service, without_surrogates(reverse_path), hashlib.sha256(data).digest())


class DeliveryRecord(NamedTuple):
    """One delivery that was made: when, and until when that is of interest (seconds since the
    epoch), what was answered, and whether its sender has been notified that it failed."""

    at: float
    expires: float
    reply: Reply
    notified: bool = False


_SELECT = (
    "SELECT digest, service, reverse_path, recipient, at, expires, code, text, enhanced, notified "
    "FROM deliveries WHERE digest IN ({}) AND abs(at - ?) < ?"
)
_INSERT = (
    "INSERT OR REPLACE INTO deliveries "
    "(digest, service, reverse_path, recipient, at, expires, code, text, enhanced, notified) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_PRUNE = (
    "DELETE FROM deliveries WHERE (digest, service, reverse_path, recipient) IN (SELECT "
    "digest, service, reverse_path, recipient FROM deliveries WHERE expires < ? LIMIT ?)"
)
_BEGIN = (
    "INSERT INTO attempts (queue, key, begun) VALUES (?, ?, 1) "
    "ON CONFLICT (queue, key) DO UPDATE SET begun = begun + 1"
)
_BEGUN = "SELECT begun FROM attempts WHERE queue = ? AND key = ?"


def _row(key: MessageKey, recipient: str, served: DeliveryRecord) -> tuple[Any, ...]:
    reply = served.reply
    return (
        key.digest,
        key.service,
        without_surrogates(key.reverse_path),
        without_surrogates(recipient),
        served.at,
        served.expires,
        reply.code,
        reply.text,
        reply.enhanced,
        int(served.notified),
    )


def _served(
    at: float, expires: float, code: int, text: str, enhanced: str | None, notified: int
) -> DeliveryRecord:
    return DeliveryRecord(at, expires, Reply(code, text, enhanced), bool(notified))


class DeliveryJournal:
    """The record of deliveries.  Safe to use from several threads and processes; never raises."""

    def __init__(self, file: JournalFile | None = None) -> None:
        self._file = file or JournalFile()
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._identity: tuple[int, int] = (0, 0)
        self._unwritten: OrderedDict[MessageKey, dict[str, DeliveryRecord]] = OrderedDict()
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._broken = False
        self._retry_at = 0.0
        self._look_at = 0.0
        self._prune_at = 0.0

    def served(self, key: MessageKey, window: float = WEEK) -> dict[str, DeliveryRecord]:
        """By recipient, the deliveries of a message in the last ``window`` seconds."""
        return self.recorded_all([key], window)[key]

    def recorded_all(
        self, keys: Iterable[MessageKey], window: float = WEEK
    ) -> dict[MessageKey, dict[str, DeliveryRecord]]:
        """The same for each of several messages, in one look."""
        found: dict[MessageKey, dict[str, DeliveryRecord]] = {key: {} for key in keys}
        digests = [key.digest for key in found]
        select = _SELECT.format(", ".join("?" for _ in digests))

        def read(database: sqlite3.Connection) -> None:
            rows = database.execute(select, (*digests, time.time(), window))
            for digest, service, reverse_path, recipient, *row in rows:
                key = MessageKey(service, reverse_path, digest)
                if key in found:
                    found[key][recipient] = _served(*row)

        with self._lock:
            self._read(read)
            for key, recipients in found.items():
                recipients.update(self._unwritten.get(key, {}))
        return found

    def record(
        self, key: MessageKey, recipient: str, reply: Reply, window: float = WEEK
    ) -> DeliveryRecord:
        """Note a delivery, to be known for ``window`` seconds; a 4yz is none, the provider is to
        try again."""
        now = time.time()
        served = DeliveryRecord(now, now + window, reply)
        if not reply.transient:
            self._write(key, {recipient: served})
        return served

    def record_notified(
        self, key: MessageKey, failed: Mapping[str, DeliveryRecord]
    ) -> Mapping[str, DeliveryRecord]:
        """Note that the sender has been told of these failures; returns them as they are now."""
        told = {one: row._replace(notified=True) for one, row in failed.items()}
        self._write(key, told)
        return told

    def begin(self, queue: str, key: str) -> int:
        """Note that the handling of a queue's message begins; returns how often it has begun and
        not ended, this time included."""

        def write(database: sqlite3.Connection) -> int:
            database.execute(_BEGIN, (queue, key))
            [begun] = database.execute(_BEGUN, (queue, key)).fetchone()
            return int(begun)

        with self._lock:
            self._attempts[queue, key] += 1
            return max(self._attempt(write) or 0, self._attempts[queue, key])

    def end(self, queue: str, key: str) -> None:
        """Note that it has ended, however it did."""

        def write(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM attempts WHERE queue = ? AND key = ?", (queue, key))

        with self._lock:
            del self._attempts[queue, key]
            self._attempt(write)

    def close(self) -> None:
        """Close the file, after a last try to write what could not be written."""
        with self._lock:
            if self._unwritten:
                self._attempt(self._flush)
            self._disconnect()

    # -- writing ----------------------------------------------------------------------------------

    def _write(self, key: MessageKey, rows: Mapping[str, DeliveryRecord]) -> None:
        with self._lock:
            self._unwritten.setdefault(key, {}).update(rows)
            self._attempt(self._flush)
            while len(self._unwritten) > REMEMBERED:
                self._unwritten.popitem(last=False)

    def _flush(self, database: sqlite3.Connection) -> None:
        """Write what is in memory."""
        rows = [
            _row(key, recipient, row)
            for key, recipients in self._unwritten.items()
            for recipient, row in recipients.items()
        ]
        if len(rows) == 1:
            database.execute(_INSERT, rows[0])
        elif rows:
            database.execute("BEGIN IMMEDIATE")
            database.executemany(_INSERT, rows)
            database.execute("COMMIT")
        self._unwritten.clear()
        self._prune(database)

    def _prune(self, database: sqlite3.Connection) -> None:
        if time.monotonic() < self._prune_at:
            return
        cursor = database.execute(_PRUNE, (time.time(), PRUNE_ROWS))
        # While there is more, some of it goes with every message.
        more = cursor.rowcount >= PRUNE_ROWS
        self._prune_at = 0.0 if more else time.monotonic() + PRUNE_EVERY

    # -- the file ---------------------------------------------------------------------------------

    def _read(self, work: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """Read the file, also while it cannot be written; ``None`` if that cannot be."""
        try:
            return work(self._connected())
        except Exception:
            self._disconnect()  # what writes next says so
            return None

    def _attempt(self, work: Callable[[sqlite3.Connection], Result]) -> Result | None:
        """Write to the file; ``None`` if it cannot be used.  One that was broken is left alone for
        a while."""
        if self._broken and time.monotonic() < self._retry_at:
            return None
        try:
            result = work(self._connected())
        except Exception as error:
            self._disconnect()  # which rolls back
            self._retry_at = time.monotonic() + RETRY
            if not self._broken:
                log.warning(
                    "journal=%s cannot be used: %s; what has been delivered is kept in memory, "
                    "so a restart may handle a message twice",
                    self._file.path,
                    error,
                )
            self._broken = True
            return None
        if self._broken:
            self._broken = False
            log.warning("journal=%s can be used again", self._file.path)
        return result

    def _connected(self) -> sqlite3.Connection:
        """The connection; a new one if somebody has deleted the file."""
        if self._database is not None and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_EVERY
            if self._identity != self._on_disk():
                self._disconnect()
        if self._database is None:
            self._database = self._file.open()
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            self._identity = self._on_disk()
        return self._database

    def _on_disk(self) -> tuple[int, int]:
        try:
            found = self._file.path.stat()
        except FileNotFoundError:
            return (0, 0)
        return found.st_dev, found.st_ino

    def _disconnect(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
