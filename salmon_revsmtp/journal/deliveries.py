"""The record of deliveries, so that a repeated message is answered as before and not handled again.

There is one row per message (by the SHA-256 of its octets), service, reverse-path and recipient,
with the reply.  The order that loses nothing is: handled, recorded, answered.  A process that dies
between the first two handles the message again when the provider sends it again; one that dies
between the last two does not.

Each delivery is committed on its own, or with those that were made safe with it.  Where the file
cannot be written the rows stay in memory, and go into the file with the first delivery after it can
be written again.

What it costs.  A look is for certain recipients of a message, each found by the table's key: it
takes as long whatever else has been delivered, to whom, or from whom.  The file has a size beyond
which the oldest deliveries go before their time.  Memory has one, too.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, NamedTuple

from salmon_revsmtp.foreign import ERROR_TEXT, shortened
from salmon_revsmtp.journal.clock import SteadyClock, since_boot
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.smtp.replies import Reply, without_surrogates

__all__ = ["WEEK", "DeliveryJournal", "DeliveryRecord", "MessageKey"]

#: Seconds in which a repeat is known: providers give up after four or five days (RFC 5321 4.5.4.1).
WEEK = 7 * 86400.0

# Octets of deliveries kept in memory while the file cannot be written: about 100,000 of them.
REMEMBERED = 64 * 1024 * 1024
# What a row costs in memory beside its texts.
ROW_COST = 500
# Seconds between two searches for rows that have expired, rows written after which the next one
# comes in any case, and how many are deleted at a time.
PRUNE_EVERY = 3600.0
PRUNE_AFTER = 1000
PRUNE_ROWS = 2000
# Octets of the file: about four million deliveries, or a week of seven a second.  A stranger who
# sends more than that shortens the time in which a repeat is known, and does not fill the disk.
LARGEST = 1024 * 1024 * 1024
# Characters of both addresses of a delivery above which they are stored in short.
LONG = 300
# Recipients in one query; each needs four of the 999 variables that every SQLite takes.
QUERY = 200


class MessageKey(NamedTuple):
    """What stands for a message of a sender in a service."""

    service: str
    reverse_path: str
    digest: bytes

    @classmethod
    def of(cls, service: str, reverse_path: str, data: bytes) -> MessageKey:
        """The key of a message by its octets as they came."""
        return cls(service, without_surrogates(reverse_path), hashlib.sha256(data).digest())

    @classmethod
    def by_digest(cls, service: str, reverse_path: str, digest: bytes) -> MessageKey:
        """The same where the SHA-256 of its octets is known."""
        return cls(service, without_surrogates(reverse_path), digest)


class DeliveryRecord(NamedTuple):
    """One delivery that was made: when, and until when that is of interest (seconds of the
    journal's clock), what was answered, and whether its sender has been notified that it failed."""

    at: float
    expires: float
    reply: Reply
    notified: bool = False


#: A message for a recipient, and the key of its row.
_One = tuple[MessageKey, str]
_Stored = tuple[bytes, str, str, str]

# CROSS JOIN: for each that is wanted, in this order, a search by the key.  (For an IN with several
# rows SQLite reads the whole table.)
_SELECT = (
    "WITH wanted (d, s, p, r) AS (VALUES {}) "
    "SELECT digest, service, reverse_path, recipient, at, expires, code, text, enhanced, notified "
    "FROM wanted CROSS JOIN deliveries "
    "ON digest = d AND service = s AND reverse_path = p AND recipient = r WHERE abs(at - ?) < ?"
)
_INSERT = (
    "INSERT OR REPLACE INTO deliveries "
    "(digest, service, reverse_path, recipient, at, expires, code, text, enhanced, notified) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
# In the order of the index, so that it costs what it deletes.
_PRUNE = (
    "DELETE FROM deliveries WHERE (digest, service, reverse_path, recipient) IN (SELECT "
    "digest, service, reverse_path, recipient FROM deliveries WHERE expires < ? "
    "ORDER BY expires LIMIT ?)"
)


def _row(key: MessageKey, recipient: str, record: DeliveryRecord) -> tuple[Any, ...]:
    reply = record.reply
    return (
        *_stored(key, recipient),
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
        self._unwritten: OrderedDict[_One, DeliveryRecord] = OrderedDict()
        self._unwritten_octets = 0
        self._prune_at = 0.0
        self._until_prune = PRUNE_AFTER  # rows
        self._clock = SteadyClock()

    def known(
        self, key: MessageKey, recipients: Collection[str], window: float = WEEK
    ) -> dict[str, DeliveryRecord]:
        """The deliveries of a message to these recipients in the last ``window`` seconds."""
        return self.known_all({key: recipients}, window)[key]

    def known_all(
        self, wanted: Mapping[MessageKey, Collection[str]], window: float = WEEK
    ) -> dict[MessageKey, dict[str, DeliveryRecord]]:
        """The same for each of several messages; together they have few queries."""
        found: dict[MessageKey, dict[str, DeliveryRecord]] = {key: {} for key in wanted}
        ones = [(key, one) for key, recipients in wanted.items() for one in recipients]

        def read(database: sqlite3.Connection) -> None:
            if not self._clock.known:
                self._clock.read(database)
            now = since_boot() + self._clock.ahead
            for start in range(0, len(ones), QUERY):
                stored = {_stored(*one): one for one in ones[start : start + QUERY]}
                for row in _select(database, stored, now, window):
                    key, recipient = stored[row[:4]]
                    found[key][recipient] = _record(*row[4:])

        with self._lock:
            self._connection.read(read)
            if self._unwritten:
                for key, recipient in ones:
                    if record := self._unwritten.get((key, recipient)):
                        found[key][recipient] = record
        return found

    def record(
        self, key: MessageKey, recipient: str, reply: Reply, window: float = WEEK
    ) -> DeliveryRecord:
        """Record a delivery, to be known for ``window`` seconds.  When this returns, the death of
        the process does not lose it.  A 4yz is no delivery, and is not recorded."""
        record = self._new_record(reply, window)
        if not reply.transient:
            self._write({(key, recipient): record})
        return record

    def record_all(
        self, replies: Mapping[tuple[MessageKey, str], Reply], window: float = WEEK
    ) -> Mapping[tuple[MessageKey, str], DeliveryRecord]:
        """The same for deliveries that were made safe together."""
        records = {one: self._new_record(reply, window) for one, reply in replies.items()}
        made = {one: record for one, record in records.items() if not record.reply.transient}
        if made:
            self._write(made)
        return records

    def _new_record(self, reply: Reply, window: float) -> DeliveryRecord:
        now = since_boot() + self._clock.ahead
        if len(reply.text) > ERROR_TEXT:
            reply = Reply(reply.code, shortened(reply.text), reply.enhanced)
        return DeliveryRecord(now, now + window, reply)

    def record_notified(
        self, key: MessageKey, failed: Mapping[str, DeliveryRecord]
    ) -> Mapping[str, DeliveryRecord]:
        """Record that the sender has been notified of these failures; returns their new records."""
        notified = {recipient: one._replace(notified=True) for recipient, one in failed.items()}
        self._write({(key, recipient): one for recipient, one in notified.items()})
        return notified

    def close(self) -> None:
        """Close the file, after a last attempt to write what could not be written."""
        with self._lock:
            if self._unwritten:
                self._connection.write(self._write_all)
            self._connection.close()

    def _write(self, records: Mapping[_One, DeliveryRecord]) -> None:
        with self._lock:
            for one, record in records.items():
                if one not in self._unwritten:
                    self._unwritten_octets += _cost(*one)
                self._unwritten[one] = record
            self._connection.write(self._write_all)
            while self._unwritten_octets > REMEMBERED:
                oldest, _ = self._unwritten.popitem(last=False)
                self._unwritten_octets -= _cost(*oldest)

    def _write_all(self, database: sqlite3.Connection) -> None:
        """As a rule this is one row; several are one transaction."""
        rows = [_row(*one, record) for one, record in self._unwritten.items()]
        if not self._clock.known:
            self._clock.read(database)
        if len(rows) > 1:
            database.execute("BEGIN IMMEDIATE")
        database.executemany(_INSERT, rows)
        if len(rows) > 1:
            database.execute("COMMIT")
        self._unwritten.clear()
        self._unwritten_octets = 0
        self._until_prune -= len(rows)
        if self._until_prune <= 0 or time.monotonic() >= self._prune_at:
            self._prune(database)

    def _prune(self, database: sqlite3.Connection) -> None:
        """Delete some of what has expired, and of what is too much; while there is more, some of it
        goes with every delivery."""
        self._clock.note(database)
        too_large = _size(database) > LARGEST
        before = float("inf") if too_large else since_boot() + self._clock.ahead
        cursor = database.execute(_PRUNE, (before, PRUNE_ROWS))
        more = cursor.rowcount >= PRUNE_ROWS
        self._until_prune = PRUNE_AFTER
        self._prune_at = 0.0 if more else time.monotonic() + PRUNE_EVERY


def _select(
    database: sqlite3.Connection, stored: Collection[_Stored], now: float, window: float
) -> sqlite3.Cursor:
    values = ", ".join(["(?, ?, ?, ?)"] * len(stored))
    return database.execute(_SELECT.format(values), (*chain.from_iterable(stored), now, window))


def _stored(key: MessageKey, recipient: str) -> _Stored:
    """A row's key as the file has it."""
    service, reverse_path, digest = key
    if len(reverse_path) + len(recipient) > LONG:
        reverse_path, recipient = _short(reverse_path), _short(recipient)
    if not (reverse_path.isascii() and recipient.isascii()):
        reverse_path, recipient = without_surrogates(reverse_path), without_surrogates(recipient)
    return digest, service, reverse_path, recipient


def _short(address: str) -> str:
    """Of a long address its beginning, for a person, and a digest, for a file that stays small."""
    if len(address) <= LONG // 2:
        return address
    return f"{address[:20]}#{hashlib.sha256(address.encode('utf-8', 'replace')).hexdigest()}"


def _cost(key: MessageKey, recipient: str) -> int:
    return ROW_COST + len(key.reverse_path) + len(recipient)


def _size(database: sqlite3.Connection) -> int:
    """Octets of the file that are in use; three looks at its first page."""
    pages, free, octets = (
        int(database.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * octets
