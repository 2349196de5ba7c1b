"""The network breaks at every octet of a push session: from the login to a message that came when
the session was open.  Each message still arrives, and its handler sees it once."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.holding import Holding
from support.proxy import Direction, Fault, How, Proxy
from support.rig import QuickLogin
from support.salmon import Salmon
from support.sample import positions
from support.tls import CERTIFICATE

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider import connection
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.smtp.envelope import Envelope

BOTH = ("ann@example.org", "bob@example.org")
# What is waited for here takes milliseconds; this is for a machine that does much else.
PATIENCE = 60
# Of the places of a long run, those that a sample tries.
ONE_IN = 20


class Line:
    """A provider, a customer's server that wants a push session, and a proxy between them."""

    def __init__(self, salmon: Salmon, held: Holding, provider: Provider, proxy: Proxy) -> None:
        self._salmon, self._held, self._provider, self._proxy = salmon, held, provider, proxy
        self._sent: Counter[tuple[str, bytes]] = Counter()
        self._numbers = itertools.count()

    def put(self) -> None:
        """Have the provider hold a message that is like no other."""
        data = b"Subject: %06d\r\n\r\n.hello\r\n" % next(self._numbers)
        self._held.put(Envelope("a@example.net", BOTH), data)
        content = data.replace(b"\r\n", b"\n").removesuffix(b"\n")
        self._sent.update((one, content) for one in BOTH)

    async def came_once(self) -> None:
        """Wait until all is handled and settled."""

        async def wait() -> None:
            while len(self._held) or len(self._salmon.handled) < self._sent.total():
                await asyncio.sleep(0.002)

        await asyncio.wait_for(wait(), PATIENCE)
        handled = Counter(
            (message.To, message.Data[message.Data.index(b"Subject: ") :])
            for message in self._salmon.handled
        )
        assert handled == self._sent
        assert self._held.told == []

    def swallow(self) -> None:
        """From now on nothing gets through in either direction, and no one is told."""
        for direction in Direction:
            self._proxy.stall(direction)

    async def break_the_next(self, fault: Fault) -> None:
        """End the session that there is; the next one has this fault.  One message waits when it
        begins, another one comes when that was handled."""
        self._proxy.fault = fault
        for one in self._provider.sessions:
            one.abort("the test breaks it")
        self.put()
        await self.came_once()
        self.put()
        await self.came_once()
        self._salmon.handled.clear()
        self._sent.clear()


def with_line(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Line], Awaitable[None]],
    tls: str = "none",
    keepalive: float = 60,
) -> None:
    salmon.handle(".*")
    monkeypatch.setattr(schedule, "DIAL_AGAIN", 0.005)
    monkeypatch.setattr(schedule, "SPREAD", 0.005)
    trust: dict[str, Any] = {} if tls == "none" else {"ca_file": str(CERTIFICATE)}

    async def main() -> None:
        held = Holding(salmon.folder / "provider", kind=QuickLogin, keepalive=keepalive)
        async with held.provider("odmr", tls) as provider, Proxy(provider.port) as proxy:
            plugins = Plugins.load()
            keys = {"server": "127.0.0.1", "tls": tls, "every": 0.0005, **trust}
            valid = configuration(agent_keys(proxy.port, **keys), plugins=plugins)
            with Collector(valid, plugins, lambda: salmon.relay) as collector:
                daemon = Daemon(collector, plugins)
                running = asyncio.create_task(daemon.run())
                await work(Line(salmon, held, provider, proxy))
                daemon.stop()
                await asyncio.wait_for(running, PATIENCE)
        held.close()

    asyncio.run(main())


async def cut_at_each(
    line: Line, hows: Iterable[How], direction: Direction, places: Iterable[int]
) -> None:
    """Cut after so many octets, for each place, until the session was shorter than that."""
    for how, octets in zip(itertools.cycle(hows), places, strict=False):
        fault = Fault(how, direction, octets)
        await line.break_the_next(fault)
        if not fault.struck:
            break
    assert octets > 600, "the session was too short to be one"


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("tls", "step", "one_in"),
    [
        ("none", 17, 1),
        ("starttls", 197, 1),
        pytest.param("none", 1, ONE_IN // 4, marks=pytest.mark.long),
        pytest.param("starttls", 1, ONE_IN, marks=pytest.mark.long),
    ],
)
def test_a_cut_at_any_octet_of_a_push_session(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    direction: Direction,
    tls: str,
    step: int,
    one_in: int,
) -> None:
    async def work(line: Line) -> None:
        places = positions(1, step, one_in=one_in)
        await cut_at_each(line, (How.RST, How.FIN, How.FIN), direction, places)

    with_line(salmon, monkeypatch, work, tls)


@pytest.mark.parametrize("direction", Direction)
def test_a_cut_of_which_the_provider_hears_nothing(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    """The customer is back before the provider knows that it was gone: the newer session wins, and
    what the older one had under way goes again."""
    monkeypatch.setattr(connection, "REPLACED_GRACE", 0.05)

    async def work(line: Line) -> None:
        await cut_at_each(line, (How.VANISH,), direction, positions(1, 29))

    with_line(salmon, monkeypatch, work)


def test_an_open_session_whose_octets_are_swallowed(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions.  It is noticed by what does not come, and the customer is back."""
    monkeypatch.setattr(connection, "REPLACED_GRACE", 0.05)

    async def work(line: Line) -> None:
        for _ in range(2):
            line.put()
            await line.came_once()
            line.swallow()
        line.put()
        await line.came_once()

    with_line(salmon, monkeypatch, work, keepalive=1)


@pytest.mark.long
@pytest.mark.parametrize("direction", Direction)
def test_a_network_that_swallows(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, direction: Direction
) -> None:
    """From some octet on nothing gets through, and no one is told.  In a session that is open, both
    ends find out."""
    monkeypatch.setattr(connection, "REPLACED_GRACE", 0.05)

    async def work(line: Line) -> None:
        await cut_at_each(line, (How.STALL,), direction, positions(400, 1, one_in=ONE_IN))

    with_line(salmon, monkeypatch, work, keepalive=1)
