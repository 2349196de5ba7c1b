"""The recipe "A second provider": one home, a session open to each of two providers, and a sender
that tries one after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import smtplib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from support.configuration import agent_keys, configuration
from support.ends import PATIENCE, message
from support.salmon import Salmon
from support.world import World, world

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon


class Providers:
    """``first``, ``second``  the two, as their MX records are ordered."""

    def __init__(self, salmon: Salmon, first: World, second: World) -> None:
        self.salmon, self.first, self.second = salmon, first, second

    @property
    def handled(self) -> list[str]:
        return [str(one["Subject"]) for one in self.salmon.handled]

    @contextlib.asynccontextmanager
    async def home(self) -> AsyncIterator[None]:
        """A customer's server, with a session open to each."""
        plugins = Plugins.load()
        agents = [
            agent_keys(there.odmr, name=name, push=True, every=10)
            for name, there in (("mx", self.first), ("mx2", self.second))
        ]
        valid = configuration(*agents, plugins=plugins, default={"hostname": "home.example.org"})
        folder = self.salmon.folder / "home"
        folder.mkdir(exist_ok=True)
        with Collector(valid, plugins, lambda: self.salmon.relay, folder) as collector:
            daemon = Daemon(collector, plugins)
            running = asyncio.create_task(daemon.run())
            try:
                yield
            finally:
                daemon.stop()
                await asyncio.wait_for(running, PATIENCE)

    async def connected(self, *providers: World) -> None:
        def passes(there: World) -> bool:
            return any(
                one.live is not None and one.live.passes("example.org")
                for one in there.daemon.sessions
            )

        for there in providers or (self.first, self.second):
            await there.until(lambda there=there: passes(there))  # type: ignore[misc]


async def send(there: World, data: bytes, heard: bool = True) -> str:
    """What a sender's server hears; it may be gone before it hears of its message."""

    def talk() -> str:
        client = smtplib.SMTP("127.0.0.1", there.mx, timeout=PATIENCE)
        client.ehlo("sender.example.net")
        client.mail("a@example.net")
        client.rcpt("b@example.org")
        if not heard:
            client.docmd("DATA")
            client.send(data + b".\r\n")
            client.close()
            return ""
        code, text = client.data(data)
        client.quit()
        return f"{code} {text.decode()}"

    return await asyncio.to_thread(talk)


def with_two(salmon: Salmon, work: Callable[[Providers], Awaitable[None]]) -> None:
    def folder(name: str) -> Path:
        made = salmon.folder / name
        made.mkdir()
        return made

    async def main() -> None:
        async with (
            world(salmon, folder=folder("mx")) as first,
            world(salmon, folder=folder("mx2")) as second,
        ):
            await work(Providers(salmon, first, second))

    salmon.handle(".*")
    asyncio.run(main())


def test_both_pass_mail_on_while_its_sender_waits(salmon: Salmon) -> None:
    async def work(both: Providers) -> None:
        async with both.home():
            await both.connected()
            assert await send(both.first, message("by the first")) == "250 2.0.0 delivered"
            assert await send(both.second, message("by the second")) == "250 2.0.0 delivered"
        assert both.handled == ["by the first", "by the second"]

    with_two(salmon, work)


def test_what_was_sent_to_one_and_not_answered_and_then_to_the_other_is_handled_once(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(both: Providers) -> None:
        async with both.home():
            await both.connected()
            await send(both.first, message("once"), heard=False)
            await both.first.until(lambda: both.handled == ["once"])
            assert await send(both.second, message("once")) == "250 2.0.0 delivered"
            assert both.handled == ["once"]

    caplog.set_level(logging.INFO)
    with_two(salmon, work)
    said = [one.getMessage() for one in caplog.records if " to=<b@example.org>" in one.getMessage()]
    [repeat] = [line for line in said if line.endswith(" repeat")]
    assert repeat.startswith("agent=mx2 ")


def test_what_both_have_held_is_handled_once(salmon: Salmon) -> None:
    async def work(both: Providers) -> None:
        await send(both.first, message("held"), heard=False)
        await both.first.until(lambda: len(both.first.held()) == 1)
        assert (await send(both.second, message("held"))).startswith("250 2.6.0 held")
        async with both.home():
            await both.first.until(lambda: not both.first.held() and not both.second.held())
        assert both.handled == ["held"]

    with_two(salmon, work)


def test_a_provider_that_changes_a_message_makes_another_of_it(salmon: Salmon) -> None:
    """As any other mail server does that writes a ``Received:`` line of its own."""

    async def work(both: Providers) -> None:
        async with both.home():
            await both.connected()
            await send(both.first, message("twice"), heard=False)
            await both.first.until(lambda: both.handled == ["twice"])
            passed_on = b"Received: by mx2.example.net; now\r\n" + message("twice")
            assert await send(both.second, passed_on) == "250 2.0.0 delivered"
        assert both.handled == ["twice", "twice"]

    with_two(salmon, work)
