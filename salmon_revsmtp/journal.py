"""The journal: the SQLite record of collections and deliveries.

:class:`JournalFile` is the file and its schema; :class:`Journal` is the record of collections, and
what is kept of each agent between them.  The record of deliveries has more to do, in
``delivery/served.py``.

It is a record and no more: a journal that cannot be written costs no mail and no collection, only
a warning.  Several processes may use one at the same time.  Every call of :class:`Journal` opens
the file, does its work in one transaction and closes it again, so that it may be called from any
thread.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from salmon_revsmtp.report import Report

__all__ = ["DEFAULT_JOURNAL", "AgentState", "Entry", "Journal", "JournalFile"]

DEFAULT_JOURNAL = Path("run/revsmtp.sqlite3")

# Seconds to wait for another process that is writing.
BUSY_TIMEOUT = 10.0
KEEP_DAYS = 90

# Each statement block takes the schema from its index to the next version (PRAGMA user_version).
MIGRATIONS = (
    """
    CREATE TABLE collections (
        id INTEGER PRIMARY KEY,
        agent TEXT NOT NULL,
        protocol TEXT NOT NULL,
        started REAL NOT NULL,
        ended REAL NOT NULL,
        outcome TEXT NOT NULL,
        messages INTEGER NOT NULL,
        recipients INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        refused INTEGER NOT NULL,
        sessions INTEGER NOT NULL,
        tls TEXT,
        auth TEXT,
        error TEXT
    );
    CREATE INDEX collections_by_agent ON collections (agent, started);
    CREATE INDEX collections_by_start ON collections (started);
    CREATE TABLE agents (
        agent TEXT PRIMARY KEY,
        enabled INTEGER,
        failing_since REAL
    );
    """,
    """
    CREATE TABLE deliveries (
        digest BLOB NOT NULL,
        service TEXT NOT NULL,
        reverse_path TEXT NOT NULL,
        recipient TEXT NOT NULL,
        at REAL NOT NULL,
        expires REAL NOT NULL,
        code INTEGER NOT NULL,
        text TEXT NOT NULL,
        enhanced TEXT,
        notified INTEGER NOT NULL,
        PRIMARY KEY (digest, service, reverse_path, recipient)
    ) WITHOUT ROWID;
    CREATE TABLE attempts (
        queue TEXT NOT NULL,
        key TEXT NOT NULL,
        begun INTEGER NOT NULL,
        PRIMARY KEY (queue, key)
    ) WITHOUT ROWID;
    """,
)

log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """One collection that has ended; times in seconds since the epoch."""

    agent: str
    protocol: str
    started: float
    ended: float
    outcome: str
    messages: int
    recipients: int
    bytes: int
    refused: int
    sessions: int
    tls: str | None
    auth: str | None
    error: str | None


@dataclass(frozen=True)
class AgentState:
    """What is kept of an agent.  ``enabled``: what ``enable`` or ``disable`` said, ``None`` if
    neither; ``failing_since``: when it began to fail, ``None`` if it does not."""

    enabled: bool | None = None
    failing_since: float | None = None


_COLUMNS = ", ".join(Entry.__annotations__)
_PLACES = ", ".join("?" for _ in Entry.__annotations__)


class JournalFile:
    """The file, which is made when it is first opened."""

    def __init__(self, path: Path = DEFAULT_JOURNAL) -> None:
        self.path = path

    def open(self) -> sqlite3.Connection:
        """A connection, its schema up to date, without transactions of Python's own.  It may be
        used from several threads, not at the same time.

        What is committed survives the death of the process.  With a write-ahead log it costs no
        sync unless the connection asks for that (``PRAGMA synchronous``).  Raises
        :class:`sqlite3.Error` and :class:`OSError`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(
            self.path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            # A file system without shared memory has no such log; then every commit is synced.
            with contextlib.suppress(sqlite3.OperationalError):
                database.execute("PRAGMA journal_mode = WAL")
            if self._version(database) != len(MIGRATIONS):
                database.execute("BEGIN IMMEDIATE")
                self._migrate(database)
                database.execute("COMMIT")
        except BaseException:
            database.close()
            raise
        return database

    @staticmethod
    def _version(database: sqlite3.Connection) -> int:
        [version] = database.execute("PRAGMA user_version").fetchone()
        return int(version)

    def _migrate(self, database: sqlite3.Connection) -> None:
        version = self._version(database)
        if version > len(MIGRATIONS):
            raise sqlite3.DatabaseError(
                f"its schema is version {version}, of a later salmon-revsmtp than this one"
            )
        for number in range(version, len(MIGRATIONS)):
            for statement in MIGRATIONS[number].split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number + 1}")


