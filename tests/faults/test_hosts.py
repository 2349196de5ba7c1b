"""Two hosts of a provider before one PostgreSQL, with mail that comes to both and a customer that
has a push session with each, while the database or the way to it has trouble.  (All mail is held
first: what goes through live needs no database.)

Whatever happens: senders hear 451 while their host cannot hold mail, it goes on by itself, no
message is lost, the customer's handlers see each once, and over the wire only those come twice of
which the answer was given in the trouble.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import smtplib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psycopg
import pytest
from support.messages import MESSAGE
from support.postgres import USER, Cluster, Standby, programs
from support.processes import LONG
from support.provider_process import ProviderProcess
from support.proxy import Direction, Proxy
from support.salmon import Salmon
from test_database import World2, wait_until_synchronous

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.delivery.dispatcher import PendingDelivery
from salmon_revsmtp.provider.hold.postgres import PostgresStore
from salmon_revsmtp.provider.hold.store import Arrival, Settled
from salmon_revsmtp.service.session import Tally
from salmon_revsmtp.smtp.envelope import Envelope

pytestmark = pytest.mark.interop

# Seconds before a trouble in which an answer may be given that was not settled when it began.
UNSETTLED = 2.0


@pytest.fixture(autouse=True)
def dial_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "DIAL_AGAIN", 0.05)
    monkeypatch.setattr(schedule, "SPREAD", 0.05)


@pytest.fixture
def own(database: Cluster) -> Iterator[Cluster]:
    """A server that no other test has; ``database`` says whether there is one."""
    found = programs()
    assert not isinstance(found, str)
    with Cluster(found, max_connections="50", superuser_reserved_connections="0") as cluster:
        yield cluster


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, list[float]]:
    """When the customer answered 250 to a message, by its digest: what the wire sees, and not what
    the handlers do."""
    found: dict[bytes, list[float]] = {}
    add = Tally.add

    def noted(self: Tally, delivery: PendingDelivery) -> bool:
        if delivery.reply is not None and delivery.reply.positive and delivery.key is not None:
            found.setdefault(delivery.key.digest, []).append(time.monotonic())
        return add(self, delivery)

    monkeypatch.setattr(Tally, "add", noted)
    return found


class Hosts(World2):
    """``heard_by``  what each of the two has answered, by its code; 0: nothing, or no connection.

    ``troubles``  when each began and ended.
    """

    def __init__(self, salmon: Salmon, cluster: Cluster, *urls: str, schema: str = "") -> None:
        self.salmon = salmon
        self.schema = schema or cluster.schema()
        self.url = cluster.url(self.schema)
        one, other = urls or (self.url, self.url)
        self.nodes = [
            ProviderProcess(salmon.folder / name, url, lease=2.0, soon=True, live=False)
            for name, url in (("a", one), ("b", other))
        ]
        self.sent, self.heard = Counter(), set()
        self._numbers = iter(range(1_000_000))
        self.heard_by: list[Counter[int]] = [Counter(), Counter()]
        self.troubles: list[tuple[float, float]] = []

    def __enter__(self) -> Hosts:
        super().__enter__()
        for one in self.nodes:
            one.start()
        return self

    def send(self, node: int, octets: int = 0) -> bool:
        subject = f"m{next(self._numbers)}"
        data = f"From: a@example.net\r\nSubject: {subject}\r\n\r\n".encode()
        code = 250
        try:
            with smtplib.SMTP("127.0.0.1", self.nodes[node].mx, timeout=LONG) as client:
                client.sendmail("a@example.net", ["b@example.org"], data)
        except smtplib.SMTPRecipientsRefused as error:
            code = next(iter(error.recipients.values()))[0]
        except smtplib.SMTPResponseException as error:
            code = error.smtp_code
        except (OSError, smtplib.SMTPException):
            code = 0
        self.heard_by[node][code] += 1
        if code == 250:
            self.heard.add(subject)
        return code == 250

    def until(
        self, node: int, code: int, more: int, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until a host has answered that so many more times."""
        enough = self.heard_by[node][code] + more
        give_up = time.monotonic() + LONG
        while self.heard_by[node][code] < enough:
            assert time.monotonic() < give_up, (node, code, self.heard_by)
            meanwhile()
            time.sleep(0.02)

    @contextlib.contextmanager
    def trouble(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.troubles.append((began, time.monotonic()))

    def under_load(self, work: Callable[[], None]) -> None:
        """Do something while both take mail, and the customer has sessions with both; then all
        that was answered 250 is handled, once."""
        ending = threading.Event()

        def sending(node: int) -> None:
            while not ending.is_set():
                if not self.send(node):
                    ending.wait(0.05)

        def all_of_it() -> None:
            threads = [threading.Thread(target=sending, args=[node]) for node in (0, 1, 0, 1)]
            for one in threads:
                one.start()
            try:
                self.goes_on()
                work()
                self.goes_on()
            finally:
                ending.set()
                for one in threads:
                    one.join()
            self.until_all_is_handled()

        self.with_a_customer(all_of_it)
        assert set(self.handled().values()) == {1}, "handled twice"
        assert self.heard <= set(self.handled()), "lost"

    def goes_on(self) -> None:
        for node in (0, 1):
            self.until(node, 250, 15)

    def check(self) -> None:
        raise NotImplementedError

    def repeats(self, answers: dict[bytes, list[float]], settled: float = UNSETTLED) -> int:
        """How many messages came more than once over the wire: such as were answered in a trouble,
        or when their answers could not be settled before it."""
        twice = [times for times in answers.values() if len(times) > 1]
        for times in twice:
            for answered in times[:-1]:
                assert any(
                    began - settled <= answered <= ended + settled for began, ended in self.troubles
                ), (times, self.troubles)
        return len(twice)


class Backup(Cluster):
    """What ``pg_basebackup`` made of a server."""

    def __init__(self, programs: Path, of: Cluster) -> None:
        super().__init__(programs)
        self._of = of

    def _make(self) -> list[str]:
        command = [str(self._programs / "pg_basebackup"), "-h", str(self._of.folder)]
        return [*command, "-p", str(self._of.port), "-U", USER, "-c", "fast"]


def test_a_backup_is_restored(salmon: Salmon, own: Cluster) -> None:
    """What was handed over since is there again, and anyone's; what came since is not."""
    schema, found = own.schema(), programs()
    assert isinstance(found, Path)
    store = PostgresStore(own.url(schema), salmon.folder / "before")
    [[before]] = store.put([arrival("b@example.org")])
    [taken] = store.feed("acme").take(1, 1000)
    with Backup(found, own) as backup:
        store.settle([Settled(taken.key, taken.envelope.recipients)])
        store.put([arrival("b@example.org")])
        store.close()
        own.stop()
        restored = PostgresStore(backup.url(schema), salmon.folder / "after")
        try:
            assert [one.key for one in restored.listing()] == [before]
            assert [one.key for one in restored.feed("acme").take(10, 10_000)] == [before]
        finally:
            restored.close()


def arrival(recipient: str) -> Arrival:
    return Arrival(Envelope("a@example.net", (recipient,)), ("acme",), [MESSAGE])


def test_a_standby_takes_over_below_two_hosts(
    salmon: Salmon, own: Cluster, answers: dict[bytes, list[float]]
) -> None:
    with Standby(own) as standby:
        wait_until_synchronous(own)
        schema = own.schema()
        first, both = f"127.0.0.1:{own.port}", f"127.0.0.1:{own.port},127.0.0.1:{standby.port}"
        url = own.url(schema, own.port).replace(first, both) + "&target_session_attrs=read-write"
        with Hosts(salmon, own, url, url, schema=schema) as here:
            here.store.close()
            here.store = PostgresStore(url, salmon.folder / "another")

            def take_over() -> None:
                with here.trouble():
                    own.stop(signal.SIGQUIT)
                    for node in (0, 1):
                        here.until(node, 451, 2)
                    standby.promote()
                    here.goes_on()

            here.under_load(take_over)
            here.repeats(answers)
            here.store.close()


class Line:
    """The way of one host to the database, which may go silent: a proxy in a thread of its own."""

    def __init__(self, target: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._proxy, self._target = Proxy(target), target

    def __enter__(self) -> Line:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._proxy.__aenter__(), self._loop).result(LONG)
        # One that takes connections, and says nothing.
        self._silent = socket.create_server(("127.0.0.1", 0), backlog=100)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        leaving = self._proxy.__aexit__(None, None, None)
        asyncio.run_coroutine_threadsafe(leaving, self._loop).result(LONG)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._silent.close()

    @property
    def port(self) -> int:
        return self._proxy.port

    def go_silent(self) -> None:
        """Nothing gets through, on old connections and new ones, and none is closed."""

        def silent() -> None:
            self._proxy.target = self._silent.getsockname()[1]
            for direction in Direction:
                self._proxy.stall(direction)

        self._loop.call_soon_threadsafe(silent)

    def come_back(self) -> None:
        """New connections get through."""
        self._proxy.target = self._target


def test_a_host_is_cut_off_and_comes_back(
    salmon: Salmon, own: Cluster, answers: dict[bytes, list[float]]
) -> None:
    """The other goes on as if nothing were, and sends what the first had."""
    with Line(own.port) as line:
        schema = own.schema()
        cut, whole = own.url(schema, line.port), own.url(schema)
        with Hosts(salmon, own, cut, whole, schema=schema) as here:

            def cut_off() -> None:
                with here.trouble():
                    line.go_silent()
                    here.until(0, 451, 2)
                    taken = here.heard_by[0][250]
                    here.until(1, 250, 50)
                    before = here.heard_by[1].copy()
                    here.until(0, 451, 2)
                    assert here.heard_by[0][250] == taken, "it holds mail nowhere"
                    assert set(here.heard_by[1]) == {250}, before
                    # What the first had goes out by the other: nothing that was there before stays.
                    everything = set(here.heard)
                    give_up = time.monotonic() + LONG
                    while everything - set(here.handled()):
                        assert time.monotonic() < give_up, everything - set(here.handled())
                        time.sleep(0.05)
                    line.come_back()
                    here.goes_on()

            here.under_load(cut_off)
            here.repeats(answers)


def test_of_a_host_that_is_killed_only_what_it_had_in_hand_comes_twice(
    salmon: Salmon, own: Cluster, answers: dict[bytes, list[float]]
) -> None:
    with Hosts(salmon, own) as here:

        def kill() -> None:
            for number in (0, 1, 0):
                with here.trouble():
                    here.nodes[number].kill()
                    here.nodes[number].start()
                for node in (0, 1):
                    here.until(node, 250, 60)

        here.under_load(kill)
        here.repeats(answers)


def lock(cluster: Cluster, schema: str, connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """All tables of the store, in one transaction that stays open."""
    query = f"SELECT tablename FROM pg_tables WHERE schemaname = '{schema}' ORDER BY 1"
    tables = ", ".join(f"{schema}.{name}" for (name,) in cluster.rows(query))
    while True:
        try:
            connection.execute(f"BEGIN; LOCK TABLE {tables}".encode())
            return
        except psycopg.errors.DeadlockDetected:
            connection.execute("ROLLBACK")


class Connections:
    """All that a server has, whoever had them or is about to."""

    def __init__(self, cluster: Cluster, taken: contextlib.ExitStack) -> None:
        self._cluster, self._taken = cluster, taken
        self._ours = [taken.enter_context(cluster.connection())]

    def take(self) -> None:
        """End those of others, and take what is free."""
        self._ours[0].execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> ALL(%s)",
            [[one.info.backend_pid for one in self._ours]],
        )
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                self._ours.append(self._taken.enter_context(self._cluster.connection()))


def test_locks_connections_and_time_run_out_below_two_hosts(
    salmon: Salmon, own: Cluster, answers: dict[bytes, list[float]]
) -> None:
    """One after the other: all is locked, others have all connections, the server is frozen."""
    with Hosts(salmon, own) as here:

        def refused(meanwhile: Callable[[], None] = lambda: None) -> None:
            for node in (0, 1):
                here.until(node, 451, 2, meanwhile)

        def in_turn() -> None:
            with here.trouble(), own.connection() as connection:
                lock(own, here.schema, connection)
                refused()
                connection.execute("ROLLBACK")
                here.goes_on()
            with here.trouble(), contextlib.ExitStack() as taken:
                refused(Connections(own, taken).take)
                taken.close()
                here.goes_on()
            with here.trouble():
                frozen = own.freeze()
                try:
                    refused()
                finally:
                    own.thaw(frozen)
                here.goes_on()

        here.under_load(in_turn)
        here.repeats(answers)
