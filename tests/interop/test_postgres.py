"""The hold store on a real PostgreSQL: several processes before one database.

What every hold store does is in tests/test_hold_store.py; here is what only this one can: it gives
what a process had to another, once that is not heard of, and the first has nothing any more when it
comes back.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support.messages import MESSAGE
from support.postgres import PASSWORD, USER, Cluster
from support.processes import LONG
from support.servers import PgBouncer, free_port

from salmon_revsmtp.provider.hold.postgres import (
    PostgresStore,
    lease,
    reading,
    schema,
    store,
    wakeups,
)
from salmon_revsmtp.provider.hold.postgres.database import Transaction
from salmon_revsmtp.provider.hold.store import Arrival, Held, HoldStoreError, Settled, State, Usage
from salmon_revsmtp.smtp.content import whole
from salmon_revsmtp.smtp.envelope import Envelope

pytestmark = pytest.mark.interop

ALL = {"messages": 1000, "octets": 1 << 40}
MIB = 1024 * 1024
# What a client said beside the addresses: nothing.
SAID = '[{}, "", true]'


def arrival(*recipients: str, data: bytes = MESSAGE) -> Arrival:
    """A message; the account of a recipient is its domain's first label."""
    accounts = tuple(one.partition("@")[2].partition(".")[0] for one in recipients)
    return Arrival(Envelope("a@example.net", recipients), accounts, [data])


def until(so: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    give_up = time.monotonic() + LONG
    while not so():
        assert time.monotonic() < give_up
        time.sleep(0.01)


class Nodes:
    """Stores on one database, each as if it were on another host.

    ``url``  theirs.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.schema = cluster, cluster.schema()
        self.url = cluster.url(self.schema)
        self._folder = folder
        self.open: list[PostgresStore] = []

    def start(self, url: str = "") -> PostgresStore:
        folder = self._folder / str(len(self.open))
        self.open.append(PostgresStore(url or self.url, folder))
        return self.open[-1]

    def rows(self, text: str) -> list[tuple[Any, ...]]:
        return self.cluster.rows(text, self.schema)

    def execute(self, text: str) -> None:
        self.cluster.execute(text, self.schema)


@pytest.fixture
def nodes(database: Cluster, tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(database, tmp_path)
    yield nodes
    for one in nodes.open:
        one.close()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not heard of is given up soon."""
    monkeypatch.setattr(lease, "LEASE", 1.5)
    monkeypatch.setattr(lease, "MARGIN", 0.5)
    monkeypatch.setattr(store, "RENEW", 0.3)
    monkeypatch.setattr(store, "TICK", 0.1)


def cut_off(node: PostgresStore) -> None:
    """It says nothing any more, as if it were dead or could not reach the database."""
    node._closing.set()
    node._attention.set()
    node._keeper.join()


def back(node: PostgresStore) -> None:
    """It says that it is there again."""
    node._renew()


# -- the tables ------------------------------------------------------------------------------------


def test_many_processes_that_start_at_once_make_the_tables_once(nodes: Nodes) -> None:
    failed: list[BaseException] = []

    def start() -> None:
        try:
            nodes.start()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failed == []
    assert nodes.rows("SELECT version FROM hold_schema") == [(len(schema.MIGRATIONS),)]
    [[key]] = nodes.open[0].put([arrival("b@acme.example")])
    assert [one.key for one in nodes.open[5].listing()] == [key]


def test_an_older_program_refuses_what_a_newer_one_has_made(nodes: Nodes) -> None:
    nodes.start().put([arrival("b@acme.example")])
    newer = len(schema.MIGRATIONS) + 1
    nodes.execute(f"UPDATE hold_schema SET version = {newer}")
    with pytest.raises(HoldStoreError, match=f"version {newer}.*newer salmon-revsmtp has been"):
        nodes.start()


def test_a_newer_program_changes_the_tables(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    [[key]] = nodes.start().put([arrival("b@acme.example")])
    more = "ALTER TABLE hold_queue ADD COLUMN colour text NOT NULL DEFAULT 'blue'"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, more))
    newer = nodes.start()
    assert nodes.rows("SELECT colour FROM hold_queue") == [("blue",)]
    assert newer.find(key) is not None


