"""Connections to the database: transactions that end in bounded time, and errors as the system's.

Everything has a limit, for whoever waits here is a sender that could be told 451: connecting, the
wait for a connection of the pool, each statement and each lock (which the server watches), and, for
a server or a network that says nothing any more, each answer (which is watched here: a connection
that is silent for too long is shut down).

Nothing is set for a whole session and nothing is prepared, so a pooler that gives each transaction
another connection may stand between.

Each statement is a round trip of its own, with what opens a transaction in one.  libpq's pipeline
mode saves some of them, and was tried: when the line is cut before the Sync that ends a pipeline
has come, the server waits for it without a limit (``idle_in_transaction_session_timeout`` does not
count yet), and what the transaction has locked stays locked.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
import psycopg_pool
from psycopg import conninfo

from salmon_revsmtp.journal.clock import since_boot
from salmon_revsmtp.provider.hold.places import without_secrets
from salmon_revsmtp.provider.hold.store import HoldStoreError

__all__ = ["ANSWER", "Answer", "Connection", "Database", "Transaction"]

Connection = psycopg.Connection[tuple[Any, ...]]

# Seconds until a host of the URL is given up, unless the URL says otherwise.
CONNECT = 5
# The pool logs each try to have a connection again.  We log when it begins to fail, and why.
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)

# Connections of a process, beside two for wake-ups; each of them costs the server some memory.
CONNECTIONS = 10
# Seconds to wait for one of them, and those that the pool tries by itself to have one again, before
# it waits to be asked.
WAIT = 5.0
TRY = 5.0
# Seconds for a statement, and for a lock that it needs; for an answer, whatever the server does.
STATEMENT, LOCK, ANSWER = 20, 10, 30
# Seconds between two looks at who waits for an answer.
LOOK = 1.0

# What a network that is cut looks like: seconds of silence until it is probed, then probes.
_TCP = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}
# Whatever is asked often finds its rows by their keys.  A server that has just seen a table empty
# believes that it is cheaper to look through all of it, and keeps that plan while it grows.  Where
# there is no other way, that looks so expensive that it would compile it first (``jit``).
_BY_KEYS = {
    **{"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"},
    "jit": "off",
}
# What each transaction has set, in seconds.
_LIMITS = {
    "statement_timeout": STATEMENT,
    "lock_timeout": LOCK,
    "idle_in_transaction_session_timeout": 2 * ANSWER,
}


class Answer:
    """What a statement was answered."""

    def __init__(self, cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
        self._cursor = cursor

    def rows(self) -> list[tuple[Any, ...]]:
        """What it has found."""
        return self._cursor.fetchall()


class Transaction:
    """A transaction that is open."""

    def __init__(self, connection: Connection, watched: dict[Connection, float]) -> None:
        self._connection, self._watched = connection, watched

    def send(self, query: str, *values: Any) -> Answer:
        """Execute a statement whose answer may be read later, also when this has ended."""
        return Answer(self._execute(query, values))

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a query finds."""
        return self._execute(query, values).fetchall()

    def run(self, query: str, *values: Any) -> int:
        """Execute a statement; returns how many rows it was about.  Without values it may be
        several statements."""
        return self._execute(query, values).rowcount

    def begin(self, settings: Mapping[str, str]) -> None:
        """Begin it, with these settings."""
        each = ", ".join(f"set_config('{one}', '{value}', true)" for one, value in settings.items())
        # Each statement is to see what is there when it begins, whatever the database's default is.
        self.run(f"BEGIN ISOLATION LEVEL READ COMMITTED; SELECT {each}")

    def commit(self) -> None:
        """End it.  When this returns it is committed."""
        if self._execute("COMMIT", ()).statusmessage != "COMMIT":
            raise psycopg.OperationalError("the transaction had failed, and was rolled back")

    def roll_back(self) -> None:
        """Undo all of it, whatever state it is in."""
        if not self._connection.closed:
            with contextlib.suppress(psycopg.Error):
                self._execute("ROLLBACK", ())

    def _execute(self, query: str, values: tuple[Any, ...]) -> psycopg.Cursor[tuple[Any, ...]]:
        self._watch()
        # One mapping gives its values by name.
        given: Any = values[0] if len(values) == 1 and isinstance(values[0], dict) else values
        return self._connection.execute(query.encode(), given or None, binary=bool(values))

    def _watch(self) -> None:
        self._watched[self._connection] = since_boot() + ANSWER


