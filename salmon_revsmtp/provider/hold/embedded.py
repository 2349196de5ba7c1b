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
   But before files of messages that are gone are deleted, it is: a power cut must not bring a
   message back whose file is gone.

One process has the folder.  It is locked itself, and ``owner`` names who has it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salmon_revsmtp.files import FolderLock, give_to_owner, make_folder, sync_folder
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.journal.clock import CLOCK_TABLE, SteadyClock, since_boot
from salmon_revsmtp.journal.file import JournalFile
from salmon_revsmtp.provider.hold.records import (
    arrival_of,
    envelope_of,
    for_domains,
    recipients_of,
    said_text,
)
from salmon_revsmtp.provider.hold.spool import READ, FileSpool
from salmon_revsmtp.provider.hold.store import (
    Arrival,
    Held,
    HoldStoreError,
    Settled,
    Standing,
    State,
    Usage,
    Woken,
)
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.content import Content

__all__ = ["EmbeddedStore", "glance"]

log = logging.getLogger(__name__)

# A message of so many octets has a file of its own.  Below, a row costs less than a file and the
# syncs that it takes; above, the database would copy all of it twice.
LARGE = 128 * 1024
# SQLite copies its write-ahead log into the database, and syncs both, at so many pages of 4 KiB.
CHECKPOINT_PAGES = 4000
# Rows that are read, or written, at a time.
PAGE = 256
# Messages that are written at a time: SQLite copies them, of LARGE octets at most, before it does.
# With each statement the thread lets others run, and has to wait until they let it: so there are to
# be few.
MESSAGES_AT_A_TIME = 16
# Until the log has reached that size it grows, and a file that grows costs each sync a change of
# the file system's own journal.  So it grows by so many octets at a time at most, of zeros, which
# SQLite takes for the end.
GROWTH = 1024 * 1024
# Seconds between two notes of where the clock is.  It goes on from the last one by itself, so more
# would only be one more page to sync with every message.
NOTE_CLOCK = 60.0