def test_a_change_that_fails_leaves_the_tables_as_they_were(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.start()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE t (); SELECT 1/0"))
        with pytest.raises(HoldStoreError, match=r"opening the hold store.*division by zero"):
            nodes.start()
    assert nodes.rows("SELECT to_regclass('t')") == [(None,)]
    assert nodes.start().listing() == []


def test_other_tables_in_the_database_have_a_version_of_their_own(nodes: Nodes) -> None:
    node = nodes.start()
    for _ in range(2):
        with node._database.transaction() as transaction:
            schema.migrate(transaction, "x", "others", ["CREATE TABLE others ()"])
    assert nodes.rows("SELECT version FROM others_schema") == [(1,)]
    assert nodes.rows("SELECT version FROM hold_schema") == [(len(schema.MIGRATIONS),)]
    with (
        pytest.raises(HoldStoreError, match=r"version 1.*up to 0"),
        node._database.transaction() as transaction,
    ):
        schema.migrate(transaction, "x", "others", [])


def first_version(nodes: Nodes) -> None:
    """Tables of the first version, with mail that a program of that time has taken."""
    nodes.execute(
        f"{schema.MIGRATIONS[0]}; CREATE TABLE hold_schema AS SELECT 1 AS version; "
        # For two accounts, one of which has got it once before; and one in pieces.
        "INSERT INTO hold_messages SELECT nextval('hold_ids'), 'a@example.net', "
        f"'{SAID}', 4, false, true, 'abcd'::bytea, 0, 2; "
        "INSERT INTO hold_messages SELECT nextval('hold_ids'), 'a@example.net', "
        f"'{SAID}', 80000, false, true, '', 2, 1; "
        "INSERT INTO hold_chunks VALUES (2, 1, repeat('x', 70000)::bytea), "
        "(2, 2, repeat('y', 10000)::bytea); "
    )
    old_put(nodes, 1, "acme", 4, "state, strikes, reason", "1, 3, 'it broke'")
    old_put(nodes, 1, "other", 4, "node, ticket", "17, 1")  # of a process that is gone
    old_put(nodes, 2, "acme", 80000, "warned", "true")


def old_put(
    nodes: Nodes, message: int, account: str, size: int, more: str = "warned", value: str = "false"
) -> None:
    nodes.execute(
        f"INSERT INTO hold_queue (id, message, account, recipients, size, arrived, {more}) "
        f"SELECT nextval('hold_ids'), {message}, '{account}', "
        f"""'[["b@{account}.example", null]]', {size}, 1700000000, {value};"""
        f"INSERT INTO hold_usage VALUES ('{account}', 5, 1, {size}) ON CONFLICT (account, part) "
        "DO UPDATE SET messages = hold_usage.messages + 1, "
        "octets = hold_usage.octets + excluded.octets"
    )


def test_what_is_held_in_tables_of_the_first_version_is_held_in_those_of_now(nodes: Nodes) -> None:
    first_version(nodes)
    node = nodes.start()
    assert nodes.rows("SELECT version FROM hold_schema") == [(len(schema.MIGRATIONS),)]
    aside, other, large = node.listing()
    assert (aside.account, aside.state, aside.strikes) == ("acme", State.ASIDE, 3)
    assert aside.reason == "it broke" and other.account == "other" and large.warned
    assert large.envelope == Envelope("a@example.net", ("b@acme.example",))
    assert node.load([aside.key])[aside.key] == b"abcd"
    assert node.load([large.key])[large.key] == b"x" * 70000 + b"y" * 10000
    assert node.usages() == {"acme": Usage(2, 80004), "other": Usage(1, 4)}
    assert [one.key for one in node.feed("other").take(**ALL)] == [other.key]
    node.retry([aside.key])
    assert [one.key for one in node.feed("acme").take(**ALL)] == [aside.key, large.key]
    [[later]] = node.put([arrival("b@acme.example")])
    assert later > large.key
    node.settle([Settled(one.key, one.envelope.recipients) for one in node.listing()])
    for table in ("messages", "chunks", "queue"):
        assert nodes.rows(f"SELECT count(*) FROM hold_{table}") == [(0,)], table
    assert nodes.start().usages() == {}


def test_a_program_of_the_first_version_refuses_the_tables_of_now(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.start()
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
    with pytest.raises(HoldStoreError, match=r"version 2.*up to 1: a newer salmon-revsmtp"):
        nodes.start()


def test_a_program_of_the_first_version_that_still_runs_and_new_ones_share_their_mail(
    nodes: Nodes,
) -> None:
    first_version(nodes)
    node = nodes.start()
    [kept] = node.feed("other").take(**ALL)
    old_put(nodes, 1, "other", 4)
    feed = node.feed("other")
    [came] = feed.take(**ALL)
    assert came.key > kept.key
    old_put(nodes, 1, "other", 4)
    assert len(feed.take(**ALL)) == 1
    node._read_usages()
    assert node.usage("other") == Usage(3, 12)


# -- opening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://revsmtp:s3cret@127.0.0.1:{port}/postgres", "password authentication failed"),
        ("postgresql://revsmtp:s3cret@127.0.0.1:{free}/postgres", "Connection refused"),
        ("postgresql://revsmtp:s3cret%zz@127.0.0.1:{port}/postgres", "URL cannot be understood"),
        ("postgresql://revsmtp:s3cret@127.0.0.1/x?s3cret=1", "URL cannot be understood"),
    ],
)
def test_a_database_that_cannot_be_had_is_one_sentence_without_the_password(
    database: Cluster, tmp_path: Path, url: str, said: str
) -> None:
    url = url.format(port=database.port, free=free_port())
    with pytest.raises(HoldStoreError, match=f"(?s)opening the hold store .*{said}") as raised:
        PostgresStore(url, tmp_path)
    assert "s3cret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_by_tcp_with_a_password(nodes: Nodes) -> None:
    node = nodes.start(nodes.cluster.url(nodes.schema, nodes.cluster.port))
    node.put([arrival("b@acme.example")])
    assert len(node.listing()) == 1


