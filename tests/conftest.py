"""What the tests share: a place for Salmon's global state, and a provider that follows a script."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sample
from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import Router, route, stateless
from salmon.server import SMTPError

import salmon_revsmtp.demo
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.configuration import Configuration, load

DEMO = Path(salmon_revsmtp.demo.__file__).parent
CERTIFICATE = DEMO / "localhost-certificate.pem"
PRIVATE_KEY = DEMO / "localhost-key.pem"

PASSWORD = "correct horse battery"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(sample)


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, PRIVATE_KEY)
    return context


class Salmon:
    """Salmon's Router in a folder of its own, and what its handlers got."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.handled: list[MailRequest] = []
        self.relayed: list[tuple[str, str, str]] = []
        self.relay: Any = SimpleNamespace(deliver=self._relay)

    def _relay(self, message: Any, To: str, From: str) -> None:
        self.relayed.append((From, To, str(message)))

    def handle(
        self, pattern: str, action: Callable[[MailRequest], None] = lambda message: None
    ) -> None:
        """Route addresses that match ``pattern`` to a handler that records and runs ``action``."""

        @route(pattern)
        @stateless
        def handler(message: MailRequest, **captures: str) -> None:
            self.handled.append(message)
            action(message)

    def undeliverable(self) -> list[bytes]:
        target = queue.Queue("run/undeliverable")
        return [target.mbox.get_bytes(key) for key in target.keys()]


@pytest.fixture
def salmon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Salmon:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    Router.clear_routes()
    Router.clear_states()
    monkeypatch.setattr(Router, "RELOAD", False)
    monkeypatch.setattr(Router, "LOG_EXCEPTIONS", True)
    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", queue.Queue("run/undeliverable"))
    return Salmon(tmp_path)


def agent_keys(port: Any, /, **keys: Any) -> dict[str, Any]:
    return {
        "name": "isp",
        "protocol": "odmr",
        "server": "localhost",
        "port": port,
        "tls": "none",
        "account": "acme",
        "password": PASSWORD,
        "domains": ["example.org"],
        **keys,
    }


def configuration(
    *agents: dict[str, Any], plugins: Plugins | None = None, **services: dict[str, Any]
) -> Configuration:
    services.setdefault("default", {"hostname": "mail.example.org"})
    module: Any = SimpleNamespace(collection_agents=list(agents), smtp_services=services)
    return load(module, plugins or Plugins.load())


async def collect(
    salmon: Salmon,
    *agents: dict[str, Any],
    plugins: Plugins | None = None,
    **services: dict[str, Any],
) -> list[Report]:
    plugins = plugins or Plugins.load()
    valid = configuration(*agents, plugins=plugins, **services)
    with Collector(valid, plugins, lambda: salmon.relay) as collector:
        return await collector.collect(valid.agents)


class Dialogue:
    """One connection of a scripted provider."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.heard: list[str] = []

    async def hear(self, expected: str = "") -> str:
        line = (await asyncio.wait_for(self._reader.readline(), 20)).decode()
        self.heard.append(line.rstrip("\r\n"))
        assert line.startswith(expected), f"heard {line!r}, not {expected!r}"
        return line.rstrip("\r\n")

    async def replied(self, code: int) -> str:
        """Hear a whole reply; returns its last line."""
        line = await self.hear(str(code))
        while line[3:4] == "-":
            line = await self.hear(str(code))
        return line

    async def silence(self) -> None:
        """The other side closes without another word."""
        assert await asyncio.wait_for(self._reader.read(), 20) == b""

    async def ignore(self) -> None:
        """Answer nothing until the other side closes."""
        await asyncio.wait_for(self._reader.read(), 20)

    def say(self, *lines: str | bytes) -> None:
        for line in lines:
            text = line.encode() if isinstance(line, str) else line
            self._writer.write(text + b"\r\n")

    async def asks(self, command: str, *reply: str) -> str:
        heard = await self.hear(command)
        self.say(*reply)
        return heard

    async def up_to_atrn(self, auth: str = "CRAM-MD5") -> None:
        """Greeting, EHLO, a CRAM-MD5 login, EHLO; the next is ATRN."""
        self.say("220 odmr.example.net")
        await self.asks("EHLO", "250-odmr.example.net", f"250-AUTH {auth}", "250 ATRN")
        await self.asks("AUTH CRAM-MD5", "334 " + base64.b64encode(b"<1@x>").decode())
        await self.asks("", "235 welcome")
        await self.asks("EHLO", "250-odmr.example.net", f"250-AUTH {auth}", "250 ATRN")

    async def reverse(self) -> None:
        """All of that, ATRN too: now we are the client."""
        await self.up_to_atrn()
        await self.asks("ATRN", "250 reversing")
        await self.replied(220)
        self.say("EHLO odmr.example.net")
        await self.replied(250)

    async def send(self, data: bytes, *recipients: str, sender: str = "a@example.net") -> str:
        """One message by BDAT, step by step; returns the last reply line."""
        self.say(f"MAIL FROM:<{sender}>")
        await self.replied(250)
        for recipient in recipients or ("b@example.org",):
            self.say(f"RCPT TO:<{recipient}>")
            await self.replied(250)
        self._writer.write(b"BDAT %d LAST\r\n" % len(data) + data)
        line = await self.hear()
        while line[3:4] == "-":
            line = await self.hear()
        return line

    async def quit(self) -> None:
        self.say("QUIT")
        await self.replied(221)
        await self.silence()

    def end(self) -> None:
        """Say no more, but listen."""
        self._writer.write_eof()

    def abort(self) -> None:
        """Break the connection off."""
        self._writer.transport.abort()


Script = Callable[[Dialogue], Awaitable[None]]


@contextlib.asynccontextmanager
async def scripted(*scripts: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A provider whose first connection follows the first script, and so on; yields its port.

    At the end every script has run to its end, and nobody has called once more.
    """
    errors: list[BaseException] = []
    waiting = list(scripts)
    calls = 0
    running: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        running.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            if waiting:
                await waiting.pop(0)(Dialogue(reader, writer))
        except BaseException as error:
            errors.append(error)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "localhost", 0, family=2, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await asyncio.wait_for(asyncio.gather(*running), 20)
    if errors:
        raise errors[0]
    assert calls == len(scripts), f"{calls} connections, {len(scripts)} scripts"


