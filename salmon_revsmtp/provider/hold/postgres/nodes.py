"""What the hosts of a provider tell one another, through the database that they share.

``hold_session_nodes``   which processes are there: each says so twice a second
``hold_sessions``        the reversed sessions that they have
``hold_login_failures``  where passwords are guessed

A second at most passes until others know.  What has to be known sooner, such as that an account has
changed or that a session has to give way, is notified; whoever hears no notification looks twice a
second all the same.  While the database cannot be had each process goes by what it knows, and tells
the rest when it is back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import psycopg

from salmon_revsmtp.journal.clock import since_boot
from salmon_revsmtp.provider.hold.postgres.accounts import CHANNEL, open_tables
from salmon_revsmtp.provider.hold.postgres.database import Connection, Transaction
from salmon_revsmtp.provider.nodes import NodeSession, Told
from salmon_revsmtp.safelog import log_safely

__all__ = ["PostgresNodes"]

log = logging.getLogger(__name__)

# Connections for what is told, beside one to hear notifications.
CONNECTIONS = 2
# Seconds between two looks at what others say, and at the least between two that are asked for.
# Each says that accounts are what they were, which counts for a second (``provider.lookups``).
LOOK, PAUSE = 0.5, 0.05
# Seconds without a word after which a process's sessions do not count, and after which its rows go.
DEAD, BURIED = 10, 60
# Seconds between two looks for rows that nobody needs.
CLEAN = 30.0
# Seconds for which failed logins count (``provider.logins``), and those that are read twice: what
# is committed late has an earlier time than what was read.
WINDOW, OVERLAP = 900, 5
# Networks whose failures are kept until they can be told, and changes that are read at once.
MOST_NETWORKS, MOST_CHANGES = 10_000, 10_000
# The numbers of our advisory locks ("revt", "revu"): one for each account, beside the number of
# its name, and one for all.
LOCK, ALL = 0x72657674, 0x72657675

_GIVE_WAY = f"""
WITH ranked AS (
    SELECT s.node, s.number, row_number() OVER newest AS place, first_value(s.most) OVER newest AS m
    FROM hold_sessions s JOIN hold_session_nodes n ON n.id = s.node
    WHERE s.account = ANY(%s::text[]) AND n.seen > clock_timestamp() - interval '{DEAD} seconds'
    WINDOW newest AS (PARTITION BY s.account ORDER BY s.began DESC, s.node, s.number)
)
UPDATE hold_sessions s SET gives_way = true FROM ranked r
WHERE s.node = r.node AND s.number = r.number AND r.place > r.m
RETURNING s.node, s.number
"""


class PostgresNodes:
    """The hosts of a provider whose hold store is the database of ``url``.  Raises
    :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError` when that cannot be had.

    ``node``  our number.
    """

    def __init__(self, url: str) -> None:
        self._database = open_tables(url, CONNECTIONS)
        self.node = secrets.randbits(62)
        self._name = f"{socket.gethostname()} {os.getpid()}"
        self._lock = threading.Lock()
        self._open: dict[int, tuple[NodeSession, float]] = {}  # and when it began, by our clock
        self._known: set[int] = set()  # of these, those that the database was told of
        self._unknown: set[int] = set()  # and those of which it could not be told
        self._ended: set[int] = set()
        self._failures: Counter[str] = Counter()
        self._read: dict[int, float] = {}  # failures that were read, until when that is remembered
        self._read_to: float | None = None  # seconds since the epoch, by the database
        self._revision: int | None = None
        self._heard_at: float | None = None  # when the database was had last
        self._clean_at = 0.0
        self._told: Told | None = None
        self._failing = False
        self._closing = threading.Event()
        self._ring, self._bell = socket.socketpair()
        self._ring.setblocking(False)
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._work, name="hold nodes", daemon=True)

    # -- what we have ---------------------------------------------------------------------------

    def watch(self, told: Told) -> None:
        self._told = told
        with contextlib.suppress(OSError):  # it is tried again all the time
            self._look()
        self._thread.start()

    def begin(self, number: int, session: NodeSession) -> Sequence[object]:
        began = since_boot()
        with self._lock:
            self._open[number] = session, began
        try:
            with self._database.transaction(synced=False) as transaction:
                self._be_there(transaction)
                _alone(transaction, session.account)
                self._insert(transaction, number, session, began)
                replaced = self._give_way(transaction, [session.account])
        except BaseException:
            self._note_told(number, self._unknown)
            raise
        self._note_told(number, self._known)
        others = [one for one in replaced if one[0] != self.node]
        if others:
            self._notify()
        return others

    def _note_told(self, number: int, those: set[int]) -> None:
        with self._lock:
            # It may have ended meanwhile, and its row have gone before it came.
            (those if number in self._open else self._ended).add(number)

    def still_there(self, replaced: Sequence[object]) -> bool:
        nodes, numbers = zip(*replaced, strict=True)
        with self._database.transaction(synced=False) as transaction:
            [[there]] = transaction.rows(
                "SELECT EXISTS (SELECT FROM hold_sessions s JOIN hold_session_nodes n "
                "ON n.id = s.node JOIN unnest(%s::bigint[], %s::bigint[]) AS one (node, number) "
                "ON one.node = s.node AND one.number = s.number "
                f"WHERE n.seen > clock_timestamp() - interval '{DEAD} seconds')",
                *(list(nodes), list(numbers)),
            )
        return bool(there)

    def end(self, number: int) -> None:
        with self._lock:
            if self._open.pop(number, None) is not None:
                self._known.discard(number)
                self._unknown.discard(number)
                self._ended.add(number)
        self._look_soon()

    def login_failed(self, network: str) -> None:
        with self._lock:
            if network in self._failures or len(self._failures) < MOST_NETWORKS:
                self._failures[network] += 1

    def sessions(self) -> Sequence[NodeSession]:
        with self._database.transaction(synced=False) as transaction:
            rows = transaction.rows(
                "SELECT s.account, s.peer, extract(epoch FROM s.began)::double precision, s.push, "
                "s.tls, s.most, split_part(n.name, ' ', 1) FROM hold_sessions s "
                "JOIN hold_session_nodes n ON n.id = s.node WHERE s.node <> %s "
                f"AND n.seen > clock_timestamp() - interval '{DEAD} seconds' "
                "ORDER BY s.began",
                self.node,
            )
        return [NodeSession(*row) for row in rows]

    def close(self) -> None:
        self._closing.set()
        self._look_soon()
        if self._thread.is_alive():
            self._thread.join()
        if not self._failing:  # then it is found out by others that we are gone
            with (
                contextlib.suppress(OSError),
                self._database.transaction(synced=False) as transaction,
            ):
                transaction.run("DELETE FROM hold_sessions WHERE node = %s", self.node)
                transaction.run("DELETE FROM hold_session_nodes WHERE id = %s", self.node)
        self._database.close()
        self._ring.close()
        self._bell.close()

    # -- what is written ------------------------------------------------------------------------

    def _be_there(self, transaction: Transaction) -> None:
        """A session counts as long as its process does; the first word makes its row."""
        transaction.run(
            "INSERT INTO hold_session_nodes (id, name, seen) VALUES (%s, %s, clock_timestamp()) "
            "ON CONFLICT (id) DO NOTHING",
            *(self.node, self._name),
        )

    def _insert(
        self, transaction: Transaction, number: int, session: NodeSession, began: float
    ) -> None:
        transaction.run(
            "INSERT INTO hold_sessions (node, number, account, peer, began, push, tls, most) "
            "VALUES (%s, %s, %s, %s, clock_timestamp() - %s * interval '1 second', %s, %s, %s) "
            "ON CONFLICT (node, number) DO NOTHING",
            *(self.node, number, session.account, session.peer, since_boot() - began),
            *(session.push, session.tls, session.most),
        )

    def _give_way(
        self, transaction: Transaction, accounts: Collection[str]
    ) -> list[tuple[int, int]]:
        """The newest sessions of these accounts win; returns the others."""
        found = transaction.rows(_GIVE_WAY, list(accounts))
        return [(node, number) for node, number in found]

    def _notify(self) -> None:
        """Have others look now.  A NOTIFY takes a lock on all commits, so it is no part of anything
        else."""
        with contextlib.suppress(OSError), self._database.transaction(synced=False) as transaction:
            transaction.run(f"SELECT pg_notify({_CHANNEL}, '')")

    # -- what goes on all the time --------------------------------------------------------------

    def _look_soon(self) -> None:
        with contextlib.suppress(OSError):  # it is full, or closed
            self._ring.send(b"x")

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                with contextlib.closing(self._database.connect()) as connection:
                    self._listen(connection)
            except (psycopg.Error, OSError) as error:
                self._note_failure(error)
                self._wait(None)
            except Exception:  # our own bug
                log_safely(log, logging.ERROR, "hold=%s", self._database.shown, error=True)
                self._closing.wait(LOOK)

    def _listen(self, connection: Connection) -> None:
        with self._database.watched(connection):
            [[channel]] = connection.execute(f"SELECT {_CHANNEL}").fetchall()
            connection.execute(f'LISTEN "{channel}"'.encode())
        while not self._closing.is_set():
            self._look()
            self._note_failure(None)
            self._wait(connection)

    def _wait(self, connection: Connection | None) -> None:
        """Until something is notified, or asked for here, or a second is over.  Raises
        :class:`psycopg.Error` when the connection is gone."""
        waiting: list[Any] = [self._bell]
        if connection is not None:
            waiting.append(connection.fileno())
        self._closing.wait(PAUSE)
        select.select(waiting, [], [], LOOK - PAUSE)
        with contextlib.suppress(OSError):
            self._bell.recv(65536)
        if connection is not None:
            for _ in connection.notifies(timeout=0):
                pass

    def _note_failure(self, error: BaseException | None) -> None:
        """The hold store says that the database cannot be had; here it is said for a person who
        looks for details."""
        if error is not None and not self._failing:
            log.debug("hold=%s telling the other hosts: %s", self._database.shown, error)
        self._failing = error is not None

    def _look(self) -> None:
        """Say what there is to be said, and hear what others say.  Raises :class:`OSError`."""
        self._say()
        at = time.monotonic()
        with self._database.transaction(synced=False) as transaction:
            yielding = self._compare(transaction)
            heard = self._hear_failures(transaction)
            changed = self._hear_changes(transaction)
            self._clean(transaction)
        self._heard_at = since_boot()
        assert self._told is not None
        if yielding:
            self._told.gave_way(yielding)
        for network, number, ago in heard:
            self._told.logins_failed(network, number, ago)
        if changed is None or changed:
            self._told.accounts_changed(changed)
        self._told.accounts_seen(at)

    def _say(self) -> None:
        """It is a transaction of its own: whoever has rows may not wait for those who begin."""
        with self._lock:
            ended, self._ended = self._ended, set()
            failures, self._failures = self._failures, Counter()
        try:
            with self._database.transaction(synced=False) as transaction:
                transaction.run(
                    "INSERT INTO hold_session_nodes (id, name, seen) "
                    "VALUES (%s, %s, clock_timestamp()) "
                    "ON CONFLICT (id) DO UPDATE SET seen = excluded.seen",
                    *(self.node, self._name),
                )
                if ended:
                    self._delete(transaction, ended)
                if failures:
                    transaction.run(
                        "INSERT INTO hold_login_failures (node, network, failures) "
                        "SELECT %s, network, failures FROM unnest(%s::text[], %s::integer[]) "
                        "AS new (network, failures)",
                        *(self.node, list(failures), list(failures.values())),
                    )
        except BaseException:
            with self._lock:
                self._ended |= ended
                self._failures.update(failures)
            raise

    def _delete(self, transaction: Transaction, numbers: Collection[int]) -> None:
        transaction.run(
            "DELETE FROM hold_sessions WHERE node = %s AND number = ANY(%s::bigint[])",
            *(self.node, list(numbers)),
        )

    def _compare(self, transaction: Transaction) -> list[int]:
        """Have the database know our sessions; returns those that have to give way."""
        with self._lock:
            number, unknown = len(self._known), bool(self._unknown)
        [[known]] = transaction.rows(
            "SELECT count(*) FROM hold_sessions WHERE node = %s", self.node
        )
        away = self._heard_at is not None and since_boot() - self._heard_at > DEAD / 2
        if known < number or unknown or away:
            self._mend(transaction)
        rows = transaction.rows(
            "SELECT number FROM hold_sessions WHERE node = %s AND gives_way", self.node
        )
        return [number for [number] in rows]

    def _mend(self, transaction: Transaction) -> None:
        """The database has not been told of all, or had to recover and has forgotten all, or we
        were cut off from it and others have begun sessions meanwhile.  No one begins a session
        while this is done."""
        transaction.rows("SELECT pg_advisory_xact_lock(%s, 0)", ALL)
        there = {
            number
            for [number] in transaction.rows(
                "SELECT number FROM hold_sessions WHERE node = %s", self.node
            )
        }
        with self._lock:
            told = {one: self._open[one] for one in self._known | self._unknown}
        for number, (session, began) in told.items():
            if number not in there:
                self._insert(transaction, number, session, began)
        self._give_way(transaction, sorted({session.account for session, _ in told.values()}))
        with self._lock:
            self._known |= self._unknown & set(told)
            self._unknown -= set(told)

    def _hear_failures(self, transaction: Transaction) -> list[tuple[str, int, float]]:
        [[now]] = transaction.rows("SELECT extract(epoch FROM clock_timestamp())::float8")
        since = max(now - WINDOW, (self._read_to or 0.0) - OVERLAP)
        rows = transaction.rows(
            "SELECT id, network, failures, extract(epoch FROM at)::float8 FROM hold_login_failures "
            "WHERE at > to_timestamp(%s) AND node <> %s ORDER BY at",
            *(since, self.node),
        )
        new = [row for row in rows if row[0] not in self._read]
        self._read_to = now
        self._read.update((row[0], row[3]) for row in new)
        self._read = {one: at for one, at in self._read.items() if at > now - 2 * OVERLAP}
        return [(network, number, max(0.0, now - at)) for _, network, number, at in new]

    def _hear_changes(self, transaction: Transaction) -> Collection[str] | None:
        """The accounts that have changed since the last look; ``None``: any may have."""
        [[latest]] = transaction.rows("SELECT number FROM hold_account_revision")
        before, self._revision = self._revision, latest
        if before is None:
            return None
        if latest == before:
            return ()
        rows = transaction.rows(
            "SELECT account FROM hold_account_changes WHERE number > %s AND number <= %s LIMIT %s",
            *(before, latest, MOST_CHANGES),
        )
        if len(rows) < latest - before:  # some are forgotten, or it is another database
            return None
        return {name for [name] in rows}

    def _clean(self, transaction: Transaction) -> None:
        if since_boot() < self._clean_at:
            return
        self._clean_at = since_boot() + CLEAN
        transaction.run(
            "DELETE FROM hold_session_nodes "
            f"WHERE seen < clock_timestamp() - interval '{BURIED} seconds'"
        )
        transaction.run(
            "DELETE FROM hold_sessions WHERE node NOT IN (SELECT id FROM hold_session_nodes)"
        )
        transaction.run(
            "DELETE FROM hold_login_failures "
            f"WHERE at < clock_timestamp() - interval '{WINDOW} seconds'"
        )


_CHANNEL = f"'{CHANNEL}' || (SELECT oid FROM pg_namespace WHERE nspname = current_schema())"


def _alone(transaction: Transaction, account: str) -> None:
    """Sessions of one account begin one after the other, wherever they do."""
    transaction.rows(
        "SELECT pg_advisory_xact_lock_shared(%s, 0), pg_advisory_xact_lock(%s, hashtext(%s))",
        *(ALL, LOCK, account),
    )
