"""Which processes are alive: each has a row, and says again and again, in a row of another table,
that it is there.

What a process takes has the number of its row.  Whoever is not heard of in time loses its row, and
with it, in that instant, all that it has: a message is free when its number is no one's.  So no one
has to go through the messages of the dead, and a process that was only cut off finds that it has
nothing when it comes back; it gets another number.

When the server crashes, or a replica takes its place, what was settled in the last moments may be
held again, as taken by a process that has forgotten it.  So these tables are such that are empty
then: no one has anything any more, and all begin anew.

Until then it must not send what it has.  It cannot ask, so it goes by its own clock: the time runs
from before its last word to the database, and ends a while before the row goes.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading

from salmon_revsmtp.journal.clock import since_boot
from salmon_revsmtp.provider.hold.postgres.database import Answer, Database, Transaction

__all__ = ["FREE", "LEASE", "Lease"]

log = logging.getLogger(__name__)

# Seconds without a word after which a process has nothing any more; that much later its messages
# go to another.
LEASE = 30.0
# Seconds before that from which it does not trust its own clock.
MARGIN = 5.0
# Bits of a process's number; none is ever used again.
NUMBER = 62

#: Whether a row of ``hold_queue`` is no one's.
FREE = "(node IS NULL OR NOT EXISTS (SELECT FROM hold_nodes WHERE hold_nodes.id = node))"


class Lease:
    """Ours.

    ``node``  our number; ``None`` while we have none.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._name = f"{socket.gethostname()} {os.getpid()}"
        self._lock = threading.Lock()
        self._until = 0.0
        self.node: int | None = None

    def holds(self, node: int) -> bool:
        """What was taken under this number is surely ours still."""
        return node == self.node and since_boot() < self._until

    def ask(self, transaction: Transaction, node: int) -> Leased:
        """Have our number stay ours until the end of the transaction, if it is.  Raises
        :class:`LeaseLostError` if it is known not to be."""
        if node != self.node:
            raise LeaseLostError("this process has another number by now")
        found = transaction.send("SELECT FROM hold_nodes WHERE id = %s FOR KEY SHARE", node)
        return Leased(found)

    def ours(self, transaction: Transaction) -> int:
        """Our number, which stays ours until the end of the transaction.  Raises
        :class:`LeaseLostError`."""
        if (node := self.node) is None:
            raise LeaseLostError("this process was not heard of for too long")
        self.ask(transaction, node).check()
        return node

    def renew(self) -> bool:
        """Say that we are there; whether all that we had is still ours.  Raises
        :class:`OSError`."""
        with self._lock:
            asked, had = since_boot(), self.node
            with self._database.transaction(synced=False) as transaction:
                kept = had is not None and transaction.run(
                    "UPDATE hold_heard SET expires = clock_timestamp() + %s * interval '1 second' "
                    "WHERE id = %s",
                    *(LEASE, had),
                )
                node = had
                if not kept:
                    node = secrets.randbits(NUMBER)
                    transaction.send(
                        "INSERT INTO hold_nodes (id, name, expires) VALUES (%s, %s, 'infinity')",
                        *(node, self._name),
                    )
                    transaction.send(
                        "INSERT INTO hold_heard (id, expires) "
                        "VALUES (%s, clock_timestamp() + %s * interval '1 second')",
                        *(node, LEASE),
                    )
            self.node, self._until = node, asked + LEASE - MARGIN
        if had is not None and not kept:
            log.warning(
                "hold=%s this process was not heard of for %g seconds, or the database had to "
                "recover; what it had is anyone's",
                *(self._database.shown, LEASE),
            )
        return bool(kept)

    def end_dead(self) -> list[str]:
        """End the leases of those who were not heard of; returns their names.  Raises
        :class:`OSError`."""
        with self._database.transaction(synced=False) as transaction:
            # Programs of the version before have it in hold_nodes until when they are there.
            gone = transaction.rows(
                "WITH dead AS (DELETE FROM hold_heard WHERE expires < clock_timestamp() "
                "RETURNING id) DELETE FROM hold_nodes WHERE expires < clock_timestamp() "
                "OR id IN (SELECT id FROM dead) RETURNING name"
            )
        for [name] in gone:
            log.warning("hold=%s node=%r is not heard of", self._database.shown, name)
        return [name for [name] in gone]

    def end(self) -> None:
        """We are gone, and what we had is anyone's.  Raises :class:`OSError`."""
        with self._lock, self._database.transaction(synced=False) as transaction:
            transaction.send("DELETE FROM hold_nodes WHERE id = %s", self.node)
            transaction.send("DELETE FROM hold_heard WHERE id = %s", self.node)
            self.node = None


class Leased:
    """Whether our number is ours, when that is answered."""

    def __init__(self, found: Answer) -> None:
        self._found = found

    def check(self) -> None:
        """Raises :class:`LeaseLostError` if it is not."""
        if not self._found.rows():
            raise LeaseLostError("this process was not heard of for too long")


class LeaseLostError(Exception):
    """What we had is anyone's; get another number, and begin anew."""
