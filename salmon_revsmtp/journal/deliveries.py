"""The record of deliveries, so that a repeated message is answered as before and not handled again.

There is one row per message (by the SHA-256 of its octets), service, reverse-path and recipient,
with the reply.  The order that loses nothing is: handled, recorded, answered.  A process that dies
between the first two handles the message again when the provider sends it again; one that dies
between the last two does not.

Each delivery is committed on its own.  Where the file cannot be written the rows stay in memory,
and go into the file with the first delivery after it can be written again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from salmon_revsmtp.journal.clock import SteadyClock, since_boot
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.smtp.replies import Reply, without_surrogates

__all__ = ["WEEK", "DeliveryJournal", "DeliveryRecord", "MessageKey"]

#: Seconds in which a repeat is known: providers give up after four or five days (RFC 5321 4.5.4.1).
WEEK = 7 * 86400.0

# Messages kept in memory while the file cannot be written, about 500 octets each.
REMEMBERED = 100_000
# Seconds between two searches for rows that have expired, and how many are deleted at a time.
PRUNE_EVERY = 3600.0
PRUNE_ROWS = 1000


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
    """One delivery that was made: when, and until when that is of interest (seconds of the
    journal's clock), what was answered, and whether its sender has been notified that it failed."""

    at: float
    expires: float
    reply: Reply
    notified: bool = False


_digest = attrgetter("digest")

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


def _row(key: MessageKey, recipient: str, record: DeliveryRecord) -> tuple[Any, ...]:
    reply = record.reply
    return (
        key.digest,
        key.service,
        without_surrogates(key.reverse_path),
        without_surrogates(recipient),
        record.at,
        record.expires,
        reply.code,
        reply.text,
        reply.enhanced,
        int(record.notified),
    )


def _record(
    at: float, expires: float, code: int, text: str, enhanced: str | None, notified: int
) -> DeliveryRecord:
    return DeliveryRecord(at, expires, Reply(code, text, enhanced), bool(notified))


class DeliveryJournal:
    """The record of deliveries.  Safe to use from several threads and processes; never raises."""

    def __init__(self, connection: JournalConnection | None = None) -> None:
        self._connection = connection or JournalConnection()
        self._lock = threading.Lock()
        self._unwritten: OrderedDict[MessageKey, dict[str, DeliveryRecord]] = OrderedDict()
        self._prune_at = 0.0
        self._clock = SteadyClock()

    def known(self, key: MessageKey, window: float = WEEK) -> dict[str, DeliveryRecord]:
        """The deliveries of a message in the last ``window`` seconds, by recipient."""
        return self.known_all([key], window)[key]

    def known_all(
        self, keys: Iterable[MessageKey], window: float = WEEK
    ) -> dict[MessageKey, dict[str, DeliveryRecord]]:
        """The same for each of several messages, in one query."""
        found: dict[MessageKey, dict[str, DeliveryRecord]] = {key: {} for key in keys}
        select = _SELECT.format(", ".join("?" * len(found)))

        def read(database: sqlite3.Connection) -> None:
            digests = map(_digest, found)
            if not self._clock.known:
                self._clock.read(database)
            now = since_boot() + self._clock.ahead
            rows = database.execute(select, (*digests, now, window))
            for digest, service, reverse_path, recipient, *row in rows:
                key = MessageKey(service, reverse_path, digest)
                if key in found:
                    found[key][recipient] = _record(*row)

        with self._lock:
            self._connection.read(read)
            for key, recipients in found.items():
                recipients.update(self._unwritten.get(key, {}))
        return found

    def record(
        self, key: MessageKey, recipient: str, reply: Reply, window: float = WEEK
    ) -> DeliveryRecord:
        """Record a delivery, to be known for ``window`` seconds.  When this returns, the death of
        the process does not lose it.  A 4yz is no delivery, and is not recorded."""
        now = since_boot() + self._clock.ahead
        record = DeliveryRecord(now, now + window, reply)
        if not reply.transient:
            self._write(key, {recipient: record})
        return record

    def record_notified(
        self, key: MessageKey, failed: Mapping[str, DeliveryRecord]
    ) -> Mapping[str, DeliveryRecord]:
        """Record that the sender has been notified of these failures; returns their new records."""
        notified = {recipient: one._replace(notified=True) for recipient, one in failed.items()}
        self._write(key, notified)
        return notified

    def close(self) -> None:
        """Close the file, after a last attempt to write what could not be written."""
        with self._lock:
            if self._unwritten:
                self._connection.write(self._write_all)
            self._connection.close()

    def _write(self, key: MessageKey, records: Mapping[str, DeliveryRecord]) -> None:
        with self._lock:
            self._unwritten.setdefault(key, {}).update(records)
            self._connection.write(self._write_all)
            while len(self._unwritten) > REMEMBERED:
                self._unwritten.popitem(last=False)

    def _write_all(self, database: sqlite3.Connection) -> None:
        """As a rule this is one row.  Each row is a transaction of its own."""
        rows = [
            _row(key, recipient, record)
            for key, records in self._unwritten.items()
            for recipient, record in records.items()
        ]
        if not self._clock.known:
            self._clock.read(database)
        database.executemany(_INSERT, rows)
        self._unwritten.clear()
        if time.monotonic() >= self._prune_at:
            self._prune(database)

    def _prune(self, database: sqlite3.Connection) -> None:
        self._clock.note(database)
        now = since_boot() + self._clock.ahead
        cursor = database.execute(_PRUNE, (now, PRUNE_ROWS))
        # While there is more, some of it goes with every delivery.
        more = cursor.rowcount >= PRUNE_ROWS
        self._prune_at = 0.0 if more else time.monotonic() + PRUNE_EVERY