def test_a_database_that_cannot_keep_every_address_is_refused(
    database: Cluster, tmp_path: Path
) -> None:
    database.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(HoldStoreError, match="encoded in LATIN1; make one with ENCODING 'UTF8'"):
        PostgresStore(database.url(database="latin"), tmp_path)


def test_each_statement_sees_what_is_there_whatever_the_default_is(
    database: Cluster, tmp_path: Path
) -> None:
    """How far a feed has read is asked before the messages are: they must be no older."""
    strict = "options=-cdefault_transaction_isolation%3Dserializable%20"
    url = database.url(database.schema()).replace("options=", strict)
    store = PostgresStore(url, tmp_path)
    try:
        with store._database.transaction() as transaction:
            [[level]] = transaction.rows("SHOW transaction_isolation")
        assert level == "read committed"
    finally:
        store.close()


def test_a_user_that_may_make_no_tables_is_told(database: Cluster, tmp_path: Path) -> None:
    database.execute("CREATE ROLE nobody LOGIN; CREATE SCHEMA closed")
    url = database.url("closed").replace(f"//{USER}@", "//nobody@")
    with pytest.raises(HoldStoreError, match="opening the hold store"):
        PostgresStore(url, tmp_path)


def test_what_postgresql_cannot_store_is_kept_all_the_same(nodes: Nodes) -> None:
    node = nodes.start()
    envelope = Envelope(
        "a@example.net", ("b\x00\ud800@acme.example",), {"ENVID": "\x00"}, {}, "\x00"
    )
    [[key]] = node.put([Arrival(envelope, ("acme",), [b"\x00\xff"])])
    found = node.find(key)
    assert found is not None and found.envelope == envelope
    struck = node.strike(key, 5, "it said \x00\ud800")
    assert struck is not None and struck.reason == "it said \ufffd?"


# -- several processes -----------------------------------------------------------------------------


def test_no_message_is_had_by_two_processes(nodes: Nodes) -> None:
    """Mail comes at two, and two sessions of each take it."""
    ones = [nodes.start(), nodes.start()]
    got: Counter[int] = Counter()
    kept: list[int] = []
    done = threading.Event()

    def come(node: PostgresStore) -> None:
        for _ in range(40):
            kept.extend(key for [key] in node.put([arrival("b@acme.example")] * 5))

    def go(node: PostgresStore) -> None:
        feed = node.feed("acme")
        while not done.is_set() or node.usage("acme").messages > 0:
            for held in feed.take(7, 1 << 40):
                got[held.key] += 1
                feed.leave([held.key])
                node.settle([Settled(held.key, held.envelope.recipients)])
            if done.is_set() and not node.listing("acme", messages=1):
                return

    coming = [threading.Thread(target=come, args=[one]) for one in ones]
    going = [threading.Thread(target=go, args=[one]) for one in ones for _ in range(2)]
    for one in (*coming, *going):
        one.start()
    for one in coming:
        one.join()
    done.set()
    for one in going:
        one.join()
    assert len(kept) == 400 and set(kept) == set(got)
    assert set(got.values()) == {1}
    assert nodes.rows("SELECT count(*) FROM hold_messages") == [(0,)]
    assert nodes.start().usages() == {}


def test_what_another_process_holds_counts_for_the_quota_within_seconds(
    nodes: Nodes, soon: None
) -> None:
    one, other = nodes.start(), nodes.start()
    [[first], [second]] = one.put([arrival("b@acme.example", data=b"x" * 10)] * 2)
    until(lambda: other.usage("acme") == Usage(2, 20))
    other.settle([Settled(first, ["b@acme.example"])])
    assert other.usage("acme") == Usage(1, 10)
    until(lambda: one.usage("acme") == Usage(1, 10))
    one.settle([Settled(second, ["b@acme.example"])])
    assert one.usages() == {}
    until(lambda: other.usages() == {})


def test_what_a_claim_of_one_has_no_other_gets(nodes: Nodes) -> None:
    one, other = nodes.start(), nodes.start()
    [[key]] = one.put([arrival("b@acme.example")])
    assert list(one.claim([key])) == [key]
    assert other.claim([key]) == {}
    assert other.feed("acme").take(**ALL) == []
    other.settle([Settled(key, ["b@acme.example"])])
    assert one.find(key) is not None, "it is not the other's to settle"
    one.release([key])
    assert list(other.claim([key])) == [key]


