"""A provider on PostgreSQL while nodes are killed, and the database is restarted, frozen, cut off,
locked, full, or has no connection to spare.

Nothing is lost, a sender hears 451 (or 452, for a full disk) while its mail cannot be held, and all
goes on by itself.  The customer's handlers see nothing twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import smtplib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import aiosmtplib
import psycopg
import pytest
from support.configuration import agent_keys, configuration
from support.disk import Disk, small_disk
from support.postgres import Cluster, Standby, programs
from support.processes import LONG
from support.provider_process import ProviderProcess
from support.proxy import Direction, Proxy
from support.salmon import Salmon, waits_for
from support.sample import amount, chance
from support.servers import free_port
from support.world import World, world

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider import settling
from salmon_revsmtp.provider.hold.postgres import PostgresStore, database, lease, store
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon

pytestmark = pytest.mark.interop

MIB = 1024 * 1024
# One goes into the database in pieces.
LARGE = 300_000


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a limit has a short one."""
    monkeypatch.setattr(database, "_LIMITS", {"statement_timeout": 3, "lock_timeout": 1})
    monkeypatch.setattr(database, "ANSWER", 2)
    monkeypatch.setattr(database, "LOOK", 0.1)
    monkeypatch.setattr(database, "WAIT", 1.0)
    monkeypatch.setattr(database, "TRY", 1.0)
    monkeypatch.setattr(settling, "RETRY", 0.2)
    monkeypatch.setattr(lease, "LEASE", 3.0)
    monkeypatch.setattr(lease, "MARGIN", 1.0)
    monkeypatch.setattr(store, "RENEW", 0.5)


@pytest.fixture
def own(database: Cluster) -> Iterator[Cluster]:
    """A server that no other test has; ``database`` says whether there is one."""
    with Cluster(_programs(), max_connections="25", superuser_reserved_connections="0") as cluster:
        yield cluster


def _programs() -> Path:
    found = programs()
    assert isinstance(found, Path)
    return found


