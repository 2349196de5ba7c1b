"""A server that is a provider, run by its settings as users run it: an MX that holds mail, and the
port on which customers call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiosmtplib

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.store import Held, HoldStore
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.smtp.content import whole
from support.configuration import PASSWORD, configuration
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

    def held(self, name: str = "acme") -> list[Held]:
        return list(self.store.listing(name))

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
    **service: Any,
) -> AsyncIterator[World]:
    """A world whose MX has these settings beside the usual ones."""
    plugins = plugins or Plugins.load()
    mx = {"hostname": "mx.example.net", "listen": "127.0.0.1:0", "delivery": "hold", **service}
    valid = configuration(
        plugins=plugins,
        accounts=accounts or [ACME, OTHER],
        provider={"hostname": "mx.example.net", "listen": "127.0.0.1:0", **(provider or {})},
        mx=mx,
    )
    with Collector(valid, plugins, lambda: salmon.relay) as collector:
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
