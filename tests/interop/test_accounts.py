"""A provider on two nodes before a real PostgreSQL, with the accounts in its database: what one
node, a command or plain SQL changes there every node knows within a second, and what the nodes tell
one another of sessions and failed logins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
from support.calling import called, log_in, push_session
from support.configuration import PASSWORD
from support.dialogue import Dialogue
from support.postgres import Cluster, programs
from support.processes import LONG
from support.project import Project
from support.salmon import Salmon
from support.tls import CERTIFICATE, PRIVATE_KEY
from support.world import World, world

from salmon_revsmtp.cli.passwords import verifier_of
from salmon_revsmtp.provider import logins, server
from salmon_revsmtp.provider.hold.postgres import PostgresStore, nodes
from salmon_revsmtp.provider.hold.postgres import accounts as table
from salmon_revsmtp.provider.hold.postgres import database as connections
from salmon_revsmtp.provider.hold.store import Arrival, HoldStoreError
from salmon_revsmtp.provider.nodes import NodeSession
from salmon_revsmtp.server.provider_requests import ProviderRequests
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.verifier import Verifier

pytestmark = pytest.mark.interop

# Seconds in which a change is known for certain.  A second is promised; a machine that does much
# else takes longer, and to learn of it in any other way takes longer still.
SOON = 30.0


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    table.close_all()


@pytest.fixture
def own(database: Cluster) -> Iterator[Cluster]:
    """A server that no other test has; ``database`` says whether there is one."""
    found = programs()
    assert isinstance(found, Path)
    with Cluster(found) as cluster:
        yield cluster


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is away is not waited for as long as usual."""
    monkeypatch.setattr(connections, "WAIT", 1.0)
    monkeypatch.setattr(connections, "TRY", 1.0)


def url_of(cluster: Cluster) -> str:
    return cluster.url(cluster.schema())


def add(url: str, name: str = "acme", *domains: str, **keys: Any) -> None:
    verifier = verifier_of(PASSWORD)
    domains = domains or ("example.org",)
    table.accounts_at(url).add(
        {"name": name, "password": verifier, "domains": list(domains), **keys}
    )


def change(url: str, name: str = "acme", **keys: Any) -> None:
    assert table.accounts_at(url).edit(name, lambda before: {**before, **keys}) is not None


class Two:
    """Two nodes."""

    def __init__(self, first: World, second: World, url: str) -> None:
        self.first, self.second, self.url = first, second, url


def on_two(
    salmon: Salmon, url: str, work: Callable[[Two], Awaitable[None]], **options: Any
) -> None:
    async def main() -> None:
        options.setdefault("accounts", [])
        async with (
            world(salmon, provider={"hold": url}, folder=_folder(salmon, "one"), **options) as one,
            world(salmon, provider={"hold": url}, folder=_folder(salmon, "two"), **options) as two,
        ):
            await work(Two(one, two, url))

    asyncio.run(main())


def _folder(salmon: Salmon, name: str) -> Path:
    folder = salmon.folder / name
    (folder / "run").mkdir(parents=True)
    return folder


async def code(here: World, *recipients: str) -> int:
    try:
        await here.send(*recipients)
    except aiosmtplib.SMTPRecipientsRefused as error:
        return error.recipients[0].code
    except aiosmtplib.SMTPResponseException as error:
        return error.code
    return 250


async def login(here: World, name: str = "acme", password: str = PASSWORD) -> str:
    async with called(here.odmr) as customer:
        return (await log_in(customer, name, password))[:3]


async def take(customer: Dialogue, answer: str = "250 taken") -> None:
    await customer.asks("MAIL", "250 ok")
    await customer.asks("RCPT", "250 ok")
    await customer.asks("DATA", "354 go on")
    while await customer.hear() != ".":
        pass
    customer.say(answer)


async def until(so: Callable[[], Awaitable[bool]], seconds: float = LONG) -> float:
    """Wait until something is so; returns how long that took."""
    began = time.monotonic()
    while not await so():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.02)
    return time.monotonic() - began