def test_what_a_session_let_go_is_anothers_on_another_host(nodes: Nodes) -> None:
    one, other = nodes.start(), nodes.start()
    woken: list[Collection[str]] = []
    other.watch(woken.append)
    [[key]] = one.put([arrival("b@acme.example")])
    feed, theirs = one.feed("acme"), other.feed("acme")
    assert len(feed.take(**ALL)) == 1
    assert theirs.take(**ALL) == []
    until(lambda: bool(woken))
    woken.clear()
    feed.close()
    until(lambda: bool(woken))
    assert [held.key for held in theirs.take(**ALL)] == [key]


def test_a_process_that_ends_leaves_nothing_behind(nodes: Nodes) -> None:
    one, other = nodes.start(), nodes.start()
    [[key]] = one.put([arrival("b@acme.example")])
    one.feed("acme").take(**ALL)
    one.close()
    nodes.open.remove(one)
    assert [held.key for held in other.feed("acme").take(**ALL)] == [key]
    assert nodes.rows("SELECT count(*) FROM hold_nodes") == [(1,)]


# -- reading on, and an old transaction ------------------------------------------------------------


class Costs:
    """How many pages of tables and indexes the statements of a piece of work look at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._counting, self._patch = False, monkeypatch
        self.pages: Counter[str] = Counter()
        execute = Transaction._execute

        def explained(transaction: Transaction, query: str, values: tuple[Any, ...]) -> Any:
            if self._counting and not query.startswith(("BEGIN", "COMMIT", "SELECT set_config")):
                execute(transaction, "SAVEPOINT before", ())
                cursor = execute(
                    transaction, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", values
                )
                [[[found]]] = cursor.fetchall()
                plan = found["Plan"]
                kinds = ("Hit", "Read")
                self.pages[query] += sum(plan[f"Shared {kind} Blocks"] for kind in kinds)
                execute(transaction, "ROLLBACK TO before", ())
            return execute(transaction, query, values)

        monkeypatch.setattr(Transaction, "_execute", explained)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        self.pages.clear()
        self._counting = True
        yield
        self._counting = False


@pytest.mark.parametrize(
    "begin", ["SELECT pg_current_xact_id()", "SELECT count(*) FROM hold_queue"]
)
def test_a_queue_keeps_its_pace_beside_an_old_transaction(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    """However much has come and gone since that began: what it keeps from being removed is not
    gone through again and again."""
    monkeypatch.setattr(store, "RENEW", 3600.0)
    monkeypatch.setattr(store, "READ_USAGES", 3600.0)
    node, costs = nodes.start(), Costs(monkeypatch)
    feed = node.feed("acme")

    def come_and_go(messages: int) -> None:
        for _ in range(messages // 50):
            node.put([arrival("b@acme.example", data=b"x" * 3000)] * 50)
            taken = feed.take(**ALL)
            assert len(taken) == 50
            node.load([one.key for one in taken])
            feed.leave([one.key for one in taken])
            node.settle([Settled(one.key, one.envelope.recipients) for one in taken])
        node._read_usages()

    def cost() -> Counter[str]:
        nonlocal feed
        node._count()  # what has been there since the last time is done once
        with costs.counted():
            come_and_go(50)
            node._look()
            node._count()
            feed.close()
            feed = node.feed("acme")
            assert feed.take(**ALL) == []
        return costs.pages.copy()

    with nodes.cluster.connection(nodes.schema) as old:
        old.execute(f"BEGIN ISOLATION LEVEL REPEATABLE READ; {begin}".encode())
        come_and_go(500)
        before = cost()
        come_and_go(6000)
        for _ in range(2000):
            node._renew()
        after = cost()
        old.execute("COMMIT")
    assert sum(after.values()) < 1.3 * sum(before.values()), (before, after)
    slower = [one for one in after if after[one] > 1.5 * before[one] + 20]
    assert not slower, [(one, before[one], after[one]) for one in slower]
    # All of that is still there.
    [[dead]] = nodes.rows("SELECT pg_relation_size('hold_queue') / 8192")
    assert dead > 100


def put_apart(nodes: Nodes, connection: Any, account: str) -> int:
    """Keep a message as a process does, but do not commit it."""
    connection.execute("BEGIN")
    [[[key]]] = connection.execute(
        "SELECT hold_put(NULL, ARRAY[1], %s, %s, 1.0, ARRAY[1], ARRAY[1], ARRAY['a@example.net'], "
        f"ARRAY['{SAID}'], ARRAY[1::bigint], ARRAY[false], ARRAY[true], "
        "ARRAY['x'::bytea], ARRAY[0])",
        ([account], [f'[["b@{account}.example", null]]']),
    ).fetchall()
    return int(key)


def test_what_is_committed_late_is_found_although_later_keys_have_been_read(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "RENEW", 3600.0)
    node = nodes.start()
    feed = node.feed("acme")
    with nodes.cluster.connection(nodes.schema) as slow:
        late = put_apart(nodes, slow, "acme")
        for _ in range(3):
            [[key]] = node.put([arrival("b@acme.example")])
            assert key > late
            assert [one.key for one in feed.take(**ALL)] == [key]
            feed.leave([key])
            node.settle([Settled(key, ["b@acme.example"])])
        slow.execute("COMMIT")
    assert [one.key for one in feed.take(**ALL)] == [late]
    assert feed.take(**ALL) == []


def test_changes_that_are_committed_late_are_counted(nodes: Nodes) -> None:
    node = nodes.start()
    with nodes.cluster.connection(nodes.schema) as slow:
        put_apart(nodes, slow, "acme")
        node.put([arrival("b@acme.example", data=b"x" * 10), arrival("b@other.example")])
        for _ in range(2):
            node._count()
            node._read_usages()
            assert node.usage("acme") == Usage(1, 10)
        slow.execute("COMMIT")
    node._read_usages()
    assert node.usage("acme") == Usage(2, 11)
    for _ in range(2):
        node._count()
        assert nodes.rows("SELECT count(*) FROM hold_changes") == [(0,)]
        node._read_usages()
        assert node.usage("acme") == Usage(2, 11)
    assert nodes.start().usages() == node.usages()


def test_whatever_happens_a_feed_is_given_all_that_waits_for_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any time, all that a look through the whole table would find."""
    monkeypatch.setattr(store, "RENEW", 3600.0)
    monkeypatch.setattr(store, "PAGE", 4)
    monkeypatch.setattr(reading, "MOST", 6)
    dice = random.Random(1870)
    ones = [nodes.start(), nodes.start()]
    feeds = [one.feed("acme") for one in ones]
    had: list[dict[int, Held]] = [{}, {}]
    claimed: list[set[int]] = [set(), set()]

    def let_go(node: PostgresStore) -> None:
        until(lambda: not node._letting_go)

    with contextlib.ExitStack() as stack:
        slow: list[Any] = []
        for step in range(600):
            which = dice.randrange(2)
            node, feed = ones[which], feeds[which]
            act = dice.randrange(14)
            if act <= 1:
                node.put([arrival("b@acme.example", "c@acme.example")] * dice.randrange(1, 6))
            elif act == 2 and len(slow) < 3:
                slow.append(stack.enter_context(nodes.cluster.connection(nodes.schema)))
                put_apart(nodes, slow[-1], "acme")
            elif act == 3 and slow:
                slow.pop(dice.randrange(len(slow))).execute(dice.choice(["COMMIT", "ROLLBACK"]))
            elif act == 4:
                feed.close()
                let_go(node)
                had[which], feeds[which] = {}, node.feed("acme")
            elif act == 5:
                feed.start_over()
            elif act == 6 and had[which]:
                key = dice.choice(list(had[which]))
                held = had[which].pop(key)
                feed.leave([key])
                some = held.envelope.recipients[: dice.choice([1, 2])]
                node.settle([Settled(key, some, "later")])
            elif act == 7:
                keys = [one.key for one in node.listing("acme", messages=1000)]
                claimed[which] |= set(node.claim(dice.sample(keys, min(2, len(keys)))))
                node.release(over := set(list(claimed[which])[:2]))
                claimed[which].difference_update(over)
                let_go(node)
            elif act == 8:
                free = nodes.rows("SELECT id FROM hold_queue WHERE node IS NULL")
                for [key] in dice.sample(free, min(2, len(free))):
                    node.strike(key, 1, "it broke")
            elif act == 9:
                keys = [one.key for one in node.listing("acme", state=State.ASIDE)]
                node.retry(dice.sample(keys, min(1, len(keys))))
            else:
                number = dice.choice([1, 3, 1000])
                taken = feed.take(number, 1 << 40)
                had[which].update((one.key, one) for one in taken)
                if len(taken) < number:
                    waits = nodes.rows(
                        "SELECT id FROM hold_queue WHERE state = 0 AND node IS NULL ORDER BY id"
                    )
                    missed = [key for [key] in waits if key not in feed.seen]
                    assert not missed, (step, missed, vars(feed.reading))