async def answer(here: World, subject: str, octets: int = 0) -> int:
    """Send a message; returns the code of its last reply."""
    line = b"x" * 70 + b"\r\n"
    data = f"Subject: {subject}\r\n\r\n".encode() + line * (octets // len(line))
    try:
        await here.send("b@example.org", data=data)
    except aiosmtplib.SMTPResponseException as error:
        return error.code
    return 250


async def until_taken(here: World, subject: str, octets: int = 0) -> None:
    """Send a message until it is taken, as a sender does that hears 4yz."""
    give_up = time.monotonic() + LONG
    while await answer(here, subject, octets) != 250:
        assert time.monotonic() < give_up


def subjects(here: World) -> list[str]:
    """Of what is held for acme."""
    found = [here.data(one) for one in here.held()]
    return [one.partition(b"Subject: ")[2].split()[0].decode() for one in found]


async def is_alive(here: World) -> None:
    """The server answers others, whatever the database does."""
    async with here.client() as client:
        client.say("NOOP")
        await asyncio.wait_for(client.replied(250), 1)


def with_database(
    salmon: Salmon, url: str, work: Callable[[World], object], octets: int = 0
) -> None:
    async def main() -> None:
        async with world(salmon, provider={"hold": url}) as here:
            assert await answer(here, "first", octets) == 250
            await work(here)  # type: ignore[misc]
            await until_taken(here, "last", octets)
            held = await asyncio.to_thread(subjects, here)
            assert held == ["first", "last"]

    asyncio.run(main())


# -- one node, and a database that is not there ----------------------------------------------------


@pytest.mark.parametrize("octets", [0, LARGE])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "crash"])
def test_the_database_is_restarted(
    salmon: Salmon,
    own: Cluster,
    soon: None,
    how: signal.Signals,
    octets: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(here: World) -> None:
        await asyncio.to_thread(own.stop, how)
        assert await answer(here, "no", octets) == 451
        await is_alive(here)
        assert here.store.usage("acme").messages == 1
        await here.until(lambda: "it is tried again all the time" in caplog.text)
        await asyncio.to_thread(own.start)
        await here.until(lambda: "it is back" in caplog.text)

    with caplog.at_level(logging.WARNING):
        with_database(salmon, own.url(), work, octets)


def test_the_database_says_nothing_any_more(salmon: Salmon, own: Cluster, soon: None) -> None:
    """It is frozen, as a machine that is suspended."""

    async def work(here: World) -> None:
        frozen = own.freeze()
        try:
            asked = asyncio.create_task(answer(here, "no"))
            await is_alive(here)
            assert await asked == 451
        finally:
            own.thaw(frozen)

    with_database(salmon, own.url(), work)


def test_a_server_stops_in_time_while_the_database_says_nothing(
    salmon: Salmon, own: Cluster, soon: None
) -> None:
    async def main() -> list[int]:
        async with world(salmon, provider={"hold": own.url()}) as here:
            assert await answer(here, "first") == 250
            return own.freeze()

    began = time.monotonic()
    frozen = asyncio.run(main())
    try:
        assert time.monotonic() - began < 30
    finally:
        own.thaw(frozen)
    assert own.rows("SELECT count(*) FROM hold_queue") == [(1,)]


def test_the_line_to_the_database_is_cut(salmon: Salmon, own: Cluster, soon: None) -> None:
    async def main() -> None:
        async with Proxy(own.port) as proxy:
            url = own.url("public", proxy.port)
            async with world(salmon, provider={"hold": url}) as here:
                assert await answer(here, "first") == 250
                for direction in Direction:
                    proxy.stall(direction)
                proxy.target = free_port()  # no one is there for new ones
                assert await answer(here, "no") == 451
                await is_alive(here)
                proxy.target = own.port
                await until_taken(here, "last")
                assert await asyncio.to_thread(subjects, here) == ["first", "last"]

    asyncio.run(main())


def test_what_mail_needs_is_locked(salmon: Salmon, own: Cluster, soon: None) -> None:
    async def work(here: World) -> None:
        with own.connection() as connection:
            connection.execute("BEGIN; LOCK TABLE hold_queue")
            asked = asyncio.create_task(answer(here, "no"))
            await is_alive(here)
            assert await asked == 451
            connection.execute("ROLLBACK")

    with_database(salmon, own.url(), work)


def test_the_database_has_no_connection_to_spare(salmon: Salmon, own: Cluster, soon: None) -> None:
    """Others have them all, when ours were ended."""

    async def work(here: World) -> None:
        with contextlib.ExitStack() as taken:
            one = taken.enter_context(own.connection())
            while one.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'salmon-revsmtp'"
            ).fetchall():
                with contextlib.suppress(psycopg.OperationalError):
                    while True:
                        taken.enter_context(own.connection())
            assert [await answer(here, "no") for _ in range(2)] == [451, 451]
            await is_alive(here)

    with_database(salmon, own.url(), work)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Where any user can reach it."""
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder), 250 * MIB) as mounted:
        yield mounted


def test_the_disk_of_the_database_is_full(
    salmon: Salmon, database: Cluster, disk: Disk, soon: None
) -> None:
    """A sender hears 452, or 451 where the server even ends for want of room."""

    async def work(here: World) -> None:
        disk.fill()
        for _ in range(3):
            assert await answer(here, "no", 20 * MIB) in (451, 452)
        await is_alive(here)
        disk.empty()

    with Cluster(_programs(), disk.folder) as cluster:
        with_database(salmon, cluster.url(), work, 4 * MIB)


def test_answers_while_the_database_is_away_are_settled_when_it_is_back(
    salmon: Salmon, own: Cluster, soon: None
) -> None:
    """The customer has them.  It gets none of them again, and none stays."""
    go = threading.Event()
    salmon.handle(".*", waits_for(go))

    async def main() -> None:
        async with world(salmon, provider={"hold": own.url()}) as here:
            for number in range(5):
                assert await answer(here, f"m{number}") == 250
            plugins = Plugins.load()
            valid = configuration(agent_keys(here.odmr, every=0.005, push=True), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay, _beside(salmon)) as collector:
                daemon = Daemon(collector, plugins)
                running = asyncio.create_task(daemon.run())
                await here.until(lambda: bool(salmon.handled))
                await asyncio.to_thread(own.stop)
                go.set()
                await here.until(lambda: len(salmon.handled) == 5)
                await asyncio.to_thread(own.start)
                await here.until(lambda: not here.store.usages())
                await until_taken(here, "m5")
                await here.until(lambda: len(salmon.handled) == 6)
                daemon.stop()
                await asyncio.wait_for(running, LONG)

    asyncio.run(main())
    assert Counter(str(one["Subject"]) for one in salmon.handled).most_common(1)[0][1] == 1


def _beside(salmon: Salmon) -> Path:
    """The customer's project; the provider is in this process, too."""
    folder = salmon.folder / "customer"
    (folder / "run").mkdir(parents=True)
    return folder