class Database:
    """The database of ``url``.  Raises :class:`HoldStoreError` when it cannot be reached.

    ``shown``        the URL for people, without its secrets.
    ``connections``  at most so many at a time.
    """

    def __init__(self, url: str, connections: int = CONNECTIONS) -> None:
        self._connections = connections
        self.shown = without_secrets(url)
        self._watched: dict[Connection, float] = {}  # until when each has to answer
        self._closing = threading.Event()
        self._refusals: deque[str] = deque(maxlen=1)  # why no connection was had the last time
        try:
            self._options = self._options_of(url)
            with contextlib.closing(self.connect()) as connection:
                self._check(connection)
        except psycopg.Error as error:
            raise HoldStoreError(
                f"opening the hold store {self.shown}: {_reason(error)}; is the database running, "
                "and is the URL right?"
            ) from None
        self._pool: psycopg_pool.ConnectionPool[Connection] = psycopg_pool.ConnectionPool(
            connection_class=_noting(self._refusals),
            kwargs=self._options,
            min_size=1,
            max_size=connections,
            timeout=WAIT,
            reconnect_timeout=TRY,
            open=True,
            name=f"hold {self.shown}",
        )
        self._watcher = threading.Thread(target=self._watch, name="hold watcher", daemon=True)
        self._watcher.start()

    def _options_of(self, url: str) -> dict[str, Any]:
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.Error:  # its text may quote a part of the password
            raise HoldStoreError(
                f"opening the hold store {self.shown}: the URL cannot be understood; it is "
                "postgresql://user:password@host:port/database, and in a password '@', '/', ':', "
                "'?', '#' and '%' are written %40, %2F, %3A, %3F, %23 and %25"
            ) from None
        defaults = {"connect_timeout": CONNECT, "application_name": "salmon-revsmtp", **_TCP}
        return {**defaults, **given, "autocommit": True, "prepare_threshold": None}

    def _check(self, connection: Connection) -> None:
        """Whether mail can be kept there.  Raises :class:`HoldStoreError`."""
        [[encoding, durable]] = connection.execute(
            "SELECT current_setting('server_encoding'), current_setting('synchronous_commit')"
        ).fetchall()
        if encoding != "UTF8":
            raise HoldStoreError(
                f"opening the hold store {self.shown}: the database is encoded in {encoding}; make "
                "one with ENCODING 'UTF8' TEMPLATE template0"
            )
        limits = {name: f"{seconds}s" for name, seconds in _LIMITS.items()}
        # What an administrator has made safer than "on" stays.
        synced = {"synchronous_commit": "on"} if durable == "off" else {}
        self._settings = {
            True: {**limits, **_BY_KEYS, **synced},
            False: {**limits, **_BY_KEYS, "synchronous_commit": "off"},
        }

    def connect(self) -> Connection:
        """A connection of one's own, which commits by itself.  Raises :class:`psycopg.Error`."""
        return psycopg.connect(**self._options)

    @contextlib.contextmanager
    def watched(self, connection: Connection) -> Iterator[None]:
        """An answer that comes later than in ``ANSWER`` seconds is an error."""
        self._watched[connection] = since_boot() + ANSWER
        try:
            yield
        finally:
            self._watched.pop(connection, None)

    @contextlib.contextmanager
    def transaction(self, synced: bool = True) -> Iterator[Transaction]:
        """One transaction; on an error nothing of it is left, unless it is the answer to its COMMIT
        that is not heard.  ``synced``: it survives the end of the server, or may be lost by it.
        Raises :class:`OSError`."""
        with self._explained():
            connection = self._connection()
            try:
                transaction = Transaction(connection, self._watched)
                try:
                    transaction.begin(self._settings[synced])
                    yield transaction
                    transaction.commit()
                except BaseException as error:
                    transaction.roll_back()
                    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
                        connection.close()  # it leads to what is a replica now
                    raise
            finally:
                self._watched.pop(connection, None)
                self._pool.putconn(connection)

    def _connection(self) -> Connection:
        """A connection of the pool.  Those that a restart of the server has ended are given back,
        and the pool makes others."""
        for left in reversed(range(self._connections + 1)):
            connection = self._pool.getconn()
            if not _has_news(connection):
                return connection
            try:
                with self.watched(connection):
                    connection.execute("SELECT")
                return connection
            except BaseException as error:
                ended = connection.closed
                self._pool.putconn(connection)
                if not (ended and left and isinstance(error, psycopg.OperationalError)):
                    raise
        raise AssertionError("not reached")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What psycopg raises, as what the system would."""
        try:
            yield
        except psycopg.Error as error:
            number = errno.ENOSPC if isinstance(error, psycopg.errors.DiskFull) else errno.EIO
            reason = _reason(error)
            if isinstance(error, psycopg_pool.PoolTimeout) and self._refusals:
                reason = self._refusals[0]
            raise OSError(number, f"the hold store {self.shown}: {reason}") from error

    def _watch(self) -> None:
        """Shut down connections whose answer does not come."""
        while not self._closing.wait(LOOK):
            now = since_boot()
            for connection, until in list(self._watched.items()):
                if now > until and self._watched.get(connection) == until:
                    self._watched.pop(connection, None)
                    _shut_down(connection)

    def close(self) -> None:
        self._closing.set()
        self._pool.close()
        self._watcher.join()


def _noting(refusals: deque[str]) -> type[Connection]:
    """Connections; why one could not be had is noted."""

    class Noting(psycopg.Connection[tuple[Any, ...]]):
        @classmethod
        def connect(cls, *arguments: Any, **options: Any) -> Any:
            try:
                connection = super().connect(*arguments, **options)
            except psycopg.Error as error:
                refusals.append(_reason(error))
                raise
            refusals.clear()
            return connection

    return Noting


def _has_news(connection: Connection) -> bool:
    """Whether the server has said something that it was not asked, such as that it ends."""
    try:
        return bool(select.select([connection.fileno()], [], [], 0)[0])
    except (psycopg.Error, ValueError):  # it is closed, or its number is too large
        return True


def _shut_down(connection: Connection) -> None:
    """Whoever waits for its answer gets an error."""
    with (
        contextlib.suppress(psycopg.Error, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as one,
    ):
        one.shutdown(socket.SHUT_RDWR)


def _reason(error: psycopg.Error) -> str:
    """In one line."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