# -- the lease -------------------------------------------------------------------------------------


def test_what_a_dead_process_had_goes_to_another_which_is_woken(nodes: Nodes, soon: None) -> None:
    one, other = nodes.start(), nodes.start()
    [[key]] = one.put([arrival("b@acme.example")])
    assert len(one.feed("acme").take(**ALL)) == 1
    feed = other.feed("acme")
    assert feed.take(**ALL) == []
    taken: list[Held] = []
    other.watch(lambda names: taken.extend(feed.take(**ALL)))
    cut_off(one)
    until(lambda: bool(taken))
    assert [held.key for held in taken] == [key]


def test_the_server_gives_up_a_process_that_says_no_more_in_a_transaction(nodes: Nodes) -> None:
    """It may have been cut off; what it has locked is locked for others no longer than that."""
    node = nodes.start()
    with pytest.raises(OSError, match=r"idle-in-transaction|server closed the connection"):  # noqa: SIM117
        with node._database.transaction() as transaction:
            transaction.rows("SELECT set_config('idle_in_transaction_session_timeout', '1', true)")
            until(
                lambda: (
                    nodes.rows(
                        "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%' "
                        "OR (state = 'active' AND wait_event = 'ClientRead')"
                    )
                    == [(0,)]
                )
            )
            transaction.rows("SELECT 1")