MIGRATIONS = (
    """
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        sender TEXT NOT NULL,
        said TEXT NOT NULL,
        size INTEGER NOT NULL,
        file TEXT,
        streams INTEGER NOT NULL,
        ascii INTEGER NOT NULL,
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
    # From here on ``said`` may have the client, too.  An older version would fail over it at each
    # hand-over; so it is told, when it opens the store.
    "SELECT 1",
)

_HELD = (
    "SELECT held.id, account, sender, said, recipients, held.size, arrived, state, strikes, "
    "reason, warned FROM held JOIN messages ON messages.id = message "
)
# By the index, whose rows of an account and a state are in the order in which they came.
_FIRST = "(SELECT arrived FROM held WHERE account = name AND state = {:d} ORDER BY id LIMIT 1)"
_STANDINGS = (
    "WITH wanted (name) AS (VALUES {}) SELECT name, "
    f"{_FIRST.format(State.WAITING)}, {_FIRST.format(State.ASIDE)}, "
    f"(SELECT count(*) FROM held WHERE account = name AND state = {State.ASIDE:d}) FROM wanted"
)
_MESSAGES = "messages (id, sender, said, size, file, streams, ascii, body, accounts)"
_RECIPIENTS = "held (id, message, account, recipients, size, arrived)"
_USED = (
    "INSERT INTO usage (account, messages, octets) VALUES (?, ?, ?) ON CONFLICT (account) "
    "DO UPDATE SET messages = messages + excluded.messages, octets = octets + excluded.octets"
)


#: By account, how many messages and octets more are held.
_Change = dict[str, tuple[int, int]]


def glance(folder: Path) -> dict[str, tuple[int, int, int, float | None]]:
    """What is held in ``folder``, without a store being opened, so that it may be another's: by
    account the messages, their octets, how many are set aside, and when the oldest of the others
    came.  Raises :class:`OSError` where that cannot be read."""
    index = (folder / "index.sqlite3").absolute()
    if not index.exists():
        return {}
    try:
        with contextlib.closing(
            sqlite3.connect(f"{index.as_uri()}?mode=ro", uri=True, timeout=1.0)
        ) as reader:
            reader.isolation_level = None
            reader.execute("BEGIN")
            return _glanced(reader)
    except sqlite3.Error as error:
        raise HoldStoreError(f"{index}: {error}") from error


def _glanced(reader: sqlite3.Connection) -> dict[str, tuple[int, int, int, float | None]]:
    aside: Counter[str] = Counter()
    oldest: dict[str, float] = {}
    for account, state, number, first in reader.execute(
        "SELECT account, state, count(*), min(id) FROM held GROUP BY account, state"
    ).fetchall():
        if state == State.ASIDE:
            aside[account] = number
        else:
            row = reader.execute("SELECT arrived FROM held WHERE id = ?", (first,))
            [oldest[account]] = row.fetchone()
    used = reader.execute("SELECT account, messages, octets FROM usage WHERE messages > 0")
    return {account: (*row, aside[account], oldest.get(account)) for account, *row in used}


class EmbeddedStore:
    """A hold store in ``folder``, which is made if it is not there.

    Raises :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError` when it cannot be had.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bodies, self._tmp = folder / "bodies", folder / "tmp"
        self._numbers = itertools.count()
        self._clock = SteadyClock()
        self._noted = -NOTE_CLOCK
        self._synced: bool | None = None  # what the next commit would be
        self._log, self._log_size = folder / "index.sqlite3-wal", 0
        self._watchers: list[Woken] = []
        # One transaction at a time; a reader sees the last one that was committed.
        self._writing, self._reading = threading.Lock(), threading.Lock()
        # Who has which message.  What is looked up and then taken must not change in between.
        self._taking = threading.Lock()
        self._taken: dict[str, set[int]] = {}
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
        with contextlib.suppress(OSError):  # on a full disk it has the mail that can make room
            _write_private(owner, f"process {os.getpid()}\n".encode())
        index = JournalFile(self._folder / "index.sqlite3", MIGRATIONS)
        self._database = self._held.enter_context(contextlib.closing(index.open()))
        self._database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        [mode] = self._database.execute("PRAGMA journal_mode").fetchone()
        self._has_log = mode == "wal"
        self._reader = self._held.enter_context(contextlib.closing(index.open()))
        self._reader.execute("PRAGMA query_only = ON")
        for one in (self._folder, self._folder.absolute().parent):
            sync_folder(one)
        self._clock.read(self._database)
        rows = self._reader.execute("SELECT account, messages, octets FROM usage")
        self._usages = {account: Usage(*used) for account, *used in rows}
        self._message_ids, self._held_ids = self._new_ids("messages"), self._new_ids("held")
        self._sweep()

    def _new_ids(self, table: str) -> Iterator[int]:
        """Numbers that no row of a table has had."""
        row = self._reader.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,))
        [last] = row.fetchone() or (0,)
        return itertools.count(last + 1)

    def close(self) -> None:
        """Close the database and let the folder go."""
        with self._writing, self._reading:
            self._held.close()

    def now(self) -> float:
        return self._clock.now()

    def watch(self, woken: Woken) -> None:
        self._watchers.append(woken)

    # -- what comes -------------------------------------------------------------------------------

    def spool(self) -> _Spool:
        return _Spool(self._tmp / self._new_name())

    def put(self, arrivals: Sequence[Arrival]) -> Sequence[tuple[int, ...]]:
        return self._put(arrivals)

    def adopt(self, moved: Sequence[tuple[Held, bytes | Content]]) -> Sequence[int]:
        arrivals = [arrival_of(held, content, self.spool) for held, content in moved]
        return [key for [key] in self._put(arrivals, [held for held, _ in moved])]

    def leave(self) -> None:
        pass  # no other process has it before this one has ended

    def others(self) -> Sequence[str]:
        return []  # the folder is locked

    def _put(
        self, arrivals: Sequence[Arrival], as_they_were: Sequence[Held] = ()
    ) -> Sequence[tuple[int, ...]]:
        bodies: list[_Body] = []
        try:
            for one in arrivals:
                bodies.append(self._body(one))
            if any(body.file for body in bodies):
                sync_folder(self._bodies)
            with self._transaction() as database:
                self._note_clock(database)
                keys, change = self._insert(database, arrivals, bodies)
                for [key], was in zip(keys, as_they_were, strict=False):
                    database.execute(
                        "UPDATE held SET arrived = ?, state = ?, strikes = ?, reason = ?, "
                        "warned = ? WHERE id = ?",
                        (was.arrived, was.state, was.strikes, was.reason, was.warned, key),
                    )
                self._note_used(database, change)
        except BaseException:
            for body in bodies:
                if body.file is not None:
                    with contextlib.suppress(OSError):
                        body.file.unlink(missing_ok=True)
            for one in arrivals:
                if one.spool is not None:
                    one.spool.discard()
            raise
        for woken in self._watchers:
            woken(change.keys())
        return keys

    def _note_clock(self, database: sqlite3.Connection) -> None:
        now = since_boot()
        if now - self._noted >= NOTE_CLOCK:
            self._clock.note(database)
            self._noted = now

    def _insert(
        self, database: sqlite3.Connection, arrivals: Sequence[Arrival], bodies: Sequence[_Body]
    ) -> tuple[list[tuple[int, ...]], _Change]:
        """Returns the keys of each, and what it changes for whom."""
        now = self._clock.now()
        messages: list[Sequence[Any]] = []
        held: list[Sequence[Any]] = []
        keys: list[tuple[int, ...]] = []
        change: _Change = {}
        for arrival, body in zip(arrivals, bodies, strict=True):
            envelope, size = arrival.envelope, arrival.size
            accounts = dict.fromkeys(arrival.accounts)
            name = body.file.name if body.file is not None else None
            message = next(self._message_ids)
            messages.append(
                (
                    *(message, envelope.reverse_path, said_text(envelope), size),
                    *(name, body.streams, body.ascii, body.inline, len(accounts)),
                )
            )
            theirs = []
            for account in accounts:
                key = next(self._held_ids)
                theirs.append(key)
                held.append((key, message, account, recipients_of(arrival, account), size, now))
                _count(change, account, 1, size)
            keys.append(tuple(theirs))
        _insert_rows(database, _MESSAGES, messages, MESSAGES_AT_A_TIME)
        _insert_rows(database, _RECIPIENTS, held, PAGE)
        return keys, change

    def _new_name(self) -> str:
        return f"{time.time_ns():020d}-{os.getpid()}-{next(self._numbers)}"

    def _body(self, arrival: Arrival) -> _Body:
        """Where the octets of a message are: in a file that is synced, if there are many."""
        head = b"".join(arrival.content)
        if isinstance(spool := arrival.spool, _Spool):
            file = spool.keep(self._bodies)
            return _Body(file, head, spool.traits.streams, spool.traits.ascii and head.isascii())
        if arrival.spool is not None:
            head += arrival.spool.read()
        if len(head) < LARGE:
            return _Body(None, head)
        spool = self.spool()
        spool.write(head)
        return _Body(spool.keep(self._bodies), b"", spool.traits.streams, spool.traits.ascii)

    # -- what goes --------------------------------------------------------------------------------

    def load(self, keys: Sequence[int]) -> dict[int, bytes | Content]:
        places = ", ".join("?" * len(keys))
        with self._read() as database:
            rows = database.execute(
                "SELECT held.id, messages.size, body, file, streams, ascii "
                "FROM held JOIN messages ON messages.id = message "
                f"WHERE held.id IN ({places})",
                list(keys),
            ).fetchall()
        found: dict[int, bytes | Content] = {}
        for key, size, body, file, streams, ascii_ in rows:
            head = bytes(body)
            try:
                if file is None:
                    found[key] = head
                elif (self._bodies / file).stat().st_size != size - len(head):
                    self._lost(key, file, "not whole")
                elif streams:
                    found[key] = _File(head, self._bodies / file, size, bool(ascii_))
                else:
                    found[key] = head + (self._bodies / file).read_bytes()
            except FileNotFoundError:
                self._lost(key, file, "missing")
        return found

    def _lost(self, key: int, file: str, what: str) -> None:
        """A message's file is not there, or not as it was.  If it has not been settled meanwhile,
        someone did that: it is set aside for a person to see, and the account's other mail goes
        on."""
        held = self.strike(key, 0, f"its file bodies/{file} is {what}")
        if held is not None:
            log_safely(
                log,
                logging.ERROR,
                "account=%s key=%d from=%s is set aside, its file is %s: %s",
                *(held.account, key, angle(held.envelope.reverse_path), what, self._bodies / file),
            )

    def feed(self, account: str, domains: Collection[str] | None = None) -> _Feed:
        return _Feed(self, account, domains, self._taking, self._taken_of(account))

    def _taken_of(self, account: str) -> set[int]:
        with self._taking:
            return self._taken.setdefault(account, set())

    def claim(self, keys: Iterable[int]) -> dict[int, Held]:
        claimed: dict[int, Held] = {}
        try:
            for key in keys:
                if (held := self.find(key)) is None:
                    continue
                taken = self._taken_of(held.account)
                with self._taking:
                    # Whoever had it until now may have settled it, or a part of it.
                    if key in taken or (held := self.find(key)) is None:
                        continue
                    taken.add(key)
                claimed[key] = held
        except BaseException:
            self.release(claimed)
            raise
        return claimed

    def release(self, keys: Iterable[int]) -> None:
        # Whether they are still held is of no matter, and the store may be unable to say.
        released = set(keys)
        with self._taking:
            left = [name for name, taken in self._taken.items() if not taken.isdisjoint(released)]
            for name in left:
                self._taken[name].difference_update(released)
        self._begin_anew(left)

    def settle(self, done: Sequence[Settled]) -> None:
        change: _Change = {}
        gone: list[str] = []
        with self._transaction(synced=False) as database:
            for one in done:
                self._settle(database, one, change, gone)
            self._note_used(database, change)
        keys = [one.key for one in done]
        with self._taking:
            for taken in self._taken.values():
                taken.difference_update(keys)
        if not gone:
            return
        try:
            self._sync_log()
            for name in gone:
                (self._bodies / name).unlink(missing_ok=True)
        except OSError as error:  # they go when the store is opened
            log.error("hold=%s files=%d cannot be deleted: %s", self._folder, len(gone), error)

    def _settle(
        self,
        database: sqlite3.Connection,
        done: Settled,
        change: _Change,
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
        _count(change, account, -1, -size)
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
        accounts = [row[0] for row in found if row is not None]
        self._begin_anew(set(accounts))
        return len(accounts)

    def _begin_anew(self, accounts: Collection[str]) -> None:
        """Feeds of these accounts may have passed what waits again."""
        for account in accounts:
            self._rounds[account] += 1
        for woken in self._watchers if accounts else ():
            woken(accounts)

    # -- what there is ----------------------------------------------------------------------------

    def find(self, key: int) -> Held | None:
        with self._read() as database:
            row = database.execute(_HELD + "WHERE held.id = ?", (key,)).fetchone()
        return _held(row) if row is not None else None

    def listing(
        self,
        account: str | None = None,
        after: int = 0,
        messages: int = 100,
        state: State | None = None,
    ) -> Sequence[Held]:
        states = list(State) if state is None else [state]
        if account is None:
            places = ", ".join("?" * len(states))
            where = f"WHERE held.id > ? AND state IN ({places}) ORDER BY held.id LIMIT ?"
            return self._rows(where, (after, *states, messages))
        found = [
            one for each in states for one in self.page(account, each, after, messages=messages)
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

    def standings(self, accounts: Collection[str]) -> dict[str, Standing]:
        found: dict[str, Standing] = {}
        names = iter(accounts)
        while some := list(itertools.islice(names, PAGE)):
            with self._read() as database:
                query = _STANDINGS.format(", ".join(["(?)"] * len(some)))
                for name, waiting, aside, count in database.execute(query, some):
                    times = [one for one in (waiting, aside) if one is not None]
                    if times:
                        found[name] = Standing(min(times), count)
        return found

    def usages(self) -> dict[str, Usage]:
        usages = self._usages.copy()  # mail comes meanwhile, in other threads
        return {account: used for account, used in usages.items() if used.messages}

    # -- the database -----------------------------------------------------------------------------

    def _rows(self, where: str, values: Sequence[Any]) -> list[Held]:
        with self._read() as database:
            rows = database.execute(_HELD + where, values).fetchall()
        return [_held(row) for row in rows]

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._reading:
            try:
                yield self._reader
            except sqlite3.Error as error:
                raise self._explained(error) from error

    @contextlib.contextmanager
    def _transaction(self, synced: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction; on an error nothing of it is left."""
        with self._writing:
            database = self._database
            # Without a write-ahead log a commit that is not synced may spoil the database.
            synced = synced or not self._has_log
            try:
                if self._synced is not synced:
                    database.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
                    self._synced = synced
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
                if synced and self._has_log:
                    self._let_log_grow()
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                self._usages = self._usages_of(database)
                if isinstance(error, sqlite3.Error):
                    raise self._explained(error) from error
                raise

    def _usages_of(self, database: sqlite3.Connection) -> dict[str, Usage]:
        with contextlib.suppress(sqlite3.Error):
            rows = database.execute("SELECT account, messages, octets FROM usage")
            return {account: Usage(*used) for account, *used in rows}
        return self._usages

    def _note_used(self, database: sqlite3.Connection, change: _Change) -> None:
        for account, (messages, octets) in change.items():
            database.execute(_USED, (account, messages, octets))
            was = self.usage(account)
            self._usages[account] = Usage(was.messages + messages, was.octets + octets)

    def _explained(self, error: sqlite3.Error) -> OSError:
        """What SQLite raises, as what the system would."""
        number = errno.ENOSPC if "full" in str(error) else errno.EIO
        return OSError(number, f"the hold store {self._folder}: {error}")

    def _let_log_grow(self) -> None:
        """No one else writes to it meanwhile."""
        with contextlib.suppress(OSError):  # a full disk, for one: then SQLite has it grow, or not
            if (size := self._log.stat().st_size) <= self._log_size:
                return
            self._log_size = size + min(size, GROWTH)
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(descriptor, bytes(self._log_size - size), size)
            finally:
                os.close(descriptor)

    def _sync_log(self) -> None:
        """What has been committed survives a power cut."""
        with contextlib.suppress(FileNotFoundError):  # without a log each commit is synced
            descriptor = os.open(self._log, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

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


@dataclass(frozen=True)
class _Body:
    """Where a message's octets are.

    ``file``    those after ``inline``, if there are many.
    ``inline``  the first, or all.
    ``streams``, ``ascii``  see :class:`~salmon_revsmtp.smtp.content.Traits`.
    """

    file: Path | None
    inline: bytes
    streams: bool = False
    ascii: bool = False


class _Spool(FileSpool):
    """A file under ``tmp/`` that gets a name in ``bodies/``."""

    def keep(self, folder: Path) -> Path:
        """Sync it, and give it a name in ``folder``, which is not synced.  Raises
        :class:`OSError`."""
        try:
            self.check()
            assert self.descriptor is not None
            os.fsync(self.descriptor)
            there = folder / self.path.name
            self.path.rename(there)
        except BaseException:
            self.discard()
            raise
        os.close(self.descriptor)
        self.descriptor = None
        return there


class _File:
    """A message that is sent from its file."""

    def __init__(self, head: bytes, path: Path, size: int, ascii_: bool) -> None:
        self.size, self.ascii = size, ascii_
        self._head, self._path = head, path

    def pieces(self) -> Iterator[bytes]:
        yield self._head
        with self._path.open("rb", buffering=0) as file:
            while piece := file.read(READ):
                yield piece

    def beginning(self, octets: int) -> bytes:
        with self._path.open("rb") as file:
            return (self._head + file.read(octets))[:octets]


class _Feed:
    """A feed; ``taken`` is what all feeds of the account and those who claim its mail have, to be
    changed under ``taking``."""

    __slots__ = (
        "_account",
        "_after",
        "_domains",
        "_ours",
        "_restart",
        "_round",
        "_store",
        "_taken",
        "_taking",
    )

    def __init__(
        self,
        store: EmbeddedStore,
        account: str,
        domains: Collection[str] | None,
        taking: threading.Lock,
        taken: set[int],
    ) -> None:
        self._store, self._account, self._domains = store, account, domains
        self._taking, self._taken = taking, taken
        self._ours: set[int] = set()
        self._after = 0
        self._round = 0
        self._restart = False

    def take(self, messages: int, octets: int) -> Sequence[Held]:
        now, self._restart, restart = self._store.round(self._account), False, self._restart
        if restart or self._round != now:
            self._round, self._after = now, 0
        found: list[Held] = []
        more = True
        while more and len(found) < messages and octets > 0:
            # What is read before another settles it is still taken when it is looked at.
            with self._taking:
                page = self._store.page(self._account, State.WAITING, self._after, PAGE)
                for wanted in self._free(page, messages - len(found), octets):
                    found.append(wanted)
                    octets -= wanted.size
            more = len(page) == PAGE
        return found

    def _free(self, page: Sequence[Held], messages: int, octets: int) -> Iterator[Held]:
        """Take what no one has."""
        for one in page:
            if messages <= 0 or octets <= 0:
                return
            self._after = one.key
            wanted = for_domains(one, self._domains) if one.key not in self._taken else None
            if wanted is not None:
                self._taken.add(one.key)
                self._ours.add(one.key)
                messages -= 1
                octets -= one.size
                yield wanted

    def has(self, key: int) -> bool:
        return key in self._ours

    def leave(self, keys: Iterable[int]) -> None:
        self._ours.difference_update(keys)

    def start_over(self) -> None:
        self._restart = True

    def close(self) -> None:
        self._taken.difference_update(self._ours)
        self._ours.clear()


def _count(change: _Change, account: str, messages: int, octets: int) -> None:
    before = change.get(account, (0, 0))
    change[account] = before[0] + messages, before[1] + octets


@functools.lru_cache(maxsize=2 * PAGE)
def _inserting(into: str, rows: int) -> str:
    row = f"({', '.join('?' * (into.count(',') + 1))})"
    return f"INSERT INTO {into} VALUES {', '.join([row] * rows)}"


def _insert_rows(
    database: sqlite3.Connection, into: str, rows: Sequence[Sequence[Any]], at_a_time: int
) -> None:
    for start in range(0, len(rows), at_a_time):
        some = rows[start : start + at_a_time]
        database.execute(_inserting(into, len(some)), [value for row in some for value in row])


def _held(row: Sequence[Any]) -> Held:
    key, account, sender, said, recipients, size, arrived, state, strikes, reason, warned = row
    envelope = envelope_of(sender, said, json.loads(recipients))
    numbers = (size, arrived, State(state), strikes)
    return Held(key, account, envelope, *numbers, reason, bool(warned))


def _write_private(path: Path, *pieces: bytes) -> None:
    """A new file, for its owner only, synced; its name is not."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        give_to_owner(path)
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error)