def test_a_standby_takes_over(salmon: Salmon, own: Cluster, soon: None) -> None:
    """What a sender heard 250 for is there, and what customers had is no one's."""

    async def main() -> None:
        with Standby(own) as standby:
            await asyncio.to_thread(wait_until_synchronous, own)
            first, second = f"127.0.0.1:{own.port}", f"127.0.0.1:{standby.port}"
            url = own.url("public", own.port).replace(first, f"{first},{second}")
            hold = f"{url}&target_session_attrs=read-write"
            async with world(salmon, provider={"hold": hold}) as here:
                for number in range(10):
                    assert await answer(here, f"m{number}", LARGE if number == 3 else 0) == 250
                taken = here.store.feed("acme").take(5, MIB * 100)
                assert len(taken) == 5
                await asyncio.to_thread(own.stop, signal.SIGQUIT)
                assert await answer(here, "no") == 451
                await asyncio.to_thread(standby.promote)
                await until_taken(here, "m10")
                assert await asyncio.to_thread(subjects, here) == [f"m{n}" for n in range(11)]
                feed = here.store.feed("acme")
                await here.until(lambda: bool(feed.take(100, MIB * 100)))

    asyncio.run(main())


def wait_until_synchronous(cluster: Cluster) -> None:
    give_up = time.monotonic() + LONG
    while cluster.rows("SELECT sync_state FROM pg_stat_replication") != [("sync",)]:
        assert time.monotonic() < give_up
        time.sleep(0.02)


# -- two nodes -------------------------------------------------------------------------------------


class World2:
    """Two nodes before one database, senders that send to either, and a customer that has a push
    session with either."""

    def __init__(self, salmon: Salmon, cluster: Cluster, lease: float | None = 2.0) -> None:
        self.salmon = salmon
        self.schema = cluster.schema()
        self.url = cluster.url(self.schema)
        self.nodes = [
            ProviderProcess(salmon.folder / name, hold=self.url, lease=lease) for name in "ab"
        ]
        self.sent: Counter[str] = Counter()
        self.heard: set[str] = set()
        self._numbers = iter(range(1_000_000))

    def __enter__(self) -> World2:
        self.store = PostgresStore(self.url, self.salmon.folder / "observer")
        return self

    def __exit__(self, *error: object) -> None:
        self.store.close()
        for one in self.nodes:
            one.__exit__(None, None, None)

    def send(self, node: int, octets: int = 0) -> bool:
        """Send one message to a node; whether 250 was heard."""
        subject = f"m{next(self._numbers)}"
        data = f"From: a@example.net\r\nSubject: {subject}\r\n\r\n".encode()
        data += (b"x" * 70 + b"\r\n") * (octets // 72)
        try:
            with smtplib.SMTP("127.0.0.1", self.nodes[node].mx, timeout=LONG) as client:
                client.sendmail("a@example.net", ["b@example.org"], data)
        except (OSError, smtplib.SMTPException):
            return False
        self.heard.add(subject)
        return True

    def handled(self) -> Counter[str]:
        return Counter(str(one["Subject"]) for one in self.salmon.handled)

    def held(self) -> set[str]:
        found = set()
        for one in self.store.listing(messages=100_000):
            for data in self.store.load([one.key]).values():
                start = data if isinstance(data, bytes) else data.beginning(2000)
                found.add(start.partition(b"Subject: ")[2].split()[0].decode())
        return found

    def check(self) -> None:
        """Each message of which 250 was heard is held, or handled."""
        heard = set(self.heard)
        held = self.held()
        lost = heard - held - set(self.handled())
        # What another node settles while it is read is neither; it has been handled by now.
        assert not lost - set(self.handled()), "a message is lost"

    def with_a_customer(self, work: Callable[[], None]) -> None:
        """Do something in a thread while the customer has a push session with each node."""
        self.salmon.handle(".*")

        async def main() -> None:
            plugins = Plugins.load()
            agents = [
                agent_keys(node.odmr, name=f"node{number}", every=0.005)
                for number, node in enumerate(self.nodes)
            ]
            valid = configuration(*agents, plugins=plugins)
            with Collector(valid, plugins, lambda: self.salmon.relay) as collector:
                daemon = Daemon(collector, plugins)
                running = asyncio.create_task(daemon.run())
                try:
                    await asyncio.to_thread(work)
                finally:
                    daemon.stop()
                    await asyncio.wait_for(running, LONG)

        asyncio.run(main())

    def until_all_is_handled(self) -> None:
        give_up = time.monotonic() + LONG
        while self.heard - set(self.handled()) or self.store.listing(messages=1):
            assert time.monotonic() < give_up, self.store.listing()
            time.sleep(0.05)


@pytest.fixture
def dial_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "DIAL_AGAIN", 0.05)
    monkeypatch.setattr(schedule, "SPREAD", 0.05)