def test_a_process_that_is_not_heard_of_any_more_is_none_that_uses_the_store(
    nodes: Nodes, soon: None
) -> None:
    one, other = nodes.start(), nodes.start()
    assert len(other.others()) == 1
    cut_off(other)  # it ends no one's lease
    cut_off(one)
    until(lambda: other.others() == [])
    assert nodes.rows("SELECT count(*) FROM hold_nodes") == [(2,)]


def test_a_process_that_is_heard_of_keeps_what_it_has(nodes: Nodes, soon: None) -> None:
    one, other = nodes.start(), nodes.start()
    [[key]] = one.put([arrival("b@acme.example")])
    feed = one.feed("acme")
    feed.take(**ALL)
    time.sleep(2 * lease.LEASE)
    assert other.feed("acme").take(**ALL) == []
    assert feed.has(key)


def test_a_process_that_comes_back_has_nothing(nodes: Nodes, soon: None) -> None:
    """It was cut off, and another took what it had."""
    one, other = nodes.start(), nodes.start()
    [[first], [second]] = one.put([arrival("b@acme.example", "c@acme.example")] * 2)
    feed = one.feed("acme")
    assert len(feed.take(**ALL)) == 2
    assert feed.has(first) and feed.has(second)
    cut_off(one)
    until(lambda: not feed.has(first))
    # By its own clock it stops before another can begin.
    theirs = other.feed("acme")
    taken: list[Held] = []
    while not taken:
        taken += theirs.take(**ALL)
    assert [held.key for held in taken] == [first, second]

    back(one)
    assert not feed.has(first), "it must not be sent"
    feed.leave([first])
    one.settle([Settled(first, ["b@acme.example", "c@acme.example"])])
    assert one.find(first) == taken[0], "it is not settled"
    struck = one.strike(first, 1, "the session broke")
    assert struck is not None and (struck.strikes, struck.state) == (0, State.WAITING)
    feed.close()
    assert one.feed("acme").take(**ALL) == [], "it lets nothing go that is another's"
    assert theirs.has(first) and theirs.has(second)
    other.settle([Settled(held.key, held.envelope.recipients) for held in taken])
    assert one.listing() == []


def test_an_answer_counts_if_no_one_else_has_the_message(nodes: Nodes, soon: None) -> None:
    """The customer has it; that its process was not heard of meanwhile changes nothing of that."""
    one, other = nodes.start(), nodes.start()
    [[key]] = one.put([arrival("b@acme.example")])
    feed = one.feed("acme")
    [held] = feed.take(**ALL)
    feed.leave([key])
    cut_off(one)
    until(lambda: nodes.rows("SELECT count(*) FROM hold_nodes") == [(1,)])
    back(one)
    one.settle([Settled(key, held.envelope.recipients)])
    assert other.listing() == []


def test_a_session_goes_on_after_its_process_was_cut_off(nodes: Nodes, soon: None) -> None:
    one = nodes.start()
    nodes.start()
    feed = one.feed("acme")
    [[key]] = one.put([arrival("b@acme.example")])
    assert len(feed.take(**ALL)) == 1
    cut_off(one)
    until(lambda: nodes.rows("SELECT count(*) FROM hold_nodes") == [(1,)])
    assert [held.key for held in feed.take(**ALL)] == [key], "under another number"
    assert feed.has(key)


# -- large messages --------------------------------------------------------------------------------


def test_large_messages_are_not_in_the_rows_that_come_and_go(nodes: Nodes) -> None:
    node = nodes.start()
    data = bytes(range(256)) * 4096
    [[key, other]] = node.put([arrival("b@acme.example", "b@other.example", data=data)])
    assert nodes.rows("SELECT length(body), chunks FROM hold_messages") == [(0, 4)]
    assert whole(node.load([key])[key]) == data
    node.settle([Settled(key, ["b@acme.example"])])
    assert whole(node.load([other])[other]) == data
    node.settle([Settled(other, ["b@other.example"])])
    assert nodes.rows("SELECT count(*) FROM hold_chunks") == [(0,)]


