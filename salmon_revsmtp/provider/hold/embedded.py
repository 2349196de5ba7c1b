"""The embedded hold store: SQLite for what is held, files for large messages, in one folder.

``index.sqlite3``  what is held for whom, and the messages themselves up to some size
``bodies/``        the others, a file each
``tmp/``           files that are being written

The order of writes, so that a crash at any instruction loses nothing:

1. A large message's file is written under ``tmp/``, synced, renamed into ``bodies/``, and
   ``bodies/`` is synced.
2. Everything that came together is committed together, with one sync of SQLite's write-ahead log.
   Only then is it held.  A crash before leaves at most a file that nothing refers to, which goes
   when the store is opened.
3. Recipients that are settled are struck off in one transaction.  It is not synced by itself, for
   at worst a power cut brings a message back (RFC 1047's duplicate); the next sync includes it.
   Files of messages that are gone are deleted after that.

One process has the folder.  It is locked itself, and ``owner`` names who has it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from salmon_revsmtp.files import FolderLock, make_folder, sync_folder
from salmon_revsmtp.journal.clock import CLOCK_TABLE, SteadyClock
from salmon_revsmtp.journal.file import JournalFile
from salmon_revsmtp.provider.hold.store import (
    Arrival,
    Held,
    HoldStoreError,
    Settled,
    State,
    Usage,
    Woken,
)
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["EmbeddedStore"]

log = logging.getLogger(__name__)

# A message of so many octets has a file of its own.  Below, a row costs less than a file and the
# syncs that it takes; above, the database would copy all of it twice.
LARGE = 128 * 1024
# SQLite copies its write-ahead log into the database, and syncs both, at so many pages of 4 KiB.
CHECKPOINT_PAGES = 4000
# Rows that are read at a time.
PAGE = 256

MIGRATIONS = (
    """
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        sender TEXT NOT NULL,
        said TEXT NOT NULL,
        size INTEGER NOT NULL,
        file TEXT,
        body BLOB,
        accounts INTEGER NOT NULL
    );
    CREATE INDEX messages_by_file ON messages (file) WHERE file IS NOT NULL;
    CREATE TABLE held (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        message INTEGER NOT NULL,
        account TEXT NOT NULL,
        recipients TEXT NOT NULL,
        size INTEGER NOT NULL,
        arrived REAL NOT NULL,
        state INTEGER NOT NULL DEFAULT 0,
        strikes INTEGER NOT NULL DEFAULT 0,
        reason TEXT NOT NULL DEFAULT '',
        warned INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX held_by_account ON held (account, state, id);
    CREATE TABLE usage (
        account TEXT PRIMARY KEY,
        messages INTEGER NOT NULL,
        octets INTEGER NOT NULL
    ) WITHOUT ROWID;
    """,
    CLOCK_TABLE,
)

_HELD = (
    "SELECT held.id, account, sender, said, recipients, held.size, arrived, state, strikes, "
    "reason, warned FROM held JOIN messages ON messages.id = message "
)
_USED = (
    "INSERT INTO usage (account, messages, octets) VALUES (?, ?, ?) ON CONFLICT (account) "
    "DO UPDATE SET messages = messages + excluded.messages, octets = octets + excluded.octets"
)


class EmbeddedStore:
    """A hold store in ``folder``, which is made if it is not there.

    Raises :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError` when it cannot be had.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bodies, self._tmp = folder / "bodies", folder / "tmp"
        self._numbers = itertools.count()
        self._clock = SteadyClock()
        self._watchers: list[Woken] = []
        # One transaction at a time; a reader sees the last one that was committed.
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._taken: dict[str, set[int]] = {}
        self.taking = threading.Lock()  # one feed at a time looks what waits, and takes it
        self._rounds: Counter[str] = Counter()  # whose feeds begin anew when it has changed
        self._usages: dict[str, Usage] = {}
        self._held = contextlib.ExitStack()
        try:
            self._open()
        except BaseException as error:
            self._held.close()
            if isinstance(error, OSError | sqlite3.Error) and not isinstance(error, HoldStoreError):
                raise HoldStoreError(
                    f"opening the hold store {folder}: {_reason(error)}"
                ) from error
            raise

    def _open(self) -> None:
        for one in (self._folder, self._bodies, self._tmp):
            make_folder(one)
        lock = self._held.enter_context(FolderLock(self._folder).hold())
        owner = self._folder / "owner"
        if not lock.had:
            with contextlib.suppress(OSError):
                who = owner.read_text().strip()
            raise HoldStoreError(
                f"opening the hold store {self._folder}: {who or 'another process'} has it; one "
                "process uses a hold store at a time, so end that one, or ask it"
            )
        _write_private(owner, f"process {os.getpid()}\n".encode())
        index = JournalFile(self._folder / "index.sqlite3", MIGRATIONS)
        self._database = self._held.enter_context(contextlib.closing(index.open()))
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        self._reader = self._held.enter_context(contextlib.closing(index.open()))
        self._reader.execute("PRAGMA query_only = ON")
        for one in (self._folder, self._folder.absolute().parent):
            sync_folder(one)
        self._clock.read(self._database)
        rows = self._reader.execute("SELECT account, messages, octets FROM usage")
        self._usages = {account: Usage(*used) for account, *used in rows}
        self._sweep()

    def close(self) -> None:
        """Close the database and let the folder go."""
        with self._writing, self._reading:
            self._held.close()

    def now(self) -> float:
        return self._clock.now()

    def watch(self, woken: Woken) -> None:
        self._watchers.append(woken)

    # -- what comes -------------------------------------------------------------------------------

    def put(self, arrivals: Sequence[Arrival]) -> Sequence[tuple[int, ...]]:
        files: list[Path | None] = []
        used: Counter[str] = Counter()
        octets: Counter[str] = Counter()
        try:
            for one in arrivals:
                files.append(self._write_body(one) if one.size >= LARGE else None)
            if any(files):
                sync_folder(self._bodies)
            with self._transaction() as database:
                self._clock.note(database)
                keys = [
                    self._insert(database, one, file, used, octets)
                    for one, file in zip(arrivals, files, strict=True)
                ]
                self._note_used(database, used, octets)
        except BaseException:
            for file in filter(None, files):
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)
            raise
        for woken in self._watchers:
            woken(used.keys())
        return keys

    def _insert(
        self,
        database: sqlite3.Connection,
        arrival: Arrival,
        file: Path | None,
        used: Counter[str],
        octets: Counter[str],
    ) -> tuple[int, ...]:
        envelope, size = arrival.envelope, arrival.size
        accounts = dict.fromkeys(arrival.accounts)
        body = None if file else b"".join(arrival.content)
        message = database.execute(
            "INSERT INTO messages (sender, said, size, file, body, accounts) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                envelope.reverse_path,
                _said(envelope),
                *(size, file and file.name, body, len(accounts)),
            ),
        ).lastrowid
        keys = []
        now = self._clock.now()
        for account in accounts:
            theirs = [
                [one, envelope.rcpt_options.get(one)]
                for one, whose in zip(envelope.recipients, arrival.accounts, strict=True)
                if whose == account
            ]
            held = database.execute(
                "INSERT INTO held (message, account, recipients, size, arrived) "
                "VALUES (?, ?, ?, ?, ?)",
                (message, account, json.dumps(theirs), size, now),
            )
            keys.append(held.lastrowid or 0)
            used[account] += 1
            octets[account] += size
        return tuple(keys)

    def _write_body(self, arrival: Arrival) -> Path:
        name = f"{time.time_ns():020d}-{os.getpid()}-{next(self._numbers)}"
        path = self._tmp / name
        try:
            _write_private(path, *arrival.content)
            there = self._bodies / name
            path.rename(there)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        return there

    # -- what goes --------------------------------------------------------------------------------

    def load(self, keys: Sequence[int]) -> dict[int, bytes]:
        places = ", ".join("?" * len(keys))
        with self._read() as database:
            rows = database.execute(
                "SELECT held.id, body, file FROM held JOIN messages ON messages.id = message "
                f"WHERE held.id IN ({places})",
                list(keys),
            ).fetchall()
        found = {}
        for key, body, file in rows:
            try:
                found[key] = bytes(body) if file is None else (self._bodies / file).read_bytes()
            except FileNotFoundError:
                if self.find(key) is not None:
                    raise  # and not settled meanwhile
        return found

    def feed(self, account: str, domains: Collection[str] | None = None) -> _Feed:
        with self.taking:
            taken = self._taken.setdefault(account, set())
        return _Feed(self, account, domains, taken)

    def settle(self, done: Sequence[Settled]) -> None:
        used: Counter[str] = Counter()
        octets: Counter[str] = Counter()
        gone: list[str] = []
        with self._transaction(synced=False) as database:
            for one in done:
                self._settle(database, one, used, octets, gone)
            self._note_used(database, used, octets)
        with self.taking:
            for taken in self._taken.values():
                taken.difference_update(one.key for one in done)
        for name in gone:
            try:
                (self._bodies / name).unlink(missing_ok=True)
            except OSError as error:  # it goes when the store is opened
                log.error("hold=%s file=%s cannot be deleted: %s", self._folder, name, error)

    def _settle(
        self,
        database: sqlite3.Connection,
        done: Settled,
        used: Counter[str],
        octets: Counter[str],
        gone: list[str],
    ) -> None:
        row = database.execute(
            "SELECT message, account, recipients, size FROM held WHERE id = ?", (done.key,)
        ).fetchone()
        if row is None:
            return
        message, account, recipients, size = row
        left = [one for one in json.loads(recipients) if one[0] not in done.recipients]
        if left:
            database.execute(
                "UPDATE held SET recipients = ?, reason = ? WHERE id = ?",
                (json.dumps(left), done.reason, done.key),
            )
            return
        used[account] -= 1
        octets[account] -= size
        database.execute("DELETE FROM held WHERE id = ?", (done.key,))
        database.execute("UPDATE messages SET accounts = accounts - 1 WHERE id = ?", (message,))
        over = database.execute(
            "DELETE FROM messages WHERE id = ? AND accounts <= 0 RETURNING file", (message,)
        ).fetchone()
        if over is not None and over[0] is not None:
            gone.append(over[0])

    # -- what does not go -------------------------------------------------------------------------

    def strike(self, key: int, most: int, reason: str) -> Held | None:
        with self._transaction(synced=False) as database:
            database.execute(
                "UPDATE held SET strikes = strikes + 1, reason = ?, "
                "state = CASE WHEN strikes + 1 >= ? THEN ? ELSE state END WHERE id = ?",
                (reason, most, State.ASIDE, key),
            )
        return self.find(key)

    def note_warned(self, key: int) -> None:
        with self._transaction() as database:
            database.execute("UPDATE held SET warned = 1 WHERE id = ?", (key,))

    def retry(self, keys: Iterable[int]) -> int:
        with self._transaction(synced=False) as database:
            found = [
                database.execute(
                    "UPDATE held SET state = ?, strikes = 0, reason = '' WHERE id = ? "
                    "RETURNING account",
                    (State.WAITING, key),
                ).fetchone()
                for key in keys
            ]
        accounts = {row[0] for row in found if row is not None}
        for account in accounts:
            self._rounds[account] += 1
        for woken in self._watchers:
            woken(accounts)
        return len([row for row in found if row is not None])

    # -- what there is ----------------------------------------------------------------------------

    def find(self, key: int) -> Held | None:
        with self._read() as database:
            row = database.execute(_HELD + "WHERE held.id = ?", (key,)).fetchone()
        return _held(row) if row is not None else None

    def listing(
        self, account: str | None = None, after: int = 0, messages: int = 100
    ) -> Sequence[Held]:
        if account is None:
            where, values = "WHERE held.id > ? ORDER BY held.id LIMIT ?", (after, messages)
            return self._rows(where, values)
        found = [
            one
            for state in State
            for one in self.page(account, state, after=after, messages=messages)
        ]
        return sorted(found, key=lambda one: one.key)[:messages]

    def round(self, account: str) -> int:
        """A number that changes when messages wait again that did not."""
        return self._rounds[account]

    def page(self, account: str, state: State, after: int, messages: int) -> list[Held]:
        """Messages of an account in one state, from after a key."""
        where = "WHERE account = ? AND state = ? AND held.id > ? ORDER BY held.id LIMIT ?"
        return self._rows(where, (account, state, after, messages))

    def usage(self, account: str) -> Usage:
        return self._usages.get(account, Usage())

    def usages(self) -> dict[str, Usage]:
        return {account: used for account, used in self._usages.items() if used.messages}

    # -- the database -----------------------------------------------------------------------------

    def _rows(self, where: str, values: Sequence[Any]) -> list[Held]:
        with self._read() as database:
            rows = database.execute(_HELD + where, values).fetchall()
        return [_held(row) for row in rows]

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._reading, self._explained():
            yield self._reader

    @contextlib.contextmanager
    def _transaction(self, synced: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction; on an error nothing of it is left."""
        with self._writing, self._explained():
            database = self._database
            database.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                self._usages = self._usages_of(database)
                raise

    def _usages_of(self, database: sqlite3.Connection) -> dict[str, Usage]:
        with contextlib.suppress(sqlite3.Error):
            rows = database.execute("SELECT account, messages, octets FROM usage")
            return {account: Usage(*used) for account, *used in rows}
        return self._usages

    def _note_used(
        self, database: sqlite3.Connection, used: Mapping[str, int], octets: Mapping[str, int]
    ) -> None:
        for account, messages in used.items():
            database.execute(_USED, (account, messages, octets[account]))
            was = self.usage(account)
            self._usages[account] = Usage(was.messages + messages, was.octets + octets[account])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What SQLite raises, as what the system would."""
        try:
            yield
        except sqlite3.Error as error:
            full = "full" in str(error)
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, f"the hold store {self._folder}: {error}") from error

    def _sweep(self) -> None:
        """Delete what a crash has left: files that nothing refers to."""
        for path in self._tmp.iterdir():
            path.unlink(missing_ok=True)
        for path in self._bodies.iterdir():
            known = self._reader.execute(
                "SELECT 1 FROM messages WHERE file = ?", (path.name,)
            ).fetchone()
            if known is None:
                path.unlink(missing_ok=True)


class _Feed:
    """A feed; ``taken`` is what all feeds of the account have."""

    def __init__(
        self,
        store: EmbeddedStore,
        account: str,
        domains: Collection[str] | None,
        taken: set[int],
    ) -> None:
        self._store, self._account, self._domains = store, account, domains
        self._taken = taken
        self._ours: set[int] = set()
        self._after = 0
        self._round = 0
        self._restart = False

    def take(self, messages: int, octets: int) -> Sequence[Held]:
        now, self._restart, restart = self._store.round(self._account), False, self._restart
        if restart or self._round != now:
            self._round, self._after = now, 0
        found: list[Held] = []
        while len(found) < messages and octets > 0:
            with self._store.taking:
                page = self._store.page(self._account, State.WAITING, self._after, PAGE)
                for one in page:
                    if len(found) >= messages or octets <= 0:
                        break
                    self._after = one.key
                    if one.key in self._taken:
                        continue
                    wanted = self._wanted(one)
                    if wanted is not None:
                        self._taken.add(one.key)
                        self._ours.add(one.key)
                        found.append(wanted)
                        octets -= one.size
            if len(page) < PAGE:
                break
        return found

    def _wanted(self, held: Held) -> Held | None:
        """A message for its recipients in the domains that were asked for, if it has any."""
        if self._domains is None:
            return held
        envelope = held.envelope
        recipients = tuple(one for one in envelope.recipients if domain_of(one) in self._domains)
        if recipients == envelope.recipients:
            return held
        if not recipients:
            return None
        return replace(held, envelope=replace(envelope, recipients=recipients))

    def leave(self, keys: Iterable[int]) -> None:
        self._ours.difference_update(keys)

    def start_over(self) -> None:
        self._restart = True

    def close(self) -> None:
        self._taken.difference_update(self._ours)
        self._ours.clear()


def _said(envelope: Envelope) -> str:
    """What the client said beside the addresses."""
    return json.dumps([dict(envelope.mail_options), envelope.helo, envelope.esmtp])


def _envelope(sender: str, said: str, recipients: Sequence[tuple[str, Any]]) -> Envelope:
    options, helo, esmtp = json.loads(said)
    names = tuple(one for one, _ in recipients)
    each = {one: said for one, said in recipients if said is not None}
    return Envelope(sender, names, options, each, helo, esmtp)


def _held(row: Sequence[Any]) -> Held:
    key, account, sender, said, recipients, size, arrived, state, strikes, reason, warned = row
    envelope = _envelope(sender, said, [(one, options) for one, options in json.loads(recipients)])
    numbers = (size, arrived, State(state), strikes)
    return Held(key, account, envelope, *numbers, reason, bool(warned))


def _write_private(path: Path, *pieces: bytes) -> None:
    """A new file, for its owner only, synced; its name is not."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error)