async def no_more_mail(provider: Dialogue) -> None:
    """The session that ends a drain."""
    await provider.up_to_atrn()
    await provider.asks("ATRN", "453 you have no mail")
    await provider.asks("QUIT", "221 bye")


@pytest.fixture
def chroot() -> Callable[[str], Path]:
    """A function that gives the root of a real server's chroot.  A server that is not there is a
    reason to skip the test, but not in CI."""
    from servers import find

    def root(name: str) -> Path:
        found = find(name)
        if isinstance(found, str):
            if os.environ.get("CI"):
                pytest.fail(found)
            pytest.skip(found)
        return found

    return root


# -- one message in one session -----------------------------------------------------------------

MESSAGE = b"From: Ann <ann@example.net>\r\nTo: list@example.net\r\nSubject: hi\r\n\r\nhello\r\n"


def fails(code: int, text: str | None = None) -> Any:
    def action(message: MailRequest) -> None:
        raise SMTPError(code, text)

    return action


def explodes(message: MailRequest) -> None:
    raise RuntimeError("handler bug")


def exchange(
    salmon: Salmon,
    *recipients: str,
    data: bytes = MESSAGE,
    sender: str = "ann@example.net",
    mail: str = "",
    rcpt: str = "",
    times: int = 1,
    plugins: Plugins | None = None,
    **service: Any,
) -> tuple[list[str], Report]:
    """Send one message in one session, ``times`` over; the replies to its data, the report."""
    heard: list[str] = []

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        for _ in range(times):
            provider.say(f"MAIL FROM:<{sender}>{mail}")
            await provider.replied(250)
            for recipient in recipients:
                provider.say(f"RCPT TO:<{recipient}>{rcpt}")
                await provider.replied(250)
            provider.say(b"BDAT %d LAST\r\n%s" % (len(data), data[:-2]))
            heard.append(await provider.hear())
            if heard[-1].startswith("353"):
                heard.extend([await provider.hear() for _ in (*recipients, "all")])
        await provider.quit()

    async def done(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.asks("ATRN", "453 no mail")

    async def main() -> Report:
        # A second session comes only if the first has taken anything.
        async with scripted(script, done) as port:
            [report] = await collect(
                salmon, agent_keys(port), plugins=plugins, default={**DEFAULT, **service}
            )
            if report.sessions == 1:
                reader, writer = await asyncio.open_connection("localhost", port)
                await finish(Dialogue(reader, writer))
        return report

    return heard, asyncio.run(main())


DEFAULT = {"hostname": "mail.example.org"}


async def finish(customer: Dialogue) -> None:
    """Play the customer of the script ``done``."""
    await customer.hear("220")
    customer.say("EHLO x")
    await customer.replied(250)
    for line in ("AUTH CRAM-MD5", "x", "EHLO x", "ATRN"):
        customer.say(line)
        await customer.hear()
        if line == "EHLO x":
            await customer.hear()
            await customer.hear()