def test_what_the_disk_has_lost_of_a_message_is_not_held(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes into the database from a file that is not synced."""
    node = nodes.start()
    spool = node.spool()
    spool.write(b"x" * MIB)
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda *which: bytes(len(read(*which))))
    coming = arrival("b@acme.example")
    coming = Arrival(coming.envelope, coming.accounts, coming.content, spool)
    with pytest.raises(OSError, match="what was written is not what is read"):
        node.put([coming])
    assert node.listing() == []
    assert nodes.rows("SELECT count(*) FROM hold_chunks") == [(0,)]


def test_a_large_message_is_never_whole_in_memory(nodes: Nodes) -> None:
    """Measured in a process of its own."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from salmon_revsmtp.provider.hold.postgres import PostgresStore
        from salmon_revsmtp.provider.hold.store import Arrival, Settled
        from salmon_revsmtp.smtp.envelope import Envelope
        store = PostgresStore(sys.argv[1], Path(sys.argv[2]))
        def most():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        def work(mib):
            spool = store.spool()
            line = b"x" * 1022 + b"\\r\\n"
            for _ in range(mib):
                spool.write(line * 1024)
            envelope = Envelope("a@example.net", ("b@acme.example",))
            [[key]] = store.put([Arrival(envelope, ("acme",), [b"Received: x\\r\\n"], spool)])
            content = store.load([key])[key]
            octets = sum(map(len, content.pieces()))
            assert octets == content.size == mib * 2**20 + 13, octets
            store.settle([Settled(key, ["b@acme.example"])])
        work(2)
        before = most()
        work(100)
        print(most() - before)
        assert not list((Path(sys.argv[2]) / "tmp").iterdir())
        store.close()
    """
    command = [sys.executable, "-c", code, nodes.url, str(nodes._folder / "apart")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20, "MiB more for a message of 100"


def test_a_large_message_of_which_a_piece_is_missing_keeps_no_other_back(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    node = nodes.start()
    [[lost], [kept]] = node.put(
        [arrival("b@acme.example", data=b"x" * MIB), arrival("b@acme.example")]
    )
    nodes.execute("DELETE FROM hold_chunks WHERE number = 2")
    for _ in range(2):
        assert list(node.load([lost, kept])) == [kept]
    held = node.find(lost)
    assert held is not None and held.state is State.ASIDE
    assert "not whole" in held.reason and "a@example.net" in caplog.text


def test_what_is_sent_while_another_settles_it_is_sent_whole(nodes: Nodes) -> None:
    node = nodes.start()
    data = (b"x" * 78 + b"\r\n") * 10_000
    [[key]] = node.put([arrival("b@acme.example", data=data)])
    content = node.load([key])[key]
    assert not isinstance(content, bytes)
    node.settle([Settled(key, ["b@acme.example"])])
    assert whole(content) == data


# -- wake-ups --------------------------------------------------------------------------------------


@contextlib.contextmanager
def overheard(nodes: Nodes) -> Iterator[list[str]]:
    """The notifications of all."""
    heard: list[str] = []
    [[channel]] = nodes.rows(
        "SELECT 'salmon_revsmtp_' || oid FROM pg_namespace WHERE nspname = current_schema()"
    )
    ending = threading.Event()
    with nodes.cluster.connection() as connection:
        connection.execute(f'LISTEN "{channel}"'.encode())

        def listen() -> None:
            while not ending.is_set():
                heard.extend(one.payload for one in connection.notifies(timeout=0.05))

        listening = threading.Thread(target=listen)
        listening.start()
        yield heard
        ending.set()
        listening.join()


def test_mail_on_one_host_wakes_another_at_once(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "RENEW", 3600.0)  # no one looks without a wake-up
    one, other = nodes.start(), nodes.start()
    feed = other.feed("acme")
    assert feed.take(**ALL) == []
    heard = threading.Event()
    other.watch(lambda names: heard.set() if "acme" in names else None)
    for _ in range(10):
        heard.clear()
        [[key]] = one.put([arrival("b@acme.example")])
        assert heard.wait(LONG)
        assert [held.key for held in feed.take(**ALL)] == [key]


def test_many_wake_ups_are_few_notifications(nodes: Nodes) -> None:
    node = nodes.start()
    with overheard(nodes) as heard:
        began = time.monotonic()
        for number in range(200):
            node.put([arrival(f"b@a{number % 50}.example") for _ in range(5)])
        gathered = (time.monotonic() - began) / wakeups.GATHER
        node.put([arrival("b@last.example")])
        until(lambda: any("last" in one for one in heard))
        assert len(heard) <= gathered + 2
        named = {name for one in heard for name in one.split("\n")[1:]}
        assert named == {"last", *(f"a{number}" for number in range(50))}


def test_a_host_that_takes_mail_for_very_many_wakes_all(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups, "OCTETS", 100)
    monkeypatch.setattr(wakeups, "MOST", 3)
    one, other = nodes.start(), nodes.start()
    feed = other.feed("acme")
    heard = threading.Event()
    other.watch(lambda names: heard.set() if set(names) == {"acme"} else None)
    names = [f"b@a{number}.example" for number in range(200)]
    one.put([arrival(name) for name in [*names, "b@acme.example"]])
    assert heard.wait(LONG)
    assert len(feed.take(**ALL)) == 1


def test_mail_of_which_no_wake_up_was_heard_is_found(
    nodes: Nodes, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wakeups.Wakeups, "tell", lambda self, accounts: None)
    one, other = nodes.start(), nodes.start()
    feed = other.feed("acme")
    woken: list[set[str]] = []
    other.watch(lambda names: woken.append(set(names)))
    one.put([arrival("b@acme.example"), arrival("b@others.example")])
    until(lambda: {"acme"} in woken)
    assert len(feed.take(**ALL)) == 1


def test_wake_ups_come_again_after_the_listening_connection_was_lost(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "RENEW", 3600.0)
    monkeypatch.setattr(wakeups, "AGAIN", 0.05)
    one, other = nodes.start(), nodes.start()
    feed = other.feed("acme")
    heard = threading.Event()
    other.watch(lambda names: heard.set())
    nodes.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name = 'salmon-revsmtp'"
    )
    assert heard.wait(LONG), "what was said meanwhile may be lost, so all are woken"
    heard.clear()
    one.put([arrival("b@acme.example")])
    assert heard.wait(LONG)
    until(lambda: len(feed.take(**ALL)) == 1)


def test_no_notification_is_part_of_what_holds_or_hands_over_mail(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its commit it waits for those of all others."""
    said: list[str] = []
    execute = Transaction._execute

    def noted(self: Transaction, query: str, values: tuple[Any, ...]) -> Any:
        said.append(query)
        return execute(self, query, values)

    monkeypatch.setattr(Transaction, "_execute", noted)
    node = nodes.start()
    with overheard(nodes) as heard:
        node.put([arrival("b@acme.example")])
        feed = node.feed("acme")
        feed.take(**ALL)
        feed.close()
        until(lambda: any("acme" in one for one in heard))
    assert any("hold_put" in one for one in said)
    assert not any("notify" in one.lower() for one in said)


def test_behind_a_pooler_that_shares_connections(
    nodes: Nodes,
    chroot: Callable[[str], Path],
    soon: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It swallows LISTEN, and gives each transaction another connection."""
    monkeypatch.setattr(wakeups, "ECHO", 0.5)
    root = chroot("pgbouncer")
    with PgBouncer(root, nodes.cluster.port, USER, PASSWORD, nodes.schema) as pooler:
        secret = quote(PASSWORD, safe="")
        url = f"postgresql://{USER}:{secret}@127.0.0.1:{pooler.port}/postgres"
        one, other = nodes.start(url), nodes.start(url)
        feed = other.feed("acme")
        woken = threading.Event()
        other.watch(lambda names: woken.set() if "acme" in names else None)
        data = (b"x" * 78 + b"\r\n") * 10_000
        until(lambda: "notifications are swallowed" in caplog.text)
        woken.clear()
        for _ in range(20):  # so often that a statement would be prepared
            one.put([arrival("b@acme.example"), arrival("b@acme.example", data=data)])
        assert woken.wait(LONG), "it is found without a wake-up"
        taken = feed.take(**ALL)
        assert len(taken) == 40
        assert whole(other.load([taken[1].key])[taken[1].key]) == data
        other.settle([Settled(held.key, held.envelope.recipients) for held in taken])
        until(lambda: one.usages() == {} and one.listing() == [])
        for node in (one, other):
            node.close()
            nodes.open.remove(node)


# -- the clock -------------------------------------------------------------------------------------


def test_the_clock_goes_by_what_has_passed(nodes: Nodes) -> None:
    one, other = nodes.start(), nodes.start()
    assert abs(one.now() - time.time()) < 60
    assert abs(one.now() - other.now()) < 5
    # As if the server's clock were set forward by ten years: it says that much more than before.
    nodes.execute("UPDATE hold_clock SET wall = wall - 10 * 365 * 86400.0")
    before = one.now()
    one._tick()
    assert one.now() - before < 86400 + 60
    nodes.execute("UPDATE hold_clock SET wall = wall + 10 * 365 * 86400.0")
    before = one.now()
    one._tick()
    assert -1 < one.now() - before < 60
