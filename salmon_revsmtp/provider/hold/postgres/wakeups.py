"""How a host hears at once of mail that another has taken: LISTEN and NOTIFY.

A NOTIFY takes a lock on all commits of the server until it is committed itself.  So it is not part
of a transaction that syncs: what is to be told in some milliseconds is told together, by a
connection of its own.

A wake-up may be lost, when a connection is, and a pooler that shares connections between
transactions hears none.  Whoever is woken here looks from time to time, too.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import select
import socket
import threading
from collections.abc import Callable, Collection, Sequence

import psycopg

from salmon_revsmtp.journal.clock import since_boot
from salmon_revsmtp.provider.hold.postgres.database import Connection, Database

__all__ = ["Wakeups"]

log = logging.getLogger(__name__)

# Seconds for which wake-ups are gathered.
GATHER = 0.01
# Seconds until a connection that was lost is tried again, and between two looks whether it is.
AGAIN = 1.0
# Octets of a notification; PostgreSQL takes 7,999.
OCTETS = 7000
# Notifications at a time.  More wake everyone: that is one look for each session.
MOST = 50
# What a notification is: for the accounts that follow, for all, or for ourselves.
SOME, ALL, TEST = "some", "all", "test"
# Seconds in which we hear ourselves, or someone swallows what we say.
ECHO = 5.0

#: There may be mail for these accounts; ``None``: for any.
Heard = Callable[[Collection[str] | None], None]


class Wakeups:
    """Tells others, and hears them; ``heard`` is called in a thread of its own.

    ``begun``  it hears them, or the first try to do so has failed.
    """

    def __init__(self, database: Database, channel: str, heard: Heard) -> None:
        self._database, self._channel, self._heard = database, channel, heard
        self._us = secrets.token_hex(8)
        self._waiting: set[str] = set()
        self._testing = False  # whether we hear ourselves
        self._changed = threading.Condition()
        self._closing, self.begun = threading.Event(), threading.Event()
        self._said_deaf = False
        self._end, self._ended = socket.socketpair()
        self._threads = [
            threading.Thread(target=work, name=f"hold {name}", daemon=True)
            for name, work in (("teller", self._tell_all), ("listener", self._listen))
        ]
        for one in self._threads:
            one.start()

    def tell(self, accounts: Collection[str]) -> None:
        """Have other processes woken, soon.  Does not block."""
        with self._changed:
            self._waiting.update(accounts)
            self._changed.notify()

    def close(self) -> None:
        """Tell what is to be told, and end."""
        self._closing.set()
        self._end.close()
        with self._changed:
            self._changed.notify()
        for one in self._threads:
            one.join()
        self._ended.close()

    # -- telling --------------------------------------------------------------------------------

    def _tell_all(self) -> None:
        connection: Connection | None = None
        while self._wait_for_work():
            self._closing.wait(GATHER)
            with self._changed:
                waiting, self._waiting = self._waiting, set()
                testing, self._testing = self._testing, False
            said = [*_payloads(self._us, waiting), *([f"{self._us} {TEST}"] if testing else [])]
            for _ in range(2):  # the first may find that the connection is gone
                try:
                    connection = connection or self._database.connect()
                    with self._database.watched(connection):
                        connection.execute(
                            "SELECT pg_notify(%s, one) FROM unnest(%s::text[]) AS one",
                            (self._channel, said),
                        )
                    break
                except psycopg.Error as error:
                    log.debug("hold=%s telling: %s", self._database.shown, error)
                    if connection is None:
                        break  # no one hears it; they look by themselves
                    connection.close()
                    connection = None
        if connection is not None:
            connection.close()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not self._waiting and not self._testing:
                if self._closing.is_set():
                    return False
                self._changed.wait()
            return True

    # -- hearing --------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._closing.is_set():
            try:
                with contextlib.closing(self._database.connect()) as connection:
                    self._hear(connection)
            except psycopg.Error as error:
                log.debug("hold=%s listening: %s", self._database.shown, error)
                self.begun.set()
                self._closing.wait(AGAIN)

    def _hear(self, connection: Connection) -> None:
        with self._database.watched(connection):
            connection.execute(f'LISTEN "{self._channel}"')
        self._heard(None)  # what was said meanwhile
        self.begun.set()
        with self._changed:  # a pooler may pass on what this connection says itself
            self._testing = True
            self._changed.notify()
        deaf_at = since_boot() + ECHO
        while not self._closing.is_set():
            select.select([connection.fileno(), self._ended.fileno()], [], [], AGAIN)
            for one in connection.notifies(timeout=0):
                who, _, text = one.payload.partition(" ")
                if who == self._us:
                    deaf_at = math.inf
                else:
                    self._note(text)
            if since_boot() > deaf_at:
                deaf_at = math.inf
                self._say_deaf()

    def _note(self, text: str) -> None:
        kind, *accounts = text.split("\n")
        if kind != TEST:
            self._heard(None if kind == ALL else accounts)

    def _say_deaf(self) -> None:
        if not self._said_deaf:
            self._said_deaf = True
            log.warning(
                "hold=%s notifications are swallowed, as by a pooler in transaction mode; mail "
                "that another host takes is found some seconds later",
                self._database.shown,
            )


def _payloads(us: str, accounts: Collection[str]) -> Sequence[str]:
    """What is said: who we are, and for which accounts, whose names have no control characters."""
    if not accounts:
        return []
    said = [f"{us} {SOME}"]
    for one in sorted(accounts):
        if len(said[-1].encode()) + len(one.encode()) >= OCTETS:
            said.append(f"{us} {SOME}")
        said[-1] += f"\n{one}"
    return said if len(said) <= MOST else [f"{us} {ALL}"]
