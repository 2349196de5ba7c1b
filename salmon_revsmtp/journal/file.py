"""The journal's file, and its schema: the SQLite record of collections and deliveries.

It is a record and no more: a journal that cannot be written costs no mail and no collection, only
a warning.  Several processes may use one at the same time.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from salmon_revsmtp.files import make_private_file
from salmon_revsmtp.journal.clock import CLOCK_TABLE

__all__ = ["BUSY_TIMEOUT", "DEFAULT_JOURNAL", "JournalFile"]

DEFAULT_JOURNAL = Path("run/revsmtp.sqlite3")

# Seconds to wait for another process that is writing.
BUSY_TIMEOUT = 10.0

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
    CLOCK_TABLE,
    """
    CREATE TABLE counts (
        name TEXT PRIMARY KEY,
        began REAL NOT NULL,
        messages INTEGER NOT NULL,
        octets INTEGER NOT NULL,
        suppressed INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    "CREATE INDEX deliveries_by_expiry ON deliveries (expires)",
    """
    CREATE TABLE traffic (
        start REAL NOT NULL,
        agent TEXT NOT NULL,
        messages INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (start, agent)
    ) WITHOUT ROWID
    """,
)


class JournalFile:
    """The file, which is made when it is first opened.

    ``migrations``  what takes its schema from each version to the next; the journal's, or those of
                    another database that is opened in the same way.
    """

    def __init__(
        self, path: Path = DEFAULT_JOURNAL, migrations: Sequence[str] | None = None
    ) -> None:
        self.path = path.absolute()  # a handler may change the folder of the process
        self._migrations = MIGRATIONS if migrations is None else migrations

    def open(self, patience: float = BUSY_TIMEOUT) -> sqlite3.Connection:
        """A connection, its schema up to date, without transactions of Python's own.  It may be
        used from several threads, not at the same time.  It waits ``patience`` seconds for another
        process.

        What is committed survives the death of the process.  With a write-ahead log it costs no
        sync unless the connection asks for that (``PRAGMA synchronous``).  Raises
        :class:`sqlite3.Error` and :class:`OSError`.
        """
        make_private_file(self.path)  # SQLite gives its other files the same mode and owner
        database = sqlite3.connect(
            self.path, timeout=patience, isolation_level=None, check_same_thread=False
        )
        try:
            # A file system without shared memory has no such log; then every commit is synced.
            with contextlib.suppress(sqlite3.OperationalError):
                database.execute("PRAGMA journal_mode = WAL")
            if self._version(database) != len(self._migrations):
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
        if version > len(self._migrations):
            raise sqlite3.DatabaseError(
                f"its schema is version {version}, of a later salmon-revsmtp than this one"
            )
        for number in range(version, len(self._migrations)):
            for statement in self._migrations[number].split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {number + 1}")
