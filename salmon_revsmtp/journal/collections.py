"""The record of collections, and what is kept of each agent between them.

Every call opens the file, does its work in one transaction and closes it again, so that it may be
made from any thread.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from salmon_revsmtp.journal.file import BUSY_TIMEOUT, DEFAULT_JOURNAL, JournalFile

__all__ = ["TRAFFIC_SPAN", "AgentState", "Entry", "Journal", "Passed"]

# What is older goes, but never one of the last collections: the clock may have been set.
KEEP_DAYS = 90
KEEP_AT_LEAST = 10_000

#: Traffic is summed up over so many seconds, and kept for a week and a day: for each agent some 800
#: rows of 50 octets.
TRAFFIC_SPAN = 900
KEEP_TRAFFIC = 8 * 86400.0

# Seconds that a reader waits for a process that has the whole file, and until the file is looked at
# again after that; what it would have said is as if it said nothing.
READ_PATIENCE = 1.0
LOOK_AGAIN = 10.0

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


class Passed(NamedTuple):
    """What an agent has brought: messages, and their octets."""

    agent: str
    messages: int
    bytes: int


@dataclass(frozen=True)
class AgentState:
    """What is kept of an agent.  ``enabled``: what ``enable`` or ``disable`` said, ``None`` if
    neither; ``failing_since``: when it began to fail, ``None`` if it does not."""

    enabled: bool | None = None
    failing_since: float | None = None


def _state(database: sqlite3.Connection, agent: str) -> AgentState:
    row = database.execute(
        "SELECT enabled, failing_since FROM agents WHERE agent = ?", (agent,)
    ).fetchone()
    if row is None:
        return AgentState()
    return AgentState(None if row[0] is None else bool(row[0]), row[1])


_COLUMNS = ", ".join(Entry.__annotations__)
_PLACES = ", ".join("?" for _ in Entry.__annotations__)


class Journal:
    """The record of collections in a file, which is made when it is first written."""

    def __init__(self, path: Path = DEFAULT_JOURNAL) -> None:
        self._file = JournalFile(path)
        self._warned = False
        self._look_at = 0.0

    def record(self, entry: Entry, good: bool | None) -> AgentState | None:
        """Note a collection's end, and since when its agent fails if it does; ``good`` is ``None``
        for one that was interrupted, which says nothing of that.

        Returns what was kept of the agent before; ``None`` if it cannot be written.
        """
        values = [getattr(entry, name) for name in Entry.__annotations__]
        before = AgentState()

        def write(database: sqlite3.Connection) -> None:
            nonlocal before
            before = _state(database, entry.agent)
            database.execute(f"INSERT INTO collections ({_COLUMNS}) VALUES ({_PLACES})", values)
            if good is not None:
                database.execute(
                    "INSERT INTO agents (agent, failing_since) VALUES (?, ?) ON CONFLICT (agent) "
                    "DO UPDATE SET failing_since = CASE WHEN excluded.failing_since IS NULL "
                    "THEN NULL ELSE coalesce(failing_since, excluded.failing_since) END",
                    (entry.agent, None if good else entry.ended),
                )
            oldest = time.time() - KEEP_DAYS * 86400
            database.execute(
                "DELETE FROM collections WHERE started < ? AND id <= "
                "(SELECT max(id) FROM collections) - ?",
                (oldest, KEEP_AT_LEAST),
            )

        return before if self._write(write) else None

    def recovered(self, agent: str) -> None:
        """Its collection goes on, and it does not fail any more."""

        def write(database: sqlite3.Connection) -> None:
            database.execute("UPDATE agents SET failing_since = NULL WHERE agent = ?", (agent,))

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

    def passed(self, rows: Iterable[Passed], at: float) -> None:
        """Add to the traffic what agents have brought up to ``at`` (seconds since the epoch), and
        since this was last called."""
        start = at // TRAFFIC_SPAN * TRAFFIC_SPAN
        values = [(start, *row) for row in rows]

        def write(database: sqlite3.Connection) -> None:
            database.executemany(
                "INSERT INTO traffic (start, agent, messages, bytes) VALUES (?, ?, ?, ?) ON "
                "CONFLICT (start, agent) DO UPDATE SET messages = messages + excluded.messages, "
                "bytes = bytes + excluded.bytes",
                values,
            )
            # What is later is of a clock that was wrong.
            database.execute(
                "DELETE FROM traffic WHERE start < ? OR start > ?", (at - KEEP_TRAFFIC, at)
            )

        self._write(write)

    def traffic(self, agent: str | None, since: float) -> list[tuple[float, int, int]]:
        """When each span of :data:`TRAFFIC_SPAN` began that ``since`` or later began (seconds since
        the epoch), and how many messages and octets an agent, or all of them, brought in it; only
        those in which there were any, the oldest first."""

        def read(database: sqlite3.Connection) -> list[tuple[float, int, int]]:
            rows = database.execute(
                "SELECT start, sum(messages), sum(bytes) FROM traffic WHERE start >= ? "
                "AND (? IS NULL OR agent = ?) GROUP BY start ORDER BY start",
                (since, agent, agent),
            )
            return [(float(start), int(messages), int(octets)) for start, messages, octets in rows]

        return self._read(read, [])

    def state(self, agent: str) -> AgentState:
        """What is kept of an agent."""

        return self._read(lambda database: _state(database, agent), AgentState())

    def said(self) -> dict[str, bool]:
        """What ``enable`` or ``disable`` said, by agent, of all of which either did."""

        def read(database: sqlite3.Connection) -> dict[str, bool]:
            rows = database.execute("SELECT agent, enabled FROM agents WHERE enabled IS NOT NULL")
            return {agent: bool(enabled) for agent, enabled in rows}

        return self._read(read, {})

    def latest(self, agents: Iterable[str]) -> dict[str, tuple[AgentState, Entry | None]]:
        """What is kept of each of these agents, and its last collection, if it has had one."""
        names = tuple(agents)

        def read(database: sqlite3.Connection) -> dict[str, tuple[AgentState, Entry | None]]:
            found = {}
            for name in names:
                row = database.execute(
                    f"SELECT {_COLUMNS} FROM collections WHERE agent = ? "
                    "ORDER BY started DESC, id DESC LIMIT 1",
                    (name,),
                ).fetchone()
                found[name] = _state(database, name), Entry(*row) if row else None
            return found

        return self._read(read, {name: (AgentState(), None) for name in names})

    def history(
        self,
        agent: str | None = None,
        limit: int = 50,
        since: float | None = None,
        but: Sequence[str] = (),
        outcome: str | None = None,
    ) -> list[Entry]:
        """Past collections, newest first: of an agent, if it is given; that ended at ``since``
        (seconds since the epoch) or later; with other outcomes ``but`` these; with this
        ``outcome``, if it is given."""

        def read(database: sqlite3.Connection) -> list[Entry]:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM collections WHERE (? IS NULL OR agent = ?) "
                f"AND ended >= ? AND outcome NOT IN ({', '.join('?' for _ in but)}) "
                "AND (? IS NULL OR outcome = ?) ORDER BY started DESC, id DESC LIMIT ?",
                (
                    *(agent, agent, float("-inf") if since is None else since),
                    *(*but, outcome, outcome, limit),
                ),
            )
            return [Entry(*row) for row in rows]

        return self._read(read, [])

    # -- the file -------------------------------------------------------------------------------

    def _write(self, work: Callable[[sqlite3.Connection], None]) -> bool:
        try:
            with self._transaction("IMMEDIATE", BUSY_TIMEOUT) as database:
                work(database)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._warn("written", error)
            return False
        self._warned = False
        return True

    def _read(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result) -> Result:
        if time.monotonic() < self._look_at:
            return otherwise
        try:
            if not self._file.path.exists():
                return otherwise
            with self._transaction("DEFERRED", READ_PATIENCE) as database:
                return work(database)
        except (sqlite3.Error, OSError) as error:
            self._look_at = time.monotonic() + LOOK_AGAIN
            self._warn("read", error)
            return otherwise

    @contextlib.contextmanager
    def _transaction(self, kind: str, patience: float) -> Iterator[sqlite3.Connection]:
        """``kind``: a reader in a write-ahead log waits for no one, one that is ``IMMEDIATE`` for
        every writer."""
        database = self._file.open(patience)
        try:
            database.execute(f"BEGIN {kind}")
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