# -- accounts --------------------------------------------------------------------------------------


def test_an_account_is_soon_known_to_every_node(salmon: Salmon, database: Cluster) -> None:
    async def work(here: Two) -> None:
        both = (here.first, here.second)
        assert [await code(one, "b@example.org") for one in both] == [550, 550]
        assert [await login(one) for one in both] == ["535", "535"]
        await asyncio.to_thread(add, here.url, push=False)

        async def all_take() -> bool:
            return all([await code(one, "b@example.org") == 250 for one in both])

        await until(all_take, SOON)
        assert [await login(one) for one in both] == ["235", "235"]
        await asyncio.to_thread(change, here.url, domains=["example.com"], enabled=False)

        async def all_refuse() -> bool:
            return all([await code(one, "b@example.org") == 550 for one in both])

        await until(all_refuse, SOON)
        assert [await code(one, "b@example.com") for one in both] == [250, 250]
        assert [await login(one) for one in both] == ["535", "535"]
        await asyncio.to_thread(table.accounts_at(here.url).remove, "acme")

        async def none_takes() -> bool:
            return all([await code(one, "b@example.com") == 550 for one in both])

        await until(none_takes, SOON)

    on_two(salmon, url_of(database), work)


def test_an_account_is_asked_for_once_as_long_as_none_changes(
    salmon: Salmon, database: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hosts tell one another of changes, so what was said counts until then."""
    url, asked = url_of(database), Counter[str]()
    of_domain = table.PostgresAccounts.of_domain

    def counted(accounts: table.PostgresAccounts, domain: str) -> table.Keys | None:
        asked[domain] += 1
        return of_domain(accounts, domain)

    monkeypatch.setattr(table.PostgresAccounts, "of_domain", counted)
    add(url)

    async def work(here: Two) -> None:
        until_then = time.monotonic() + 2.5
        while time.monotonic() < until_then:
            assert await code(here.first, "b@example.org") == 250
            await asyncio.sleep(0.2)
        # A machine that does much else may look too late now and then.
        assert asked["example.org"] <= 2

    on_two(salmon, url, work)


CHANGES = {
    "a disabled account": "UPDATE hold_accounts SET enabled = false WHERE name = 'acme'",
    "another password": f"UPDATE hold_accounts SET password = '{verifier_of('another')}' "
    "WHERE name = 'acme'",
    "an account that is gone": "DELETE FROM hold_accounts WHERE name = 'acme'",
    "no push": "UPDATE hold_accounts SET push = 'false' WHERE name = 'acme'",
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("told", [True, False], ids=["notified", "polled"])
def test_a_session_soon_ends_on_whichever_node_it_is(
    salmon: Salmon, database: Cluster, monkeypatch: pytest.MonkeyPatch, what: str, told: bool
) -> None:
    """Also where the change was made by SQL, and no one asks for the account of itself."""
    monkeypatch.setattr(server, "ASK_AGAIN", 1000.0)
    schema = database.schema()
    url = database.url(schema)
    add(url)
    add(url, "other", "example.com")
    if told:
        monkeypatch.setattr(nodes, "LOOK", 1000.0)
    else:
        monkeypatch.setattr(nodes, "_CHANNEL", "'no_one_notifies_here'")

    async def work(here: Two) -> None:
        async with (
            push_session(here.second.odmr) as customer,
            push_session(here.first.odmr, "other"),
        ):
            began = time.monotonic()
            await asyncio.to_thread(database.execute, CHANGES[what], schema)
            await customer.left()
            assert time.monotonic() - began < SOON
            assert len(here.first.daemon.sessions) == 1, "the other account is what it was"

    on_two(salmon, url, work)


def test_a_domain_is_of_one_account_also_when_two_nodes_add_it_at_once(database: Cluster) -> None:
    """Of many that come at the same time one has it, and the others hear whose it is."""
    url = url_of(database)
    makers = [table.PostgresAccounts(url) for _ in range(4)]
    verifier, start = verifier_of(PASSWORD), threading.Barrier(4)
    said: list[str] = []

    def make(number: int) -> None:
        start.wait(LONG)
        domains = ["example.org", f"{number}.example.org"]
        try:
            keys = {"name": f"n{number}", "password": verifier, "domains": domains}
            makers[number].add(keys)
            said.append("mine")
        except table.DomainTakenError as error:
            said.append(f"{error.domain} of {error.owner}")

    threads = [threading.Thread(target=make, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [there] = makers[0].all()
    assert sorted(said) == sorted(["mine"] + [f"example.org of {there['name']}"] * 3)
    with pytest.raises(table.NameTakenError):
        makers[1].add({**there, "domains": ["example.com"]})
    assert makers[2].edit(there["name"], lambda keys: {**keys, "domains": ["example.com"]})
    assert makers[3].of_domain("example.org") is None
    for one in makers:
        one.close()


def test_all_keys_are_kept_and_what_was_not_given_is_the_default(database: Cluster) -> None:
    url = url_of(database)
    keys = {
        "name": "acme",
        "password": verifier_of(PASSWORD),
        "domains": ["example.org", "example.com"],
        "enabled": False,
        "quota_messages": 10,
        "quota_bytes": 1 << 40,
        "hold_days": 2.5,
        "warn_hours": 4.0,
        "push": "always",
        "live": False,
        "sessions": 3,
        "etrn": "mail.example.org:25",
    }
    there = table.accounts_at(url)
    there.add(keys)
    assert there.find("acme") == there.of_domain("example.com") == keys
    short = {one: keys[one] for one in ("name", "password", "domains", "enabled")}
    assert there.edit("acme", lambda _: short) == short
    assert there.find("acme") == short
    for push in (True, False):
        there.edit("acme", lambda keys, push=push: {**keys, "push": push})  # type: ignore[misc]
        found = there.find("acme")
        assert found is not None and found["push"] is push
    assert there.find("acm") is there.of_domain("example.net") is None


def test_all_are_listed_however_many_they_are(
    database: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "PAGE", 3)
    url = url_of(database)
    for number in range(7):
        add(url, f"n{number}", f"{number}.example.org")
    assert [one["name"] for one in table.accounts_at(url).all()] == [f"n{n}" for n in range(7)]


def test_no_password_gets_into_the_database(database: Cluster) -> None:
    schema = database.schema()
    with pytest.raises(OSError, match="hold_accounts_password_check"):
        table.accounts_at(database.url(schema)).add(
            {"name": "acme", "password": PASSWORD, "domains": ["example.org"]}
        )
    assert database.rows("SELECT FROM hold_accounts", schema) == []


def test_an_older_program_refuses_tables_that_a_newer_one_has_made(database: Cluster) -> None:
    schema = database.schema()
    url = database.url(schema)
    add(url)
    newer = len(table.MIGRATIONS) + 1
    database.execute(f"UPDATE hold_account_schema SET version = {newer}", schema)
    with pytest.raises(HoldStoreError, match=f"version {newer}.*newer salmon-revsmtp has been"):
        table.PostgresAccounts(url)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "crash"])
def test_while_the_database_is_away_no_one_is_refused_for_good(
    salmon: Salmon, own: Cluster, soon: None, how: signal.Signals
) -> None:
    url = url_of(own)
    add(url)

    async def work(here: Two) -> None:
        both = (here.first, here.second)
        assert [await code(one, "b@example.org") for one in both] == [250, 250]
        async with push_session(here.first.odmr) as customer:
            for _ in range(2):
                await take(customer)
            await here.first.until(lambda: not here.first.held())
            await asyncio.to_thread(own.stop, how)
            await asyncio.sleep(1.1)  # what was known before counts for a second
            for one in both:
                assert await code(one, "b@example.org") == 451
                assert await code(one, "b@elsewhere.example") == 451
                assert await login(one) == "454"
                assert await login(one, "nobody") == "454"
            assert len(here.first.daemon.sessions) == 1, "a session that is open stays"
            await asyncio.to_thread(own.start)

            async def works() -> bool:
                return await code(here.second, "b@example.org") == 250

            await until(works)
            await take(customer)
            assert await code(here.second, "b@elsewhere.example") == 550
            assert await login(here.first, "nobody") == "535"
            assert await login(here.second) == "235"

    on_two(salmon, url, work)


# -- sessions --------------------------------------------------------------------------------------


def test_the_newest_session_wins_across_nodes(
    salmon: Salmon, database: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    url = url_of(database)
    add(url)

    async def work(here: Two) -> None:
        async with push_session(here.first.odmr) as older:
            assert await code(here.second, "b@example.org") == 250
            await take(older)
            began = time.monotonic()
            async with push_session(here.second.odmr) as newer:
                await older.left()
                assert time.monotonic() - began < SOON
                await here.first.until(lambda: not here.first.daemon.sessions)
                assert await code(here.first, "b@example.org") == 250
                await take(newer)
                async with push_session(here.first.odmr):
                    await newer.left()

    with caplog.at_level(logging.WARNING):
        on_two(salmon, url, work)
    gave_way = [one for one in caplog.messages if "gives way to a newer one at another host" in one]
    assert len(gave_way) == 2


def test_what_the_older_session_had_under_way_goes_down_the_newer_one(
    salmon: Salmon, database: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session without push that finds nothing else waits for it, and does not hear 453."""
    url = url_of(database)
    add(url, live=False)

    async def work(here: Two) -> None:
        async with push_session(here.first.odmr) as older:
            assert await code(here.first, "b@example.org") == 250
            await older.hear("MAIL")
            async with called(here.second.odmr) as newer:
                assert await log_in(newer) == "235 2.7.0 welcome"
                newer.say("ATRN")
                await newer.replied(250)
                newer.say("220 customer")
                await newer.asks("EHLO", "250 HELP")
                await take(newer)
                await newer.asks("QUIT", "221 bye")

    monkeypatch.setattr("salmon_revsmtp.provider.connection.REPLACED_GRACE", 0.5)
    on_two(salmon, url, work)


def test_as_many_sessions_as_the_account_may_have(salmon: Salmon, database: Cluster) -> None:
    url = url_of(database)
    add(url, sessions=2)

    async def work(here: Two) -> None:
        async with (
            push_session(here.first.odmr) as one,
            push_session(here.second.odmr) as two,
            push_session(here.second.odmr),
        ):
            await one.left()
            assert len(here.second.daemon.sessions) == 2
            async with push_session(here.first.odmr):
                await two.left()

    on_two(salmon, url, work)


def test_live_is_on_the_node_that_has_the_session_and_another_holds_and_wakes_it(
    salmon: Salmon, database: Cluster
) -> None:
    url = url_of(database)
    add(url)

    async def work(here: Two) -> None:
        async with push_session(here.second.odmr) as customer:
            assert await code(here.first, "b@example.org") == 250
            began = time.monotonic()
            await take(customer)
            assert time.monotonic() - began < SOON
            assert here.first.collector.providing.live.counts == {}
            sending = asyncio.create_task(code(here.second, "b@example.org"))
            await customer.asks("MAIL", "250 ok")
            await customer.asks("RCPT", "550 5.1.1 no such mailbox")
            assert await sending == 550
            assert here.second.collector.providing.live.counts["recipient refused"] == 1

    on_two(salmon, url, work)


class Told:
    """What a node is told."""

    def __init__(self) -> None:
        self.yielding: set[int] = set()

    def accounts_changed(self, names: Collection[str] | None) -> None:
        pass

    def accounts_seen(self, at: float) -> None:
        pass

    def gave_way(self, numbers: Collection[int]) -> None:
        self.yielding.update(numbers)

    def logins_failed(self, network: str, number: int, ago: float) -> None:
        pass


def session(peer: str = "192.0.2.1:1") -> NodeSession:
    return NodeSession("acme", peer, time.time(), True)


def wait_until(so: Callable[[], object]) -> None:
    give_up = time.monotonic() + LONG
    while True:
        with contextlib.suppress(OSError):
            if so():
                return
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_what_the_database_forgets_in_a_crash_is_told_again(own: Cluster, soon: None) -> None:
    """And a session that began while it was away is compared with the others then."""
    url, told = url_of(own), Told()
    here, there = nodes.PostgresNodes(url), nodes.PostgresNodes(url)
    here.watch(told)
    there.watch(Told())
    here.begin(1, session())
    assert [one.account for one in there.sessions()] == ["acme"]
    own.stop(signal.SIGQUIT)
    with pytest.raises(OSError):
        there.begin(1, session("192.0.2.1:2"))
    assert told.yielding == set()
    own.start()
    wait_until(lambda: told.yielding == {1})
    here.end(1)
    wait_until(lambda: not there.sessions() and here.sessions()[0].peer == "192.0.2.1:2")
    for one in (here, there):
        one.close()


def test_of_many_sessions_that_begin_at_once_on_all_nodes_one_is_left(database: Cluster) -> None:
    """Each of the others is told of, and none waits for another without end."""
    schema = database.schema()
    url = database.url(schema)
    hosts, told = [nodes.PostgresNodes(url) for _ in range(3)], [Told() for _ in range(3)]
    for host, one in zip(hosts, told, strict=True):
        host.watch(one)

    def begin(host: nodes.PostgresNodes) -> None:
        for number in range(1, 16):
            host.begin(number, session())

    threads = [threading.Thread(target=begin, args=[host]) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: sum(len(one.yielding) for one in told) == 3 * 15 - 1)
    [[newest]] = database.rows(
        "SELECT node FROM hold_sessions ORDER BY began DESC, node, number LIMIT 1", schema
    )
    assert database.rows("SELECT node FROM hold_sessions WHERE NOT gives_way", schema) == [
        (newest,)
    ]
    for host in hosts:
        host.close()


def test_a_node_that_is_not_heard_of_keeps_no_one_out(
    database: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sessions count no more, and are compared with the others when it is back."""
    monkeypatch.setattr(nodes, "DEAD", 2)
    monkeypatch.setattr(
        nodes, "_GIVE_WAY", nodes._GIVE_WAY.replace("interval '10 seconds'", "interval '2 seconds'")
    )
    url, told = url_of(database), Told()
    here, there = nodes.PostgresNodes(url), nodes.PostgresNodes(url)
    here._told = told  # it is heard of when the test says so
    here._look()
    here.begin(1, session())
    there.watch(Told())
    assert [one.account for one in there.sessions()] == ["acme"]
    wait_until(lambda: not there.sessions())
    assert there.begin(1, session("192.0.2.1:2")) == []
    assert told.yielding == set()
    here._look()
    assert told.yielding == {1}
    for one in (here, there):
        one.close()


def test_provider_sessions_shows_those_of_other_hosts(salmon: Salmon, database: Cluster) -> None:
    url = url_of(database)
    add(url)

    async def work(here: Two) -> None:
        async with push_session(here.second.odmr):
            for one, own in ((here.first, False), (here.second, True)):
                requests = ProviderRequests(one.collector.providing, one.daemon.provider)
                answers = requests.answer({"do": "provider sessions"})
                [row] = [found["session"] async for found in answers if "session" in found]
                assert (row["account"], row["push"], row["host"] is None) == ("acme", True, own)
                assert (await requests.holdings())["acme"].online == 1
                answers = requests.answer({"do": "provider accounts"})
                rows = [found["account"] async for found in answers if "account" in found]
                [account] = [found for found in rows if found["account"] == "acme"]
                assert (account["push"], account["peer"]) == (row["since"], row["peer"])
                assert account["last_seen"] is not None

    on_two(salmon, url, work)


# -- failed logins ---------------------------------------------------------------------------------


def test_failed_logins_count_across_nodes(
    salmon: Salmon, database: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logins, "MOST", 4)
    monkeypatch.setattr(logins, "FIRST_DELAY", 0.0)
    url = url_of(database)
    add(url)

    async def greeting(here: World) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.odmr)
        line = (await asyncio.wait_for(reader.readline(), LONG)).decode()
        writer.close()
        return line

    async def work(here: Two) -> None:
        for one in (here.first, here.second, here.first):
            assert await login(one, password="wrong") == "535"
        assert (await greeting(here.second)).startswith("220 ")
        assert await login(here.second, password="wrong") in ("535", "421")

        async def both_shut() -> bool:
            both = [await greeting(one) for one in (here.first, here.second)]
            return all(one.startswith("421 4.7.0 too many failed logins") for one in both)

        await until(both_shut, SOON + 1)

    on_two(salmon, url, work)


def test_failed_logins_count_on_a_node_while_the_database_is_away(
    salmon: Salmon, own: Cluster, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account is in the settings, so that it can be told that the password is wrong."""
    monkeypatch.setattr(logins, "MOST", 2)
    monkeypatch.setattr(logins, "FIRST_DELAY", 0.0)
    accounts = [{"name": "acme", "password": PASSWORD, "domains": ["example.org"]}]

    async def work(here: Two) -> None:
        await asyncio.to_thread(own.stop)
        heard = [await login(here.first, password="wrong") for _ in range(2)]
        assert heard == ["535", "421"]
        await asyncio.to_thread(own.start)

        async def shut() -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", here.second.odmr)
            line = await asyncio.wait_for(reader.readline(), LONG)
            writer.close()
            return line.startswith(b"421 ")

        await until(shut)

    on_two(salmon, url_of(own), work, accounts=accounts)


def test_what_no_one_needs_any_more_goes(
    database: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = database.schema()
    one = nodes.PostgresNodes(database.url(schema))
    one._told = Told()
    database.execute(
        "INSERT INTO hold_login_failures (node, network, failures, at) VALUES "
        "(1, '192.0.2.1', 1, now() - interval '1 hour'), (1, '192.0.2.2', 1, now());"
        "INSERT INTO hold_session_nodes VALUES (1, 'dead 1', now() - interval '1 hour');"
        "INSERT INTO hold_sessions VALUES (1, 1, 'acme', 'x', now(), true, NULL, 1)",
        schema,
    )
    one._look()
    assert database.rows("SELECT network FROM hold_login_failures", schema) == [("192.0.2.2",)]
    assert database.rows("SELECT FROM hold_sessions", schema) == []
    assert len(database.rows("SELECT FROM hold_session_nodes", schema)) == 1
    one.close()
    assert database.rows("SELECT FROM hold_session_nodes", schema) == []


# -- commands --------------------------------------------------------------------------------------


class Place:
    """A project whose accounts are in a database."""

    def __init__(self, project: Project, url: str, *settings: dict[str, Any]) -> None:
        self.project, self.url = project, url
        provider = {
            "hostname": "mx.example.net",
            "listen": "127.0.0.1:0",
            "hold": url,
            "tls_cert": str(CERTIFICATE),
            "tls_key": str(PRIVATE_KEY),
        }
        file = project.folder / "config/settings.py"
        text = file.read_text() if file.exists() else ""
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            f"{text}\ncustomer_accounts = {list(settings)!r}\nprovider = {provider!r}\n"
        )

    def run(
        self, *arguments: str, said: str = "", status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "salmon_revsmtp", "provider", *arguments],
            cwd=self.project.folder,
            input=said,
            capture_output=True,
            text=True,
            timeout=LONG,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def account(self, name: str) -> dict[str, Any] | None:
        return table.accounts_at(self.url).find(name)


@pytest.fixture
def place(project: Project, database: Cluster) -> Place:
    settings = {"name": "club", "password": PASSWORD, "domains": ["example.net"]}
    return Place(project, url_of(database), settings)


def test_the_life_of_an_account_by_commands(place: Place) -> None:
    add = ("accounts", "add", "acme", "--domain", "Example.ORG", "--domain", "b\u00fccher.example")
    done = place.run(*add, "--generate", "--hold-days", "7", "--push", "always")
    first, password, line = done.stdout.splitlines()
    assert first == "acme: added, for example.org, xn--bcher-kva.example"
    secret = password.removeprefix("password, for the customer: ")
    assert line.startswith(f"join line, for the customer: revsmtp://acme:{secret}@mx.example.net:")
    found = place.account("acme")
    assert found is not None and Verifier.parse(found["password"]) is not None
    assert (found["hold_days"], found["push"], found["enabled"]) == (7.0, "always", True)

    rows = [json.loads(one) for one in place.run("accounts", "--json").stdout.splitlines()]
    assert [(one["account"], one["from"]) for one in rows] == [
        ("club", "settings"),
        ("acme", "postgres"),
    ]
    shown = [one.split("\t")[:3] for one in place.run("accounts").stdout.splitlines()]
    assert shown == [
        ["name", "from", "domains"],
        ["club", "settings", "example.net"],
        ["acme", "postgres", "example.org, xn--bcher-kva.example"],
    ]
    join = place.run("join", "acme", "--password-stdin", said=f"{secret}\n")
    assert join.stdout.strip() == line.removeprefix("join line, for the customer: ")
    assert (
        "not the password"
        in place.run("join", "acme", "--password-stdin", said="wrong\n", status=1).stderr
    )
    assert "--password-stdin" in place.run("join", "acme", status=2).stderr

    assert place.run("accounts", "disable", "acme").stdout == "acme: disabled\n"
    assert place.run("accounts", "enable", "acme").stdout == "acme: enabled\n"
    done = place.run("accounts", "password", "acme", "--password-stdin", said="another one\n")
    assert "revsmtp://acme:another%20one@" in done.stdout
    assert place.run("accounts", "domains", "acme", "--add", "example.com").stdout.split() == [
        "example.org",
        "xn--bcher-kva.example",
        "example.com",
    ]
    place.run("accounts", "domains", "acme", "--remove", "b\u00fccher.example")
    assert place.run("accounts", "domains", "acme").stdout == "example.org\nexample.com\n"
    done = place.run("accounts", "set", "acme", "--quota-messages", "5", "--default", "push")
    assert done.stdout == "acme: quota_messages, push changed\n"
    found = place.account("acme")
    assert found is not None and found["quota_messages"] == 5 and "push" not in found
    assert place.run("accounts", "remove", "acme").stdout == "acme: removed\n"
    assert place.account("acme") is None


WRONG = [
    (
        ("add", "x", "--domain", "example.com", "--quota-messages", "many"),
        "account \"x\": quota_messages: found 'many', allowed: a whole number above 0",
    ),
    (("add", "x"), "say whose mail it gets, such as --domain example.org"),
    (
        ("add", "x", "--domain", "example.net"),
        "account \"x\": domains: 'example.net' is that of account 'club', allowed: a domain of one "
        "account only",
    ),
    (
        ("add", "x", "--domain", "example.org"),
        "account \"x\": domains: 'example.org' is that of account 'acme', allowed: a domain of one "
        "account only",
    ),
    (("add", "club", "--domain", "example.com"), "found in customer_accounts, too"),
    (("add", "acme", "--domain", "example.com"), "there is an account 'acme' in the database"),
    (("disable", "club"), "'club' is in customer_accounts of the settings: change it there"),
    (("enable", "nobody"), "no account in the database is named 'nobody'"),
    (("password", "nobody"), "no account in the database is named 'nobody'"),
    (("remove", "nobody"), "no account in the database is named 'nobody'"),
    (("domains", "nobody"), "no account in the database is named 'nobody'"),
    (("domains", "acme", "--remove", "example.com"), "'acme' has no domain 'example.com'"),
    (
        ("domains", "acme", "--remove", "example.org", "--remove", "example.com"),
        "'acme' has no domain 'example.com'; it has example.org",
    ),
    (("domains", "acme", "--remove", "example.org"), "'acme' would have no domain left"),
    (
        ("domains", "acme", "--add", "example.net"),
        "'example.net' is that of account 'club', allowed",
    ),
    (("set", "acme", "--push", "sometimes"), "push: found 'sometimes', allowed: True, False or"),
    (("set", "acme"), "say what to change"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_what_is_wrong_is_one_sentence_and_nothing_changes(
    place: Place, arguments: tuple[str, ...], said: str
) -> None:
    add(place.url)
    before = place.account("acme")
    options = ("--generate",) if arguments[0] in ("add", "password") else ()
    done = place.run("accounts", *arguments, *options, status=2)
    assert said in done.stderr and done.stdout == ""
    assert place.account("acme") == before
    assert len(list(table.accounts_at(place.url).all())) == 1


def test_an_account_with_mail_is_not_removed_unless_one_says_so(place: Place) -> None:
    add(place.url)
    with contextlib.closing(_store(place)) as store:
        envelope = Envelope("a@example.net", ("b@example.org",))
        store.put([Arrival(envelope, ("acme",), [b"Subject: x\r\n\r\nhello\r\n"])])
    done = place.run("accounts", "remove", "acme", status=1)
    assert "1 message is held for it" in done.stderr and place.account("acme") is not None
    place.run("accounts", "remove", "acme", "--leave-mail")
    [_, row] = [json.loads(one) for one in place.run("accounts", "--json").stdout.splitlines()]
    assert (row["account"], row["enabled"], row["from"], row["messages"]) == ("acme", None, None, 1)


def _store(place: Place) -> PostgresStore:
    return PostgresStore(place.url, place.project.folder / "run/hold")


def test_check_says_what_is_in_the_settings_and_in_the_database(place: Place) -> None:
    add(place.url, "club", "example.com")
    add(place.url, "acme", "example.net")
    done = subprocess.run(
        [sys.executable, "-m", "salmon_revsmtp", "check"],
        cwd=place.project.folder,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    shown = " ".join((done.stdout + done.stderr).split())
    assert "the name is in customer_accounts and elsewhere (plugin postgres), too" in shown
    assert "example.net is also that of account 'acme' elsewhere" in shown


def test_a_database_that_is_away_is_one_sentence_without_the_password(
    project: Project, own: Cluster
) -> None:
    place = Place(project, own.url(port=own.port))
    own.stop()
    done = place.run("accounts", "disable", "acme", status=1)
    assert "opening the hold store postgresql://" in done.stderr
    assert "s3cret" not in done.stderr


def test_without_psycopg_it_is_said_what_to_install(project: Project) -> None:
    place = Place(project, "postgresql://acme:s3cret@db.example.net/mail")
    with (project.folder / "config/settings.py").open("a") as settings:
        settings.write("import sys\nsys.modules['psycopg'] = None\n")
    for command in (("add", "acme", "--domain", "example.org"), ("remove", "acme")):
        done = place.run("accounts", *command, status=1)
        assert "pip install 'salmon-revsmtp[postgres]'" in done.stderr
        assert "s3cret" not in done.stderr


def test_accounts_of_a_provider_with_a_folder_are_in_its_settings(project: Project) -> None:
    place = Place(project, "run/hold", {"name": "a", "password": "b", "domains": ["example.org"]})
    done = place.run("accounts", "disable", "a", status=2)
    assert "the accounts of this provider are in customer_accounts of its settings" in done.stderr
