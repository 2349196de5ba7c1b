"""The hold store on PostgreSQL: many processes on many hosts have one.

Who has a message is in the database: ``hold_queue.node`` is the process, and ``ticket`` the feed or
the claim in it.  A process takes messages with FOR UPDATE SKIP LOCKED, so that none waits for
another, and has them until it settles them, lets them go, or is not heard of (``lease``).

The order of things, so that a failure at any instant loses nothing:

1. All that came together is one transaction, which the server has synced when it answers: the
   pieces of large messages, the messages, and last what is held for whom.  Where that answer is not
   heard the sender hears 451.  The mail may be kept then, and comes again (RFC 1047's duplicate).
2. What is settled, taken or let go is not synced by itself.  At worst the end of the server brings
   a message back, and never one of whose octets a part is gone: both are in the same log.
3. An answer counts when no one else has the message at that time: it is the customer's own word.
   Where another process has it, that one will hear an answer, too, and nothing is done.

A message that is large comes into a file of this host, which has no name, and goes from there into
the database in pieces; when it is sent, the same way back.  The event loop never waits for the
database.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import secrets
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salmon_revsmtp.files import make_folder
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.journal.clock import since_boot
from salmon_revsmtp.provider.hold.postgres import reading
from salmon_revsmtp.provider.hold.postgres.database import ANSWER, Database, Transaction
from salmon_revsmtp.provider.hold.postgres.lease import FREE, Lease, LeaseLostError
from salmon_revsmtp.provider.hold.postgres.reading import Reading
from salmon_revsmtp.provider.hold.postgres.schema import migrate
from salmon_revsmtp.provider.hold.postgres.usages import Usages
from salmon_revsmtp.provider.hold.postgres.wakeups import Wakeups
from salmon_revsmtp.provider.hold.records import (
    arrival_of,
    envelope_of,
    for_domains,
    recipients_of,
    said_text,
)
from salmon_revsmtp.provider.hold.spool import FileSpool
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
from salmon_revsmtp.smtp.content import Content, Traits

__all__ = ["PostgresStore"]

log = logging.getLogger(__name__)

# A message of so many octets is kept in pieces, apart from the rows that come and go.
LARGE = 64 * 1024
# Octets of a piece.
PIECE = 256 * 1024
# Rows that are looked at together.
PAGE = 256
# Above all keys; and what no message has.
ALL, NO_STATE = 1 << 62, -1
# Seconds between two readings of what is held, for quotas.
READ_USAGES = 2.0
# Seconds after which the changes of what is held are added up, and how many are so before that.
COUNT = 60.0
CHANGES = 20_000
# Seconds between two words to the database that we are there, and between two looks for mail of
# which no wake-up was heard.
RENEW = 5.0
# Seconds between two looks whether it is time for one of these.
TICK = 0.5
# Seconds of the database's clock that are believed to have passed since it was looked at.
LONGEST_PAUSE = 86400.0

_HELD = (
    "SELECT q.id, q.account, m.sender, m.said, q.recipients, q.size, q.arrived, q.state, "
    "q.strikes, q.reason, q.warned FROM hold_queue q JOIN hold_messages m ON m.id = q.message "
)
# By the index, whose rows of an account and a state are in the order in which they came.
_STANDINGS = (
    "SELECT name, (SELECT min(first.arrived) FROM unnest(%s::smallint[]) AS each, LATERAL "
    "(SELECT arrived FROM hold_queue WHERE account = name AND state = each ORDER BY id LIMIT 1) "
    "AS first), (SELECT count(*) FROM hold_queue WHERE account = name AND state = %s) "
    "FROM unnest(%s::text[]) AS name"
)
# What a feed may take: of what it has read past, and of what comes after that.  What is set aside
# is kept in mind, for it may wait again at any time.
_PAGE = (
    "WITH page AS MATERIALIZED ("
    "(SELECT id, false AS after FROM hold_queue WHERE id = ANY(%(left)s::bigint[])) UNION "
    "(SELECT id, false FROM hold_queue WHERE account = %(account)s AND state = %(aside)s "
    "AND id <> ALL(%(left)s::bigint[]) ORDER BY id LIMIT %(most)s) UNION ALL "
    "(SELECT id, true FROM hold_queue WHERE account = %(account)s AND state = %(waiting)s "
    "AND id > %(after)s AND id <> ALL(%(done)s::bigint[]) ORDER BY id LIMIT %(number)s)"
    f"), free AS ({_HELD} WHERE q.id IN (SELECT id FROM page) AND q.state = %(waiting)s "
    f"AND {FREE} FOR UPDATE OF q SKIP LOCKED) "
    "SELECT page.after, page.id, free.* FROM page LEFT JOIN free ON free.id = page.id "
    "ORDER BY page.id"
)
_TICK = (
    "UPDATE hold_clock SET now = now + least(greatest(w - wall, 0), %s), wall = w "
    "FROM (SELECT extract(epoch FROM clock_timestamp())::double precision AS w) AS clock "
    "RETURNING now"
)


class PostgresStore:
    """A hold store in the database of ``url``, whose tables are made if they are not there.

    ``folder``  for large messages, on their way; it is made if it is not there.

    Raises :class:`~salmon_revsmtp.provider.hold.store.HoldStoreError` when it cannot be had.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._tmp = folder / "tmp"
        self._numbers = itertools.count(1)
        self._watchers: list[Woken] = []
        self._usages = Usages()
        self._feeds: weakref.WeakSet[_Feed] = weakref.WeakSet()
        self._readings: dict[str, Reading] = {}  # how far the last feed of an account had read
        self._having: dict[int, _Feed] = {}  # who has taken a message, until it is settled
        self._claims: dict[int, _Ticket] = {}
        # What is to be let go, and is not yet: the database may not have been there.
        self._letting_go: list[tuple[_Ticket, set[int]]] = []
        self._releasing, self._lists = threading.Lock(), threading.Lock()
        self._closing, self._attention = threading.Event(), threading.Event()
        self._clock = time.time(), since_boot()
        self._counted = since_boot()
        self._failing = False
        with contextlib.ExitStack() as opened:
            self._database = Database(url)
            opened.callback(self._database.close)
            try:
                make_folder(self._tmp)
                with self._database.transaction() as transaction:
                    migrate(transaction, self._database.shown)
                    [[channel]] = transaction.rows(
                        "SELECT 'salmon_revsmtp_' || oid FROM pg_namespace "
                        "WHERE nspname = current_schema()"
                    )
                self._lease = Lease(self._database)
                self._lease.renew()
                self._tick()
                self._read_usages()
            except OSError as error:
                if isinstance(error, HoldStoreError):
                    raise
                raise HoldStoreError(
                    f"opening the hold store {self._database.shown}: {error}"
                ) from error
            opened.pop_all()
        self._wakeups = Wakeups(self._database, channel, self._heard)
        self._wakeups.begun.wait(ANSWER)
        self._keeper = threading.Thread(target=self._keep, name="hold keeper", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """Let all go that we have, and the database."""
        self.leave()
        self._wakeups.close()
        self._database.close()

    def leave(self) -> None:
        self._closing.set()
        self._attention.set()
        self._keeper.join()
        if not self._failing:  # then it is found out by others that we are gone
            with contextlib.suppress(OSError):
                self._lease.end()

    def now(self) -> float:
        now, at = self._clock
        return now + since_boot() - at

    def watch(self, woken: Woken) -> None:
        self._watchers.append(woken)

    # -- what comes -------------------------------------------------------------------------------

    def spool(self) -> FileSpool:
        spool = FileSpool(self._tmp / f"{os.getpid()}-{secrets.token_hex(8)}")
        with contextlib.suppress(OSError):
            spool.path.unlink(missing_ok=True)
        return spool

    def put(self, arrivals: Sequence[Arrival]) -> Sequence[tuple[int, ...]]:
        return self._put(arrivals)

    def adopt(self, moved: Sequence[tuple[Held, bytes | Content]]) -> Sequence[int]:
        arrivals = [arrival_of(held, content, self.spool) for held, content in moved]
        return [key for [key] in self._put(arrivals, [held for held, _ in moved])]

    def others(self) -> Sequence[str]:
        with self._database.transaction(synced=False) as transaction:
            rows = transaction.rows(
                "SELECT name FROM hold_nodes AS node WHERE id <> %s "
                "AND expires > clock_timestamp() AND NOT EXISTS (SELECT FROM hold_heard "
                "WHERE id = node.id AND expires < clock_timestamp()) ORDER BY name",
                self._lease.node or 0,
            )
        return [f"process {name[1]} on {name[0]}" for name in (row[0].split() for row in rows)]

    def _put(
        self, arrivals: Sequence[Arrival], as_they_were: Sequence[Held] = ()
    ) -> Sequence[tuple[int, ...]]:
        accounts = {one for arrival in arrivals for one in arrival.accounts}
        used: Counter[str] = Counter()
        octets: Counter[str] = Counter()
        try:
            with self._usages.changing(accounts):
                with self._database.transaction() as transaction:
                    keys, each = self._insert(transaction, arrivals, used, octets)
                    if as_they_were:
                        self._set_as_they_were(transaction, keys, as_they_were)
                self._usages.add(used, octets)
        finally:
            for one in arrivals:
                if one.spool is not None:
                    one.spool.discard()
        self._wake(accounts)
        left = iter(keys)
        return [tuple(itertools.islice(left, number)) for number in each]

    def _insert(
        self,
        transaction: Transaction,
        arrivals: Sequence[Arrival],
        used: Counter[str],
        octets: Counter[str],
    ) -> tuple[list[int], list[int]]:
        """Returns the keys, and how many each message has."""
        theirs = [tuple(dict.fromkeys(one.accounts)) for one in arrivals]
        numbers = self._numbers_for(transaction, arrivals, theirs)
        messages: list[tuple[Any, ...]] = []
        rows: list[tuple[Any, ...]] = []
        for order, (arrival, accounts) in enumerate(zip(arrivals, theirs, strict=True), 1):
            number = numbers[len(rows)] if numbers is not None else 0
            body = self._keep_body(transaction, number, arrival)
            envelope, size = arrival.envelope, arrival.size
            messages.append(
                (
                    *(len(rows) + 1, len(accounts), _text(envelope.reverse_path)),
                    *(said_text(envelope), size),
                    *(body.streams, body.ascii, body.inline, body.chunks),
                )
            )
            for account in accounts:
                rows.append((order, account, recipients_of(arrival, account)))
                used[account] += 1
                octets[account] += size
        # Waited for, before the COMMIT is sent: a server that says nothing until we give up must
        # not keep them after that, for then they come again.
        [[keys]] = transaction.rows(
            "SELECT hold_put(%b::bigint[], %b::integer[], %b::text[], %b::text[], %s, "
            "%b::integer[], %b::integer[], %b::text[], %b::text[], %b::bigint[], %b::boolean[], "
            "%b::boolean[], %b::bytea[], %b::integer[])",
            *(numbers, *_columns(rows), self.now(), *_columns(messages)),
        )
        return keys, [len(accounts) for accounts in theirs]

    def _numbers_for(
        self,
        transaction: Transaction,
        arrivals: Sequence[Arrival],
        theirs: Sequence[tuple[str, ...]],
    ) -> list[int] | None:
        """The keys of what comes, if any of it is to go into the database before the others."""
        if not any(one.spool is not None or one.size >= LARGE for one in arrivals):
            return None
        [[numbers]] = transaction.rows("SELECT hold_numbers(%s)", sum(map(len, theirs)))
        return list(numbers)

    def _set_as_they_were(
        self, transaction: Transaction, keys: Sequence[int], held: Sequence[Held]
    ) -> None:
        rows = [
            (key, one.arrived, int(one.state), one.strikes, _text(one.reason), one.warned)
            for key, one in zip(keys, held, strict=True)
        ]
        transaction.send(
            "UPDATE hold_queue SET arrived = it.arrived, state = it.state, "
            "strikes = it.strikes, reason = it.reason, warned = it.warned "
            "FROM unnest(%b::bigint[], %b::double precision[], %b::smallint[], "
            "%b::integer[], %b::text[], %b::boolean[]) "
            "AS it (id, arrived, state, strikes, reason, warned) WHERE hold_queue.id = it.id",
            *_columns(rows),
        )

    def _keep_body(self, transaction: Transaction, message: int, arrival: Arrival) -> _Body:
        """Put the octets of a large message where they belong; what is left is in its row."""
        head = b"".join(arrival.content)
        if isinstance(spool := arrival.spool, FileSpool):
            chunks = _chunks(spool.pieces())
            traits, inline = spool.traits, head
        else:
            if spool is not None:
                head += spool.read()
            if len(head) < LARGE:
                return _Body(head)
            traits, inline = Traits(), b""
            traits.add(head)
            chunks = _chunks([head])
        number = 0
        for number, chunk in enumerate(chunks, 1):
            transaction.run("INSERT INTO hold_chunks VALUES (%s, %s, %b)", message, number, chunk)
        return _Body(inline, number, traits.streams, traits.ascii and inline.isascii())

    # -- what goes --------------------------------------------------------------------------------

    def load(self, keys: Sequence[int]) -> dict[int, bytes | Content]:
        with self._database.transaction(synced=False) as transaction:
            asked = transaction.send(
                "SELECT q.id, m.id, m.size, m.body, m.chunks, m.streams, m.ascii "
                "FROM hold_queue q JOIN hold_messages m ON m.id = q.message "
                "WHERE q.id = ANY(%s::bigint[])",
                list(keys),
            )
        found: dict[int, bytes | Content] = {}
        for key, message, size, body, chunks, streams, ascii_ in asked.rows():
            if not chunks:
                found[key] = body
                continue
            spool = self._fetch(message, body, chunks)
            try:
                if spool.size != size:
                    self._lost(key)
                elif streams:
                    found[key] = spool.open(b"", ascii_)
                else:
                    found[key] = spool.read()
            finally:
                spool.discard()
        return found

    def _fetch(self, message: int, body: bytes, chunks: int) -> FileSpool:
        """A large message, in a file of ours.  Raises :class:`OSError`."""
        spool = self.spool()
        try:
            spool.write(body)
            for number in range(1, chunks + 1):
                with self._database.transaction(synced=False) as transaction:
                    piece = transaction.send(
                        "SELECT data FROM hold_chunks WHERE message = %s AND number = %s",
                        *(message, number),
                    )
                for [data] in piece.rows():
                    spool.write(data)
            spool.check()
        except BaseException:
            spool.discard()
            raise
        return spool

    def _lost(self, key: int) -> None:
        """A part of a message is not there.  If it has not been settled meanwhile, someone did
        that: it is set aside for a person to see, and the account's other mail goes on."""
        held = self.strike(key, 0, "it is not whole: rows of hold_chunks are missing")
        if held is not None:
            log_safely(
                log,
                logging.ERROR,
                "account=%s key=%d from=%s is set aside, %s",
                *(held.account, key, angle(held.envelope.reverse_path), held.reason),
            )

    def feed(self, account: str, domains: Collection[str] | None = None) -> _Feed:
        with self._lists:
            reading = self._readings.pop(account, None) or Reading()
            feed = _Feed(self, account, domains, next(self._numbers), reading)
            self._feeds.add(feed)
        return feed

    def take(self, feed: _Feed, messages: int, octets: int) -> tuple[int, list[Held]]:
        """Messages for a feed, and the number under which they are ours."""
        for left in (1, 0):
            node = self._let_go()
            ticket = _Ticket(node, feed.ticket)
            try:
                return node, self._take(ticket, feed, messages, octets)
            except LeaseLostError as error:
                self._renew()
                if not left:
                    raise OSError(f"the hold store {self._database.shown}: {error}") from None
        raise AssertionError("not reached")

    def _take(self, ticket: _Ticket, feed: _Feed, messages: int, octets: int) -> list[Held]:
        """What is in the list is ours at the end.  If it is not known whether it is, it is let go,
        and looked for from the beginning."""
        taken: list[Held] = []
        try:
            with self._database.transaction(synced=False) as transaction:
                taken += self._pick(transaction, ticket, feed, messages, octets)
                if taken:
                    transaction.send(
                        "UPDATE hold_queue SET node = %s, ticket = %s WHERE id = ANY(%s::bigint[])",
                        *(ticket.node, ticket.number, [one.key for one in taken]),
                    )
        except BaseException:
            with self._lists:
                feed.reading = Reading()
            self.let_go_later(ticket, {one.key for one in taken})
            raise
        return taken

    def _pick(
        self, transaction: Transaction, ticket: _Ticket, feed: _Feed, messages: int, octets: int
    ) -> Iterator[Held]:
        if messages <= 0 or octets <= 0:
            return
        leased = self._lease.ask(transaction, ticket.node)
        asked = transaction.send("SELECT hold_horizon()")
        page = transaction.send(_PAGE, wanted := feed.wanted(messages))
        leased.check()
        [[horizon]] = asked.rows()
        shown: list[int] = []
        there: list[int] = []
        while True:
            rows = page.rows()
            there += (key for _, key, *_ in rows)
            after = [key for is_after, key, *_ in rows if is_after]
            upto = after[-1] if len(after) == wanted["number"] else ALL
            for _, key, *row in rows:
                if row[0] is None:
                    continue  # someone else's, or set aside
                if messages <= 0 or octets <= 0:
                    upto = min(upto, key - 1)
                    break
                held = _held(tuple(row))
                shown.append(key)
                if (theirs := for_domains(held, feed.domains)) is None:
                    feed.seen.add(key)
                    continue
                messages -= 1
                octets -= theirs.size
                yield theirs
            if messages <= 0 or octets <= 0 or upto == ALL:
                break
            wanted = {**wanted, "after": upto, "left": [], "aside": NO_STATE}
            page = transaction.send(_PAGE, wanted)
        with self._lists:
            feed.reading.read(upto, horizon, shown, there)

    def claim(self, keys: Iterable[int]) -> dict[int, Held]:
        number, wanted = next(self._numbers), list(keys)
        claimed: dict[int, Held] = {}
        ticket = _Ticket(self._let_go(), number)
        try:
            with self._database.transaction(synced=False) as transaction:
                ticket = _Ticket(self._lease.ours(transaction), number)
                ours = transaction.rows(
                    "UPDATE hold_queue SET node = %s, ticket = %s WHERE id IN (SELECT id FROM "
                    f"hold_queue WHERE id = ANY(%s) AND {FREE} ORDER BY id FOR UPDATE SKIP LOCKED)"
                    " RETURNING id",
                    *(ticket.node, number, wanted),
                )
            with self._lists:
                self._claims.update((key, ticket) for [key] in ours)
            for [key] in sorted(ours):
                if (held := self.find(key)) is not None:
                    claimed[key] = held
        except BaseException as error:
            with self._lists:
                for key in wanted:
                    if self._claims.get(key) == ticket:
                        del self._claims[key]
            self.let_go_later(ticket, set(wanted))
            if isinstance(error, LeaseLostError):
                raise OSError(f"the hold store {self._database.shown}: {error}") from None
            raise
        return {key: claimed[key] for key in wanted if key in claimed}

    def release(self, keys: Iterable[int]) -> None:
        released: defaultdict[_Ticket, set[int]] = defaultdict(set)
        with self._lists:
            for key in keys:
                if (ticket := self._claims.pop(key, None)) is not None:
                    released[ticket].add(key)
        for ticket, some in released.items():
            self.let_go_later(ticket, some)
        with contextlib.suppress(OSError):  # then it is done when it can be
            self._let_go()

    def settle(self, done: Sequence[Settled]) -> None:
        answered: dict[int, set[str]] = {}
        for one in done:
            answered.setdefault(one.key, set()).update(one.recipients)
        reasons = {one.key: one.reason for one in done}
        if not done:
            return
        with contextlib.ExitStack() as changing:
            with self._database.transaction(synced=False) as transaction:
                rows = transaction.rows(
                    "SELECT id, account, recipients, size FROM hold_queue "
                    f"WHERE id = ANY(%s::bigint[]) AND (node = %s OR {FREE}) "
                    "ORDER BY id FOR UPDATE",
                    *(list(answered), self._lease.node),
                )
                changing.enter_context(self._usages.changing({one[1] for one in rows}))
                left, used, octets = self._strike_off(transaction, rows, answered, reasons)
            self._usages.add(used, octets)
        with self._lists:
            for key in answered:
                self._claims.pop(key, None)
                if (feed := self._having.pop(key, None)) is not None:
                    feed.settled(key, key in left)

    def _strike_off(
        self,
        transaction: Transaction,
        rows: Sequence[tuple[Any, ...]],
        answered: Mapping[int, Collection[str]],
        reasons: Mapping[int, str],
    ) -> tuple[set[int], Counter[str], Counter[str]]:
        """Returns which messages still wait, and how much the accounts have more, by account."""
        used: Counter[str] = Counter()
        octets: Counter[str] = Counter()
        left: list[tuple[Any, ...]] = []
        gone: list[int] = []
        for key, account, recipients, size in rows:
            rest = [one for one in json.loads(recipients) if one[0] not in answered[key]]
            if rest:
                left.append((key, json.dumps(rest), _text(reasons[key])))
                continue
            gone.append(key)
            used[account] -= 1
            octets[account] -= size
        if left:
            transaction.send(
                "UPDATE hold_queue SET recipients = it.recipients, reason = it.reason, "
                "node = NULL, ticket = NULL FROM unnest(%b::bigint[], %b::text[], %b::text[]) "
                "AS it (id, recipients, reason) WHERE hold_queue.id = it.id",
                *_columns(left),
            )
        if gone:
            transaction.send("SELECT hold_forget(%b::bigint[])", gone)
        return {one[0] for one in left}, used, octets

    # -- what does not go -------------------------------------------------------------------------

    def strike(self, key: int, most: int, reason: str) -> Held | None:
        with self._database.transaction(synced=False) as transaction:
            transaction.run(
                "UPDATE hold_queue SET strikes = strikes + 1, reason = %s, "
                "state = CASE WHEN strikes + 1 >= %s THEN %s ELSE state END "
                f"WHERE id = %s AND (node = %s OR {FREE})",
                *(_text(reason), most, int(State.ASIDE), key, self._lease.node),
            )
        return self.find(key)

    def note_warned(self, key: int) -> None:
        with self._database.transaction() as transaction:
            transaction.run("UPDATE hold_queue SET warned = true WHERE id = %s", key)

    def retry(self, keys: Iterable[int]) -> int:
        keys = list(keys)
        with self._database.transaction(synced=False) as transaction:
            found = transaction.rows(
                "UPDATE hold_queue SET state = %s, strikes = 0, reason = '' "
                "WHERE id = ANY(%s::bigint[]) RETURNING account",
                *(int(State.WAITING), keys),
            )
        with self._lists:
            for reading in (*self._readings.values(), *(feed.reading for feed in self._feeds)):
                reading.note(keys)
        self._wake({account for [account] in found})
        return len(found)

    def let_go_later(self, ticket: _Ticket, keys: set[int]) -> None:
        """These are anyone's, as soon as the database can be told.  Does not block."""
        if keys:
            with self._lists:
                self._letting_go.append((ticket, keys))
            self._attention.set()

    def _let_go(self) -> int:
        """Let go what is to be; whoever takes mail after that may have it.  Returns our number.
        Raises :class:`OSError`."""
        with self._releasing:
            with self._lists:
                some = list(self._letting_go)
            freed: set[str] = set()
            if some:
                with self._database.transaction(synced=False) as transaction:
                    for ticket, keys in some:
                        rows = transaction.rows(
                            "UPDATE hold_queue SET node = NULL, ticket = NULL "
                            "WHERE id = ANY(%s::bigint[]) AND node = %s AND ticket = %s "
                            "RETURNING account",
                            *(list(keys), ticket.node, ticket.number),
                        )
                        freed.update(account for [account] in rows)
                with self._lists:
                    del self._letting_go[: len(some)]
        self._wake(freed)
        if (node := self._lease.node) is None:
            self._renew()
            node = self._lease.node
        assert node is not None
        return node

    # -- what there is ----------------------------------------------------------------------------

    def find(self, key: int) -> Held | None:
        found = self._rows("WHERE q.id = %s", key)
        return found[0] if found else None

    def listing(
        self,
        account: str | None = None,
        after: int = 0,
        messages: int = 100,
        state: State | None = None,
    ) -> Sequence[Held]:
        states = [int(one) for one in ([state] if state is not None else State)]
        if account is None:
            where = "WHERE q.id > %s AND q.state = ANY(%s::smallint[]) ORDER BY q.id LIMIT %s"
            return self._rows(where, after, states, messages)
        where = "WHERE q.account = %s AND q.state = %s AND q.id > %s ORDER BY q.id LIMIT %s"
        found = [
            one for each in states for one in self._rows(where, account, each, after, messages)
        ]
        return sorted(found, key=lambda one: one.key)[:messages]

    def _rows(self, where: str, *values: Any) -> list[Held]:
        with self._database.transaction(synced=False) as transaction:
            return [_held(row) for row in transaction.rows(_HELD + where, *values)]

    def usage(self, account: str) -> Usage:
        return self._usages.of(account)

    def usages(self) -> dict[str, Usage]:
        return self._usages.all()

    def standings(self, accounts: Collection[str]) -> dict[str, Standing]:
        with self._database.transaction(synced=False) as transaction:
            states = [int(one) for one in State]
            rows = transaction.rows(_STANDINGS, states, int(State.ASIDE), list(accounts))
        return {name: Standing(oldest, aside) for name, oldest, aside in rows if oldest is not None}

    # -- what goes on all the time ----------------------------------------------------------------

    def _wake(self, accounts: Collection[str]) -> None:
        """Mail has come for these, or is anyone's again: tell who watches, here and elsewhere."""
        if accounts:
            for woken in self._watchers:
                woken(accounts)
            self._wakeups.tell(accounts)

    def _heard(self, accounts: Collection[str] | None) -> None:
        """Another process has mail for these, or, if there are none, may have for any."""
        if accounts is None:
            with self._lists:
                accounts = {feed.account for feed in self._feeds}
        for woken in self._watchers if accounts else ():
            woken(accounts)

    def _keep(self) -> None:
        """Say that we are there, and look for what no one has told us of."""
        renew_at = since_boot() + RENEW
        read_at = since_boot() + READ_USAGES
        while not self._closing.is_set():
            self._attention.wait(TICK)
            self._attention.clear()
            now = since_boot()
            try:
                if now >= renew_at:
                    renew_at = now + RENEW
                    self._renew()
                    self._lease.end_dead()
                    self._tick()
                    self._look()
                if now >= read_at:
                    self._read_usages()
                    # However many accounts there are, it is a small part of the database's work.
                    read_at = since_boot() + max(READ_USAGES, 20 * (since_boot() - now))
                self._let_go()
                self._note_failure(None)
            except OSError as error:
                self._note_failure(error)
                self._closing.wait(TICK)
            except Exception:  # our own bug; it must not end what keeps our messages ours
                log_safely(log, logging.ERROR, "hold=%s", self._database.shown, error=True)
                self._closing.wait(TICK)

    def _note_failure(self, error: OSError | None) -> None:
        """One line when the database cannot be had, and one when it is back."""
        if error is not None and not self._failing and not self._closing.is_set():
            log_safely(log, logging.ERROR, "%s; it is tried again all the time", error.strerror)
        elif error is None and self._failing:
            log.warning("hold=%s it is back", self._database.shown)
        self._failing = error is not None

    def _renew(self) -> None:
        if not self._lease.renew():
            with self._lists:  # after a crash even numbers may be given a second time
                self._readings.clear()
                for feed in self._feeds:
                    feed.reading = Reading()
            self._heard(None)  # what our feeds had is anyone's

    def _tick(self) -> None:
        with self._database.transaction(synced=False) as transaction:
            asked = since_boot()
            [[now]] = transaction.rows(_TICK, LONGEST_PAUSE)
        self._clock = now, asked

    def _look(self) -> None:
        """See whether there is mail for those who wait for it."""
        with self._lists:
            feeds = [(one.account, one.reading.after) for one in self._feeds]
            left = [key for one in self._feeds for key in one.reading.left]
        if not feeds:
            return
        with self._database.transaction(synced=False) as transaction:
            found = transaction.send(
                "SELECT DISTINCT feed.account FROM unnest(%s::text[], %s::bigint[]) "
                "AS feed (account, after), LATERAL (SELECT FROM hold_queue "
                "WHERE account = feed.account AND state = %s AND id > feed.after "
                f"AND {FREE} LIMIT 1) AS one UNION SELECT account FROM hold_queue "
                f"WHERE id = ANY(%s::bigint[]) AND state = %s AND {FREE}",
                *(*_columns(feeds), int(State.WAITING), left, int(State.WAITING)),
            )
        if accounts := {account for [account] in found.rows()}:
            self._heard(accounts)

    def _read_usages(self) -> None:
        self._usages.begin_reading()
        with self._database.transaction(synced=False) as transaction:
            used = transaction.send(
                "SELECT account, sum(messages)::bigint, sum(octets)::bigint FROM ("
                "SELECT account, messages, octets FROM hold_usage UNION ALL "
                "SELECT account, messages, octets FROM hold_changes "
                "WHERE id > (SELECT number FROM hold_counted)"
                ") AS used GROUP BY account HAVING sum(messages) <> 0"
            )
            changes = transaction.send(
                "SELECT count(*) FROM hold_changes WHERE id > (SELECT number FROM hold_counted)"
            )
        self._usages.read({account: Usage(*used) for account, *used in used.rows()})
        [[number]] = changes.rows()
        if number >= CHANGES or (number and since_boot() - self._counted >= COUNT):
            self._count()

    def _count(self) -> None:
        """Add up the changes of what is held."""
        with self._database.transaction(synced=False) as transaction:
            transaction.send("SELECT hold_count()")
        self._counted = since_boot()

    # -- what feeds need --------------------------------------------------------------------------

    @property
    def lists(self) -> threading.Lock:
        """To be held when what a feed has is looked at or changed; never while anything blocks."""
        return self._lists

    def holds(self, node: int) -> bool:
        """What was taken under this number is surely ours still."""
        return self._lease.holds(node)

    def note_taken(self, feed: _Feed, keys: Iterable[int]) -> None:
        """A feed has taken these.  Under ``lists``."""
        self._having.update((key, feed) for key in keys)

    def forget(self, feed: _Feed, keys: Iterable[int]) -> None:
        """It is closed, and does not have these any more.  Under ``lists``."""
        self._feeds.discard(feed)
        self._readings[feed.account] = feed.reading
        for key in keys:
            if self._having.get(key) is feed:
                del self._having[key]


@dataclass(frozen=True)
class _Ticket:
    """Who has a message: the process, and what in it."""

    node: int
    number: int


@dataclass(frozen=True)
class _Body:
    """Where a message's octets are: ``inline``, and after these so many chunks.

    ``streams``, ``ascii``  see :class:`~salmon_revsmtp.smtp.content.Traits`.
    """

    inline: bytes
    chunks: int = 0
    streams: bool = False
    ascii: bool = False


class _Feed:
    """A feed.

    ``seen``     what it does not show again in this round, although it waits: it is for other
                 domains, or was answered, and still waits for some of its recipients.
    ``reading``  how far it has read.
    """

    def __init__(
        self,
        store: PostgresStore,
        account: str,
        domains: Collection[str] | None,
        ticket: int,
        reading: Reading,
    ) -> None:
        self._store, self.account, self.domains, self.ticket = store, account, domains, ticket
        self.reading = reading
        self.seen: set[int] = set()
        self._ours: dict[int, int] = {}  # by key, under which number it was taken
        self._answered: set[int] = set()  # and not settled
        self._restart = False

    def take(self, messages: int, octets: int) -> Sequence[Held]:
        if self._restart:
            self._restart = False
            with self._store.lists:
                self.reading.note(self.seen)
                self.seen.clear()
        node, taken = self._store.take(self, messages, octets)
        with self._store.lists:
            self._ours = {key: had for key, had in self._ours.items() if had == node}
            self._ours.update((one.key, node) for one in taken)
            self._store.note_taken(self, (one.key for one in taken))
        return taken

    def wanted(self, messages: int) -> dict[str, Any]:
        """What is asked of the database for its next so many messages."""
        number = PAGE if self.domains is not None else min(PAGE, messages)
        with self._store.lists:
            self.reading.prepare()
            after = self.reading.after
            left = self.reading.left - self.seen
            done = self.reading.done.union(key for key in self.seen if key > after)
        return {
            **{"account": self.account, "after": after, "left": list(left), "done": list(done)},
            **{"waiting": int(State.WAITING), "aside": int(State.ASIDE)},
            **{"most": reading.MOST + 1, "number": number},
        }

    def has(self, key: int) -> bool:
        node = self._ours.get(key)
        if node is None or self._store.holds(node):
            return node is not None
        with self._store.lists:
            self._ours.pop(key, None)
            self.reading.note([key])
        # It may be ours after all, when the database is there again.
        self._store.let_go_later(_Ticket(node, self.ticket), {key})
        return False

    def leave(self, keys: Iterable[int]) -> None:
        with self._store.lists:
            for key in keys:
                if self._ours.pop(key, None) is not None:
                    self._answered.add(key)

    def settled(self, key: int, left: bool) -> None:
        """One that it took has been settled; if any recipient is left, it waits.  Under
        ``lists``."""
        self._ours.pop(key, None)
        self._answered.discard(key)
        if left:
            self.seen.add(key)

    def start_over(self) -> None:
        self._restart = True

    def close(self) -> None:
        with self._store.lists:
            ours, self._ours = self._ours, {}
            self.reading.note([*ours, *self._answered, *self.seen])
            self._store.forget(self, ours)
        for node in set(ours.values()):
            keys = {key for key, had in ours.items() if had == node}
            self._store.let_go_later(_Ticket(node, self.ticket), keys)


def _chunks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for one in pieces:
        yield from (one[start : start + PIECE] for start in range(0, len(one), PIECE))


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _text(text: str) -> str:
    """As PostgreSQL takes it: without NUL, and without what is no character."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _held(row: tuple[Any, ...]) -> Held:
    key, account, sender, said, recipients, size, arrived, state, strikes, reason, warned = row
    envelope = envelope_of(sender, said, json.loads(recipients))
    return Held(key, account, envelope, size, arrived, State(state), strikes, reason, warned)