def test_mail_on_one_node_goes_down_the_session_on_the_other(
    salmon: Salmon, database: Cluster, dial_soon: None
) -> None:
    """At once, by a wake-up: by itself a node looks every five seconds."""
    assert store.RENEW >= 5
    with World2(salmon, database, lease=None) as here:
        taker, server = here.nodes
        taker.start()
        server.start()
        here.nodes = [server]  # the customer knows of that one only
        took: list[float] = []

        def work() -> None:
            here.nodes = [taker, server]
            for _ in range(8):
                assert here.send(0)
                began = time.monotonic()
                here.until_all_is_handled()
                took.append(time.monotonic() - began)

        here.with_a_customer(work)
        assert sorted(took)[len(took) // 2] < 1, took
        assert set(here.handled().values()) == {1}


def test_a_node_that_is_stopped_has_nothing_any_more(salmon: Salmon, database: Cluster) -> None:
    """Others need not wait until it is given up."""
    with World2(salmon, database, lease=None) as here:
        node = here.nodes[0]
        node.start()
        nodes = f"SELECT count(*) FROM {here.schema}.hold_nodes"
        assert database.rows(nodes) == [(2,)]
        node.stop()
        assert database.rows(nodes) == [(1,)], "the test's own"


def killed_at_random(salmon: Salmon, cluster: Cluster, kills: int, random_: random.Random) -> int:
    """Nodes are killed while mail comes to both and goes out of both."""
    ending = threading.Event()
    with World2(salmon, cluster) as here:
        for one in here.nodes:
            one.start()

        def sending(node: int) -> None:
            sizes = random.Random(node)
            while not ending.is_set():
                if not here.send(node, sizes.choice((0, 0, 0, 4_000, LARGE))):
                    time.sleep(0.02)

        def kill_again_and_again() -> None:
            threads = [threading.Thread(target=sending, args=[node]) for node in (0, 1, 0, 1)]
            for one in threads:
                one.start()
            try:
                for _ in range(kills):
                    victim = random_.choice(here.nodes)
                    time.sleep(random_.uniform(0.05, 0.6))
                    victim.kill()
                    here.check()
                    victim.start()
            finally:
                ending.set()
                for one in threads:
                    one.join()
            here.until_all_is_handled()

        here.with_a_customer(kill_again_and_again)
        assert set(here.handled().values()) == {1}, "a message was handled twice"
        return len(here.heard)


def test_nodes_are_killed_at_random(salmon: Salmon, database: Cluster, dial_soon: None) -> None:
    assert killed_at_random(salmon, database, 8, random.Random(1870)) > 20


@pytest.mark.long
def test_nodes_are_killed_at_random_many_times(
    salmon: Salmon, database: Cluster, dial_soon: None, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = amount(200, sampled=40)
    heard = killed_at_random(salmon, database, kills, chance())
    with capsys.disabled():
        print(f"\n{kills} kills of nodes, {heard} messages answered 250")


def test_the_database_crashes_again_and_again_below_two_nodes(
    salmon: Salmon, own: Cluster, dial_soon: None
) -> None:
    ending = threading.Event()
    with World2(salmon, own) as here:
        for one in here.nodes:
            one.start()

        def sending(node: int) -> None:
            while not ending.is_set():
                if not here.send(node):
                    time.sleep(0.05)

        def crash_again_and_again() -> None:
            threads = [threading.Thread(target=sending, args=[node]) for node in (0, 1)]
            for one in threads:
                one.start()
            try:
                for _ in range(4):
                    before = len(here.heard)
                    give_up = time.monotonic() + LONG
                    while len(here.heard) < before + 10:
                        assert time.monotonic() < give_up, "it does not go on by itself"
                        time.sleep(0.05)
                    own.stop(signal.SIGQUIT)
                    own.start()
            finally:
                ending.set()
                for one in threads:
                    one.join()
            here.until_all_is_handled()

        here.with_a_customer(crash_again_and_again)
        assert set(here.handled().values()) == {1}
