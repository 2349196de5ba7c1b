"""Push sessions: they stay open, and mail comes down them the moment that the provider has it."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.collecting import collect
from support.configuration import PASSWORD, agent_keys, configuration
from support.dialogue import Dialogue
from support.holding import Holding, account
from support.messages import MESSAGE
from support.proxy import Direction, Fault, How, Proxy
from support.salmon import Salmon

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider import handover, settling
from salmon_revsmtp.provider.hold.embedded import _Feed
from salmon_revsmtp.provider.hold.store import Feed, Settled, State
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.server import daemon, health
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.server.provider_requests import ProviderRequests
from salmon_revsmtp.smtp.envelope import Envelope

# What is waited for here takes moments; this is for a machine that does much else.
PATIENCE = 60


class Home:
    """A customer's server, its provider, and a proxy between them."""

    def __init__(self, salmon: Salmon, held: Holding, provider: Provider, proxy: Proxy) -> None:
        self.salmon, self.held, self.provider, self.proxy = salmon, held, provider, proxy
        self.daemon: Any = None
        self.collector: Any = None
        self._number = 0

    def put(self, recipient: str = "b@example.org") -> int:
        """Have the provider hold a message that is like no other."""
        self._number += 1
        data = b"Subject: %d\r\n\r\nhello\r\n" % self._number
        return self.held.put(Envelope("a@example.net", (recipient,)), data)

    async def until(self, so: Callable[[], object]) -> None:
        async def wait() -> None:
            while not so():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(wait(), PATIENCE)

    async def handled(self, messages: int) -> None:
        """Wait until so many have been handled, and the provider has none left."""
        await self.until(lambda: len(self.salmon.handled) >= messages and not len(self.held))
        assert len(self.salmon.handled) == messages

    async def open(self) -> None:
        """Wait for a push session, of which both ends know."""
        await self.until(lambda: any(one.push for one in self.provider.sessions))
        await self.until(lambda: bool(self.daemon._pushing()))

    async def collect(self) -> Report:
        """What `collect` says while the server runs."""
        answers = [one async for one in self.daemon._answer({"do": "collect", "agents": ["isp"]})]
        [row] = [one["report"] for one in answers if "report" in one]
        return Report(**{**row, "outcome": Outcome(row["outcome"])})


