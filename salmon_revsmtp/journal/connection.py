"""A connection to the journal's file that stays open, and that no trouble with the file gets past.

A commit is not synced to the disk.  It survives the death of the process; a power cut may take the
last ones.  A sync for each delivery would cost more than everything else that is done for it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from salmon_revsmtp.journal.file import DEFAULT_JOURNAL, JournalFile

__all__ = ["JournalConnection"]

# Seconds until a file that could not be used is tried again.
RETRY = 10.0
# Seconds between two checks whether the file has been deleted.
CHECK_EVERY = 1.0
# SQLite copies its write-ahead log into the file, and syncs both, when the log has this many pages
# of 4 KiB: every few thousand deliveries.
CHECKPOINT_PAGES = 4000

log = logging.getLogger(__name__)

Result = TypeVar("Result")
#: What is done with the file.
Work = Callable[[sqlite3.Connection], Result]


class JournalConnection:
    """Reads and writes the journal's file.  Safe to use from several threads; never raises.

    After an error, writing is tried again only after some seconds, so that a broken disk does not
    hold up every message.  That is logged once, and once more when the file can be used again.
    """

    def __init__(self, path: Path = DEFAULT_JOURNAL) -> None:
        self._file = JournalFile(path)
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None
        self._check_at = 0.0
        self._broken = False
        self._retry_at = 0.0

    def read(self, work: Work[Result]) -> Result | None:
        """What ``work`` returns; ``None`` if the file cannot be read."""
        with self._lock:
            try:
                return self._do(work)
            except Exception:
                self._close()
                return None  # the next write logs the reason

    def write(self, work: Work[Result]) -> Result | None:
        """What ``work`` returns; ``None`` if the file cannot be written now.  Then nothing of an
        open transaction is kept."""
        with self._lock:
            if self._broken and time.monotonic() < self._retry_at:
                return None
            try:
                result = self._do(work)
            except Exception as error:
                self._close()
                self._note_failure(error)
                return None
            if self._broken:
                self._broken = False
                log.warning("journal=%s can be used again", self._file.path)
            return result

    def close(self) -> None:
        """Close the file.  The next use opens it again."""
        with self._lock:
            self._close()

    def _do(self, work: Work[Result]) -> Result:
        if self._database is not None and time.monotonic() >= self._check_at:
            self._close_if_deleted()
        return work(self._database or self._open())

    def _open(self) -> sqlite3.Connection:
        self._database = database = self._file.open()
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        self._opened = self._identity()
        return database

    def _close_if_deleted(self) -> None:
        """What is written to a file that has been deleted, or replaced, is lost."""
        self._check_at = time.monotonic() + CHECK_EVERY
        if self._opened is None or self._opened != self._identity():
            self._close()

    def _identity(self) -> tuple[int, int] | None:
        """Which file has the journal's name now; ``None`` if there is none."""
        try:
            found = self._file.path.stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _close(self) -> None:
        """This rolls back what was not committed."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _note_failure(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + RETRY
        if not self._broken:
            log.warning(
                "journal=%s cannot be used: %s; what has been delivered is kept in memory, "
                "so a restart may handle a message twice",
                self._file.path,
                error,
            )
        self._broken = True
