"""Two hosts that tell one another of sessions and failed logins, by a plugin of a third party that
does it in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.calling import called, log_in, push_session
from support.salmon import Salmon
from support.world import ACME, World, world

from salmon_revsmtp import hookimpl
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider import logins
from salmon_revsmtp.provider.logins import LoginGuard
from salmon_revsmtp.provider.nodes import NodeSession, Told


class Wire:
    """What the hosts have in common.  ``cut``: none reaches another."""

    def __init__(self) -> None:
        self.hosts: list[Host] = []
        self.cut = False


class Host:
    """One of them, as its provider has it."""

    def __init__(self, wire: Wire, name: str) -> None:
        self._wire, self.name = wire, name
        self.open: dict[int, NodeSession] = {}
        self.closed = False
        self.told: Told | None = None
        wire.hosts.append(self)

    def watch(self, told: Told) -> None:
        self.told = told

    def begin(self, number: int, session: NodeSession) -> Sequence[object]:
        if self._wire.cut:
            raise OSError("no route to the others")
        self.open[number] = session
        replaced = []
        for other in self._wire.hosts:
            for one in list(other.open) if other is not self else ():
                assert other.told is not None
                other.told.gave_way([one])
                replaced.append((other, one))
        return replaced

    def still_there(self, replaced: Sequence[Any]) -> bool:
        return any(number in host.open for host, number in replaced)

    def end(self, number: int) -> None:
        self.open.pop(number, None)

    def login_failed(self, network: str) -> None:
        for other in self._wire.hosts:
            if other is not self and other.told is not None:
                other.told.logins_failed(network, 1, 0.0)

    def sessions(self) -> Sequence[NodeSession]:
        return [one for host in self._wire.hosts if host is not self for one in host.open.values()]

    def close(self) -> None:
        self.closed = True


def on_two(salmon: Salmon, work: Callable[[World, World, Wire], Awaitable[None]]) -> None:
    wire = Wire()

    def plugins(name: str) -> Plugins:
        class Plugin:
            @hookimpl
            def open_nodes(self) -> Host:
                return Host(wire, name)

        found = Plugins.load()
        found.register(Plugin(), "wire")
        return found

    def folder(name: str) -> Path:
        place = salmon.folder / name
        (place / "run").mkdir(parents=True)
        return place

    async def main() -> None:
        async with (
            world(salmon, plugins("one"), [ACME], folder=folder("one")) as one,
            world(salmon, plugins("two"), [ACME], folder=folder("two")) as two,
        ):
            await work(one, two, wire)
        assert [host.closed for host in wire.hosts] == [True, True]

    asyncio.run(main())


def test_the_newest_session_wins_across_hosts(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(one: World, two: World, wire: Wire) -> None:
        async with push_session(one.odmr) as older, push_session(two.odmr) as newer:
            await older.left()
            async with called(one.odmr) as collecting:
                await log_in(collecting)
                collecting.say("ATRN")
                await newer.left()
                await collecting.replied(453)
        await two.until(lambda: not any(host.open for host in wire.hosts))

    with caplog.at_level(logging.WARNING):
        on_two(salmon, work)
    assert caplog.text.count("account=acme peer=127.0.0.1 its session gives way to a newer") == 2


def test_hosts_that_cannot_reach_one_another_each_go_on(salmon: Salmon) -> None:
    async def work(one: World, two: World, wire: Wire) -> None:
        wire.cut = True
        async with push_session(one.odmr), push_session(two.odmr), push_session(two.odmr):
            await two.until(lambda: len(two.daemon.sessions) == 1)
            assert len(one.daemon.sessions) == 1

    on_two(salmon, work)


def test_failed_logins_count_on_all_hosts(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "MOST", 3)
    monkeypatch.setattr(logins, "FIRST_DELAY", 0.0)

    async def work(one: World, two: World, wire: Wire) -> None:
        for here in (one, two):
            async with called(here.odmr) as customer:
                assert (await log_in(customer, password="wrong"))[:3] == "535"
        async with called(one.odmr) as customer:
            assert (await log_in(customer, password="wrong"))[:3] == "421"
        reader, writer = await asyncio.open_connection("127.0.0.1", two.odmr)
        assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"421 4.7.0 ")
        writer.close()

    on_two(salmon, work)


def test_failures_elsewhere_are_forgotten_in_time_and_no_more_are_kept_than_count() -> None:
    clock: Any = SimpleNamespace(now=1000.0)
    told: list[str] = []
    guard = LoginGuard(lambda: float(clock.now), told.append)
    guard.heard("192.0.2.1", 10**9, 800.0)
    assert guard.refusal("192.0.2.1") is not None and guard.refusal("192.0.2.2") is None
    assert len(guard._failures["192.0.2.1"]) == logins.MOST
    clock.now += 101.0
    assert guard.refusal("192.0.2.1") is None
    guard.failed("2001:db8::1", "acme", "PLAIN")
    assert told == ["2001:db8::/64"]