class Journal:
    """The record of collections in a file, which is made when it is first written."""

    def __init__(self, path: Path = DEFAULT_JOURNAL) -> None:
        self._file = JournalFile(path)
        self._warned = False

    def record(self, report: Report, started: float, good: bool) -> None:
        """Note a collection's end, and since when its agent fails if it does.  ``started`` in
        seconds since the epoch."""
        entry = Entry(
            report.agent,
            report.protocol,
            started,
            started + report.seconds,
            report.outcome.value,
            report.messages,
            report.recipients,
            report.bytes,
            report.refused,
            report.sessions,
            report.tls,
            report.auth,
            report.error,
        )
        values = [getattr(entry, name) for name in Entry.__annotations__]

        def write(database: sqlite3.Connection) -> None:
            database.execute(f"INSERT INTO collections ({_COLUMNS}) VALUES ({_PLACES})", values)
            database.execute(
                "INSERT INTO agents (agent, failing_since) VALUES (?, ?) ON CONFLICT (agent) DO "
                "UPDATE SET failing_since = CASE WHEN excluded.failing_since IS NULL THEN NULL "
                "ELSE coalesce(failing_since, excluded.failing_since) END",
                (entry.agent, None if good else entry.ended),
            )
            oldest = time.time() - KEEP_DAYS * 86400
            database.execute("DELETE FROM collections WHERE started < ?", (oldest,))

        self._write(write)

    def set_enabled(self, agent: str, enabled: bool) -> bool:
        """Keep what ``enable`` or ``disable`` said; ``False`` if it cannot be kept."""

        def write(database: sqlite3.Connection) -> None:
            database.execute(
                "INSERT INTO agents (agent, enabled) VALUES (?, ?) "
                "ON CONFLICT (agent) DO UPDATE SET enabled = excluded.enabled",
                (agent, int(enabled)),
            )

        return self._write(write)

    def state(self, agent: str) -> AgentState:
        """What is kept of an agent."""

        def read(database: sqlite3.Connection) -> AgentState:
            row = database.execute(
                "SELECT enabled, failing_since FROM agents WHERE agent = ?", (agent,)
            ).fetchone()
            if row is None:
                return AgentState()
            return AgentState(None if row[0] is None else bool(row[0]), row[1])

        return self._read(read, AgentState())

    def history(self, agent: str | None = None, limit: int = 50) -> list[Entry]:
        """Past collections, newest first."""

        def read(database: sqlite3.Connection) -> list[Entry]:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM collections WHERE ? IS NULL OR agent = ? "
                "ORDER BY started DESC, id DESC LIMIT ?",
                (agent, agent, limit),
            )
            return [Entry(*row) for row in rows]

        return self._read(read, [])

    # -- the file -------------------------------------------------------------------------------

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> bool:
        try:
            with self._transaction() as database:
                work(database)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._warn("written", error)
            return False
        self._warned = False
        return True

    def _read(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        if not self._file.path.exists():
            return otherwise
        try:
            with self._transaction() as database:
                return work(database)
        except (sqlite3.Error, OSError) as error:
            self._warn("read", error)
            return otherwise

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = self._file.open()
        try:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        finally:
            database.close()  # rolls back what was not committed

    def _warn(self, doing: str, error: Exception) -> None:
        """Once, not at every collection."""
        if not self._warned:
            log.warning(
                "journal=%s cannot be %s: %s; mail is not affected",
                self._file.path,
                doing,
                error,
            )
        self._warned = True
