"""Both ends: a provider that the world sends mail to, and a customer at home with a session that
stays open, with a proxy on each of the two ways."""

from __future__ import annotations

import asyncio
import contextlib
import smtplib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.connection import Connection
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.smtp.replies import Reply
from support.configuration import PASSWORD, agent_keys, configuration
from support.proxy import Proxy
from support.salmon import Salmon
from support.world import World, world

__all__ = ["PATIENCE", "Ends", "both_ends", "message"]

# What is waited for takes moments; this is for a machine that does much else.
PATIENCE = 60


def message(subject: str, octets: int = 0) -> bytes:
    """A message that is like no other."""
    body = b"x" * 70 + b"\r\n"
    return f"Subject: {subject}\r\n\r\nhello\r\n".encode() + body * (octets // len(body))


class Ends:
    """``provider``  the provider's end.
    ``home``      the customer's server, and the proxy by which it is connected.
    ``salmon``    what the handlers at home got.
    ``way_in``    the proxy by which senders come.
    """

    def __init__(
        self, salmon: Salmon, provider: World, home: Daemon, proxy: Proxy, way_in: Proxy
    ) -> None:
        self.salmon, self.provider, self.home = salmon, provider, home
        self.proxy, self.way_in = proxy, way_in

    async def until(self, so: Callable[[], object]) -> None:
        async def wait() -> None:
            while not so():
                await asyncio.sleep(0.01)

        await asyncio.wait_for(wait(), PATIENCE)

    @property
    def sessions(self) -> list[Connection]:
        return self.provider.daemon.sessions

    async def open(self) -> Connection:
        """Wait for a session by which mail is passed on."""

        def ready() -> bool:
            return any(
                one.live is not None and one.live.passes("example.org") for one in self.sessions
            )

        await self.until(ready)
        return self.sessions[-1]

    @property
    def held(self) -> int:
        """Messages that the provider holds."""
        return sum(used.messages for used in self.provider.store.usages().values())

    @property
    def handled(self) -> list[str]:
        """The subjects of what was handled at home."""
        return [str(one["Subject"]) for one in self.salmon.handled]

    async def send(
        self, data: bytes, *recipients: str, sender: str = "a@example.net", options: str = ""
    ) -> list[Reply]:
        """Send a message as any mail server does, a command at a time: what each recipient heard,
        and, unless all were refused, the message."""

        def talk() -> list[Reply]:
            client = smtplib.SMTP("127.0.0.1", self.way_in.port, timeout=PATIENCE)
            try:
                client.ehlo("sender.example.net")
                client.mail(sender, [options] if options else [])
                heard = [
                    _reply(*client.rcpt(one if "@" in one else f"{one}@example.org"))
                    for one in recipients or ("b",)
                ]
                if any(reply.positive for reply in heard):
                    heard.append(_data(client, data))
                client.docmd("QUIT")
                return heard
            finally:
                client.close()

        return await asyncio.to_thread(talk)

    async def counts(self) -> dict[str, int]:
        """What the provider's running server has counted of live mail."""
        [answer, _] = [one async for one in self.provider.daemon._answer({"do": "provider live"})]
        return dict(answer["live"])

    async def log_lines(self) -> list[dict[str, Any]]:
        """What the provider's running server says of its sessions."""
        request = {"do": "provider sessions"}
        answers = [one async for one in self.provider.daemon._answer(request)]
        return [one["session"] for one in answers if "session" in one]


def _reply(code: int, text: bytes) -> Reply:
    return Reply(code, text.decode())


def _data(client: smtplib.SMTP, data: bytes) -> Reply:
    try:
        return _reply(*client.data(data))
    except smtplib.SMTPDataError as error:
        text = error.smtp_error
        return _reply(error.smtp_code, text if isinstance(text, bytes) else text.encode())


@contextlib.asynccontextmanager
async def ends(
    salmon: Salmon,
    *,
    account: dict[str, Any] | None = None,
    accounts: list[dict[str, Any]] | None = None,
    provider: dict[str, Any] | None = None,
    plugins: Plugins | None = None,
    at_provider: Plugins | None = None,
    agent: dict[str, Any] | None = None,
    mx: dict[str, Any] | None = None,
    **service: Any,
) -> AsyncIterator[Ends]:
    acme = {"name": "acme", "password": PASSWORD, "domains": ["example.org"], **(account or {})}
    async with (
        world(salmon, at_provider, [acme, *(accounts or [])], provider, **(mx or {})) as there,
        Proxy(there.odmr) as proxy,
        Proxy(there.mx) as way_in,
    ):
        plugins = plugins or Plugins.load()
        keys = {"hostname": "home.example.org", **service}
        valid = configuration(
            agent_keys(proxy.port, **{"every": 0.1, **(agent or {})}), plugins=plugins, default=keys
        )
        home = salmon.folder / "home"
        home.mkdir()
        with Collector(valid, plugins, lambda: salmon.relay, home) as collector:
            daemon = Daemon(collector, plugins)
            running = asyncio.create_task(daemon.run())
            try:
                yield Ends(salmon, there, daemon, proxy, way_in)
            finally:
                daemon.stop()
                await asyncio.wait_for(running, PATIENCE)


def both_ends(salmon: Salmon, work: Callable[[Ends], Awaitable[None]], **options: Any) -> None:
    """Run ``work`` while both ends run; ``options`` are the account's, the provider's, the
    agent's, or those of the service at home."""

    async def main() -> None:
        async with ends(salmon, **options) as both:
            await work(both)

    asyncio.run(main())
