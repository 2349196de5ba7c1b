"""A server that is a provider, run by its settings as users run it: an MX that holds mail, and the
port on which customers call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiosmtplib

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.store import Held, HoldStore
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.smtp.content import whole
from salmon_revsmtp.smtp.envelope import Envelope
from support.configuration import PASSWORD, configuration
from support.dialogue import Dialogue
from support.holding import arrival
from support.messages import MESSAGE
from support.salmon import Salmon

__all__ = ["ACME", "OTHER", "World", "in_the_world", "world"]

ACME = {"name": "acme", "password": PASSWORD, "domains": ["example.org", "b\u00fccher.example"]}
OTHER = {"name": "other", "password": PASSWORD, "domains": ["example.com"]}


class World:
    """A server that is a provider, and the ports that it listens on."""

    def __init__(self, collector: Collector, daemon: Daemon) -> None:
        self.collector, self.daemon = collector, daemon

    @property
    def store(self) -> HoldStore:
        return self.collector.providing.store

    @property
    def mx(self) -> int:
        return self.daemon.listeners[0].port

    @property
    def odmr(self) -> int:
        assert self.daemon.provider is not None
        return self.daemon.provider.port

    def data(self, held: Held) -> bytes:
        """Its octets."""
        return whole(self.store.load([held.key])[held.key])

    def hold(self, *recipients: str, data: bytes = MESSAGE) -> int:
        """Hold a message as if it had come; returns its key."""
        return self.put(Envelope("a@example.net", recipients), data)

    def put(self, envelope: Envelope, data: bytes) -> int:
        """The same, with the envelope that it came in."""
        [[key, *_]] = self.store.put([arrival(self.collector.providing.accounts, envelope, data)])
        return key

    def held(self, name: str = "acme") -> list[Held]:
        return list(self.store.listing(name, messages=10_000))

    async def until(self, so: Callable[[], bool]) -> None:
        """Wait until something is so."""

        async def wait() -> None:
            while not so():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(wait(), 30)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Dialogue]:
        """Any client that has greeted."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.mx)
        client = Dialogue(reader, writer)
        await client.replied(220)
        client.say("EHLO x")
        await client.replied(250)
        yield client
        await client.quit()
        writer.close()

    async def ask(self, *names: str) -> list[str]:
        """Send ETRN for each of these, as any client does; returns the answers."""
        answers = []
        async with self.client() as client:
            for name in names:
                client.say(f"ETRN {name}")
                answers.append(await client.hear())
        return answers

    async def send(
        self, *recipients: str, data: bytes = MESSAGE, sender: str = "a@example.net"
    ) -> dict[str, tuple[int, str]]:
        """Send a message as any mail server does; returns the recipients that were refused."""
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=self.mx, start_tls=False) as client:
            refused, _ = await client.sendmail(sender, list(recipients), data)
        return dict(refused)


@contextlib.asynccontextmanager
async def world(
    salmon: Salmon,
    plugins: Plugins | None = None,
    accounts: list[dict[str, Any]] | None = None,
    provider: dict[str, Any] | None = None,
    folder: Path | None = None,
    **service: Any,
) -> AsyncIterator[World]:
    """A world whose MX has these settings beside the usual ones, in Salmon's folder or another."""
    plugins = plugins or Plugins.load()
    mx = {"hostname": "mx.example.net", "listen": "127.0.0.1:0", "delivery": "hold", **service}
    valid = configuration(
        plugins=plugins,
        accounts=[ACME, OTHER] if accounts is None else accounts,
        provider={"hostname": "mx.example.net", "listen": "127.0.0.1:0", **(provider or {})},
        mx=mx,
    )
    with Collector(valid, plugins, lambda: salmon.relay, folder) as collector:
        daemon = Daemon(collector, plugins)
        listening = asyncio.Event()
        running = asyncio.create_task(daemon.run(listening.set))
        waiting = asyncio.create_task(listening.wait())
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        try:
            yield World(collector, daemon)
        finally:
            waiting.cancel()
            daemon.stop()
            await asyncio.wait_for(running, 60)


def in_the_world(salmon: Salmon, work: Callable[[World], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with world(salmon, **options) as here:
            await work(here)

    asyncio.run(main())