def at_home(
    salmon: Salmon,
    work: Callable[[Home], Awaitable[None]],
    *,
    keepalive: float = 60,
    pattern: str = ".*",
    **keys: Any,
) -> None:
    """Run ``work`` while a server with one agent runs; ``keys`` are the account's."""
    salmon.handle(pattern)

    async def main() -> None:
        held = Holding(salmon.folder / "provider", account(**keys), keepalive=keepalive)
        async with held.provider() as provider, Proxy(provider.port) as proxy:
            home = Home(salmon, held, provider, proxy)
            plugins = Plugins.load()
            valid = configuration(agent_keys(proxy.port, every=0.1), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                home.collector, home.daemon = collector, Daemon(collector, plugins)
                running = asyncio.create_task(home.daemon.run())
                await work(home)
                home.daemon.stop()
                await asyncio.wait_for(running, PATIENCE)
        held.close()

    asyncio.run(main())


def test_mail_comes_down_an_open_session_as_it_arrives(salmon: Salmon) -> None:
    async def work(home: Home) -> None:
        home.put()
        await home.handled(1)
        [session] = home.provider.sessions
        for number in range(2, 30):
            home.put()
            await home.handled(number)
        assert home.provider.sessions == [session]
        report = await home.collect()
        assert (report.outcome, report.messages) == (Outcome.COLLECTED, 29)
        assert report.push is not None and report.push in report.summary()
        [state] = [one async for one in home.daemon._answer({"do": "state"})]
        assert list(state["push"]) == ["isp"] and state["next"] == {}

    at_home(salmon, work)


def test_a_command_collects_by_itself_and_ends(salmon: Salmon, tmp_path: Path) -> None:
    salmon.handle(".*")
    held = Holding(tmp_path / "provider")

    async def main() -> None:
        async with held.provider() as provider:
            held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
            reports = await collect(salmon, agent_keys(provider.port))
            assert [(one.outcome, one.sessions) for one in reports] == [(Outcome.COLLECTED, 2)]
            assert reports[0].push is None

    asyncio.run(main())


def test_what_was_deferred_is_tried_again_in_the_same_session(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "AGAIN_FIRST", 0.1)
    times = 0

    def later(message: MailRequest) -> None:
        nonlocal times
        times += 1
        if times < 4:
            raise SMTPError(451, "later")

    salmon.handle("b@.*", later)

    async def work(home: Home) -> None:
        home.put()
        await home.open()
        [session] = home.provider.sessions
        await home.until(lambda: times)
        home.put("other@example.org")  # it does not wait for the first
        await home.until(lambda: not len(home.held))
        assert home.provider.sessions == [session]
        assert times == 4

    at_home(salmon, work, pattern="other@.*")


def test_both_ends_say_that_all_is_deferred_and_that_it_is_over(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "AGAIN_FIRST", 0.1)
    monkeypatch.setattr(handover, "AGAIN_LAST", 0.1)
    monkeypatch.setattr(health, "TAKES_NOTHING", 0.0)
    down = True

    def store(message: MailRequest) -> None:
        if down:
            raise SMTPError(451, "the next host is down")

    salmon.handle("b@.*", store)

    async def work(home: Home) -> None:
        nonlocal down
        providing: Any = SimpleNamespace(store=home.held.store, accounts=home.held.accounts)
        requests = ProviderRequests(providing, home.provider)

        async def deferred() -> str:
            found = (await requests.holdings()).get("acme")
            return found.deferred if found is not None else ""

        async def until(said: bool) -> None:
            while bool(await deferred()) is not said:
                await asyncio.sleep(0.01)

        home.put("other@example.org")
        await home.open()
        await home.handled(1)
        home.put()
        await asyncio.wait_for(until(True), PATIENCE)
        assert (await deferred()).startswith("the customer says 451")
        [trouble] = (await home.daemon.look()).troubles
        assert trouble.key == "agent:isp:deferred" and "451" in trouble.text
        down = False
        await asyncio.wait_for(until(False), PATIENCE)
        assert not (await home.daemon.look()).troubles

    at_home(salmon, work, pattern="other@.*")


def test_a_session_that_breaks_is_dialled_again_at_once(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "DIAL_AGAIN", 0.05)

    async def work(home: Home) -> None:
        for number in range(1, 4):
            await home.open()
            [session] = home.provider.sessions
            session.abort("the test breaks it")
            home.put()
            await home.handled(number)

    at_home(salmon, work)


@pytest.mark.parametrize("direction", list(Direction))
def test_a_network_that_goes_silent_is_noticed(salmon: Salmon, direction: Direction) -> None:
    """Nothing gets through any more, and no one is told: both ends find out, and what was on its
    way comes all the same, once."""

    async def work(home: Home) -> None:
        await home.open()
        [session] = home.provider.sessions
        home.proxy.stall(direction)
        home.put()
        await home.handled(1)
        await home.until(lambda: session not in home.provider.sessions)

    at_home(salmon, work, keepalive=1)


def test_a_disabled_agent_lets_its_session_go(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "TICK", 10.0 * PATIENCE)

    async def work(home: Home) -> None:
        await home.open()
        home.collector.journal.set_enabled("isp", False)
        # As `disable` asks.
        assert [one async for one in home.daemon._answer({"do": "look"})] == [{"end": True}]
        await home.until(lambda: not home.provider.sessions)

    at_home(salmon, work)


def test_an_agent_that_failed_has_recovered_once_its_session_is_open(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def work(home: Home) -> None:
        home.proxy.fault = Fault(How.RST, Direction.TO_CUSTOMER)
        await home.until(lambda: "agent=isp fails: failed" in caplog.text)
        assert home.collector.journal.state("isp").failing_since is not None
        await home.open()
        home.daemon._wake.set()
        await home.until(lambda: "agent=isp recovered after 0 minutes" in caplog.text)
        await home.until(lambda: home.collector.journal.state("isp").failing_since is None)
        assert home.provider.sessions

    at_home(salmon, work)


# -- a customer that the test plays ------------------------------------------------------------


async def log_in(port: int) -> Dialogue:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    customer = Dialogue(reader, writer)
    await customer.replied(220)
    customer.say("EHLO x", "AUTH CRAM-MD5")
    await customer.replied(250)
    challenge = base64.b64decode((await customer.hear("334 "))[4:])
    digest = hmac.new(PASSWORD.encode(), challenge, hashlib.md5).hexdigest()
    customer.say(base64.b64encode(f"acme {digest}".encode()).decode())
    await customer.replied(235)
    return customer


def with_provider(
    tmp_path: Path,
    work: Callable[[Holding, Provider], Awaitable[None]],
    keepalive: float = 60,
    **keys: Any,
) -> Holding:
    held = Holding(tmp_path / "provider", account(**keys), keepalive=keepalive)

    async def main() -> None:
        async with held.provider() as provider:
            await work(held, provider)

    asyncio.run(main())
    return held


async def be_the_server(customer: Dialogue, *extensions: str) -> None:
    customer.say("220 customer")
    await customer.asks("EHLO", *(f"250-{one}" for one in extensions), "250 HELP")


async def take(customer: Dialogue) -> None:
    """A message, in the way of a server that knows nothing."""
    await customer.asks("MAIL", "250 ok")
    await customer.asks("RCPT", "250 ok")
    await customer.asks("DATA", "354 go on")
    while (await customer.hear()) != ".":
        pass
    customer.say("250 taken")


async def settled(held: Holding) -> None:
    """Wait until nothing is held."""
    while len(held):
        await asyncio.sleep(0.01)


def test_xhold_is_offered_after_the_login_and_keeps_the_session(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        customer = await log_in(provider.port)
        customer.say("EHLO x")
        words = [await customer.hear()]
        while words[-1].startswith("250-"):
            words.append(await customer.hear())
        assert "XHOLD 60" in [one[4:] for one in words]
        customer.say("XHOLD", "ATRN")
        await customer.replied(250)
        await customer.replied(250)  # although nothing waits
        await be_the_server(customer)
        held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
        await take(customer)
        held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
        await take(customer)
        await settled(held)
        customer.writer.close()

    assert len(with_provider(tmp_path, work)) == 0


def test_what_was_deferred_and_could_not_be_settled_comes_again_in_the_same_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full until after it would have been tried again."""
    monkeypatch.setattr(handover, "AGAIN_FIRST", 0.05)
    monkeypatch.setattr(handover, "AGAIN_LAST", 1.0)
    monkeypatch.setattr(settling, "RETRY", 0.01)

    async def work(held: Holding, provider: Provider) -> None:
        full, settle = True, held.store.settle
        starts: list[Feed] = []
        start_over = _Feed.start_over

        def settled_later(done: Sequence[Settled]) -> None:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            settle(done)

        def started_over(feed: _Feed) -> None:
            starts.append(feed)
            start_over(feed)

        monkeypatch.setattr(held.store, "settle", settled_later)
        monkeypatch.setattr(_Feed, "start_over", started_over)
        customer = await log_in(provider.port)
        customer.say("XHOLD", "ATRN")
        await customer.replied(250)
        await customer.replied(250)
        await be_the_server(customer)
        held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
        await customer.asks("MAIL", "250 ok")
        await customer.asks("RCPT", "451 later")
        await customer.asks("RSET", "250 ok")
        while not starts:
            await asyncio.sleep(0.01)
        full = False
        for _ in range(PATIENCE):
            if (line := await customer.hear()) != "NOOP":
                break
            customer.say("250 ok")
        assert line.startswith("MAIL")
        customer.writer.close()

    with_provider(tmp_path, work, keepalive=1)


def test_what_is_not_its_own_any_more_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that several hosts have may have given it to another since it was taken."""
    has, lost = _Feed.has, [1]
    monkeypatch.setattr(_Feed, "has", lambda feed, key: key not in lost and has(feed, key))

    async def work(held: Holding, provider: Provider) -> None:
        for name in ("first", "second"):
            held.put(Envelope(f"{name}@example.net", ("b@example.org",)), MESSAGE)
        customer = await log_in(provider.port)
        customer.say("XHOLD", "ATRN")
        await customer.replied(250)
        await customer.replied(250)
        await be_the_server(customer)
        assert "second@" in await customer.hear()
        customer.writer.close()

    assert [one.envelope.reverse_path for one in with_provider(tmp_path, work).waiting()] == [
        "first@example.net",
        "second@example.net",
    ]


def test_a_silent_session_hears_noop(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        customer = await log_in(provider.port)
        customer.say("XHOLD", "ATRN")
        await customer.replied(250)
        await customer.replied(250)
        await be_the_server(customer)
        for _ in range(2):
            await customer.asks("NOOP", "250 ok")
        await customer.hear("NOOP")  # it does not answer this one
        assert (await asyncio.wait_for(customer.reader.read(), PATIENCE)) == b""
        customer.writer.close()

    with_provider(tmp_path, work, keepalive=1)


def test_a_customer_that_does_not_know_how_to_ask_is_held_with_always(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        customer = await log_in(provider.port)
        customer.say("ATRN")
        await customer.replied(250)
        await be_the_server(customer)
        held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
        await take(customer)
        await settled(held)
        customer.writer.close()

    with_provider(tmp_path, work, push="always")


def test_an_account_without_push_hears_nothing_of_it(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        customer = await log_in(provider.port)
        customer.say("XHOLD", "ATRN")
        await customer.replied(502)
        await customer.replied(453)
        customer.writer.close()

    with_provider(tmp_path, work, push=False)


def test_the_newest_session_wins(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        customers = []
        for _ in range(3):
            customer = await log_in(provider.port)
            customer.say("XHOLD", "ATRN")
            await customer.replied(250)
            await customer.replied(250)
            await be_the_server(customer)
            customers.append(customer)
        for old in customers[:-1]:
            await old.asks("QUIT", "221 bye")
        held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
        await take(customers[-1])
        for one in customers:
            one.writer.close()

    with_provider(tmp_path, work)


def test_a_message_that_breaks_every_session_is_set_aside_and_the_others_arrive(
    tmp_path: Path,
) -> None:
    """The customer takes anything but one message, over which it drops the connection."""

    async def work(held: Holding, provider: Provider) -> None:
        poison = held.put(Envelope("a@example.net", ("poison@example.org",)), MESSAGE)
        for number in range(3):
            held.put(Envelope("a@example.net", (f"{number}@example.org",)), MESSAGE)
        taken: list[str] = []
        for _ in range(20):
            customer = await log_in(provider.port)
            customer.say("ATRN")
            if (await customer.hear()).startswith("453"):
                break
            await be_the_server(customer)
            while True:
                line = await customer.hear()
                if line.startswith("QUIT"):
                    customer.say("221 bye")
                    break
                if line.startswith("RCPT") and "poison" in line:
                    customer.writer.transport.abort()
                    break
                if line == "DATA":
                    customer.say("354 go on")
                    while (await customer.hear()) != ".":
                        pass
                    taken.append("one")
                customer.say("250 ok")
            while provider.sessions:
                await asyncio.sleep(0.01)
        assert len(taken) == 3
        while len(held.waiting()) > 1:  # the last answer is being settled
            await asyncio.sleep(0.01)
        [left] = held.waiting()
        assert (left.key, left.state, left.strikes) == (
            poison,
            State.ASIDE,
            handover.MOST_STRIKES,
        )
        assert "broke" in left.reason
        held.store.retry([poison])
        assert held.waiting()[0].state is State.WAITING

    with_provider(tmp_path, work)


def test_a_stop_finishes_what_is_under_way(tmp_path: Path) -> None:
    async def work(held: Holding, provider: Provider) -> None:
        held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
        early, customer = await log_in(provider.port), await log_in(provider.port)
        customer.say("XHOLD", "ATRN")
        await customer.replied(250)
        await customer.replied(250)
        await be_the_server(customer)
        await customer.asks("MAIL", "250 ok")
        stopping = asyncio.create_task(provider.stop(grace=PATIENCE))
        await early.replied(421)
        await customer.asks("RCPT", "250 ok")
        await customer.asks("DATA", "354 go on")
        while (await customer.hear()) != ".":
            pass
        customer.say("250 taken")
        await customer.asks("QUIT", "221 bye")
        early.writer.close()
        customer.writer.close()
        await asyncio.wait_for(stopping, PATIENCE)
        assert len(held) == 0

    with_provider(tmp_path, work)
