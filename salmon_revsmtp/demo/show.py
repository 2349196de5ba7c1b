"""The demo: the example project collects sample mail from a provider in the same process, and has
more passed on to it live.

Everything is real but the distance: TLS with a certificate, a login, ATRN, the reversal, the
project's own boot module and handlers.  It happens in a temporary folder, which is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.demo.samples import Sample, samples
from salmon_revsmtp.hooks import hookimpl
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.store import Arrival
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.configuration import load
from salmon_revsmtp.server.daemon import Daemon
from salmon_revsmtp.server.project import Project

__all__ = ["run"]

HERE = Path(__file__).parent
CERTIFICATE = HERE / "localhost-certificate.pem"
PRIVATE_KEY = HERE / "localhost-key.pem"
ACCOUNT = "acme"

# Messages that are passed on while their senders wait.
PASSED_ON = 10
# What home refuses: a recipient without a route, and a message that a handler does not want.
NO_ONE, SOLD_OUT = "no-one@example.org", "order-anvil@example.com"


class Witness:
    """Sees who handled what: a plugin, and a listener on Salmon's own log of its routing."""

    def __init__(self) -> None:
        self.results: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self.handled_at: dict[str, float] = {}
        self._handlers: list[str] = []
        self._message = b""
        self._log = logging.Handler(logging.DEBUG)
        self._log.emit = self._routed  # type: ignore[method-assign]

    def listen(self) -> None:
        """Salmon says at DEBUG which function handled a message."""
        routing = logging.getLogger("routing")
        routing.addHandler(self._log)
        routing.setLevel(logging.DEBUG)

    def _routed(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and "was handled by" in str(record.msg):
            module = str(record.args[1]).removeprefix("app.handlers.")
            self._handlers.append(f"{module}.{record.args[2]}")

    @hookimpl
    def message_received(self, envelope: Any, message: bytes) -> None:
        self._handlers = []
        self._message = message

    @hookimpl
    def message_delivered(self, recipient: str, reply: Any) -> None:
        result = f"refused: {reply}"
        if reply.positive:
            result = ", ".join(self._handlers) or "no handler took it, undeliverable queue"
        # The Message-ID names a sample, the recipient a delivery of it.
        head = self._message.partition(b"\n\n")[0]
        [found] = [one for one in head.split(b"\n") if one.lower().startswith(b"message-id:")]
        message_id = found.decode().split()[1]
        self.handled_at[message_id] = time.monotonic()
        self.results[message_id].append((recipient, result))


def run(plugins: Plugins) -> int:
    """Run the demo and print what happens; returns the exit status."""
    console = Console(highlight=False)
    held = samples()
    with tempfile.TemporaryDirectory(prefix="salmon-revsmtp-demo-") as name:
        folder = Path(name)
        project = _copy_project(folder / "project")
        console.print(f"A provider on this machine holds {len(held)} messages for example.org.")
        console.print("The example project (config/, app/handlers/) collects them by ODMR:\n")
        witness = Witness()
        plugins.register(witness)
        seen = asyncio.run(_run(project, folder / "provider", held, plugins, witness))
    _show(console, held, witness)
    for report in seen.reports:
        console.print(report.summary(), soft_wrap=True)
    fastest, slowest = (round(1000 * one, 1) for one in (min(seen.passed_on), max(seen.passed_on)))
    console.print(
        f"\nThen the customer kept its session open, and {PASSED_ON} messages were sent to the "
        f"provider as any mail\nserver would. {seen.live} of them went down that session live: "
        "when its sender heard 250, each was through\nits handler, "
        f"{fastest} to {slowest} ms after DATA. Two other senders heard what home refuses:\n",
        soft_wrap=True,
    )
    for recipient, reply in seen.refused.items():
        console.print(f"  to {recipient:<24} {reply}", soft_wrap=True)
    console.print(
        f"\nThe provider has {seen.left} messages left. "
        f"All of this took {seen.seconds:.1f} seconds.\n"
        'To set up your own, see "Two ends in five minutes" in README.rst.',
        soft_wrap=True,
    )
    lost = [one.kind for one in held if not _delivered(one, witness)]
    if seen.live < PASSED_ON:
        lost.append(f"{PASSED_ON - seen.live} live messages")
    if lost or seen.left or not all(report.outcome.good for report in seen.reports):
        console.print(f"Something went wrong; not delivered: {', '.join(lost) or 'nothing'}")
        return 1
    return 0


def _copy_project(target: Path) -> Path:
    """The example project: beside the package in a source tree, inside it when installed."""
    source = HERE.parent.parent
    if not (source / "setup.py").exists():
        source = HERE / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("config", "app"):
        shutil.copytree(source / name, target / name, ignore=ignored)
    for name in ("logs", "run"):
        (target / name).mkdir()
    return target


def _provider_settings(folder: Path, password: str) -> Any:
    """What the provider's own project would say."""
    return SimpleNamespace(
        customer_accounts=[
            {"name": ACCOUNT, "password": password, "domains": ["example.org", "example.com"]}
        ],
        provider={
            "hostname": "odmr.example.net",
            "listen": "127.0.0.1:0",
            "tls_cert": CERTIFICATE,
            "tls_key": PRIVATE_KEY,
            "hold": str(folder / "hold"),
        },
        smtp_services={
            "mx": {"hostname": "mx.example.net", "listen": "127.0.0.1:0", "delivery": "hold"}
        },
    )


@dataclass
class _Seen:
    """What happened: the reports of the collections, how many messages the provider has left, the
    seconds that it took, those from DATA to the 250 of each message that was passed on, how many of
    these were through their handlers then, and what the senders of others heard, by recipient."""

    reports: list[Report] = field(default_factory=list)
    left: int = 0
    seconds: float = 0.0
    passed_on: list[float] = field(default_factory=list)
    live: int = 0
    refused: dict[str, str] = field(default_factory=dict)


async def _run(
    folder: Path, provider_folder: Path, held: list[Sample], plugins: Plugins, witness: Witness
) -> _Seen:
    password = secrets.token_urlsafe()
    theirs = Plugins()  # ours are not the provider's
    settings = load(_provider_settings(provider_folder, password), theirs)
    with Collector(settings, theirs, _no_relay, provider_folder) as holder:
        store = holder.providing.store
        for sample in held:
            accounts = (ACCOUNT,) * len(sample.envelope.recipients)
            store.put([Arrival(sample.envelope, accounts, [sample.data])])
        async with _served(holder, theirs) as server:
            assert server.provider is not None
            (folder / ".env").write_text(
                f"ISP_SERVER=127.0.0.1\nISP_PORT={server.provider.port}\n"
                f"ISP_CA_FILE={CERTIFICATE}\nISP_PASSWORD={password}\n"
            )
            seen = await _collect(folder, server, plugins, witness)
        seen.left = store.usage(ACCOUNT).messages
    return seen


async def _collect(folder: Path, server: Daemon, plugins: Plugins, witness: Witness) -> _Seen:
    """Be the customer: collect, and then wait for what is passed on."""
    seen = _Seen()
    sys.path.insert(0, str(folder))
    project = Project.open(folder, "config.settings")
    configuration = load(project.settings, plugins)
    project.boot()
    witness.listen()
    started = time.monotonic()
    with Collector(configuration, plugins, lambda: project.settings.relay) as collector:
        for _ in range(2):
            seen.reports += await collector.collect(configuration.agents)
    project.settings.smtp_services["default"]["unknown_recipients"] = "refuse"
    configuration = load(project.settings, plugins)
    with Collector(configuration, plugins, lambda: project.settings.relay) as collector:
        async with _served(collector, plugins):
            while not any(one.live and one.live.passes("example.org") for one in server.sessions):
                await asyncio.sleep(0.01)
            await _pass_on(server, seen, witness)
    seen.seconds = time.monotonic() - started
    return seen


async def _pass_on(server: Daemon, seen: _Seen, witness: Witness) -> None:
    """Send to the provider as any mail server would."""
    [port] = [one.port for one in server.listeners]
    for number in range(PASSED_ON):
        name = f"<passed-on-{number}@example.net>"
        started = time.monotonic()
        reply = await _send(port, name, "ada@example.org")
        answered = time.monotonic()
        seen.passed_on.append(answered - started)
        seen.live += reply.startswith("250") and witness.handled_at.get(name, answered) < answered
    for recipient in (NO_ONE, SOLD_OUT):
        seen.refused[recipient] = await _send(port, f"<{recipient}>", recipient)


async def _send(port: int, message_id: str, recipient: str) -> str:
    """Send a message; returns the reply that ended its transaction."""
    import aiosmtplib

    data = f"From: ann@example.net\r\nMessage-ID: {message_id}\r\n\r\nhello\r\n".encode()
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False) as client:
        await client.ehlo()
        try:
            await client.mail("ann@example.net")
            await client.rcpt(recipient)
            reply = await client.data(data)
        except aiosmtplib.SMTPResponseException as error:
            return f"{error.code} {error.message}"
    return f"{reply.code} {reply.message}"


@contextlib.asynccontextmanager
async def _served(collector: Collector, plugins: Plugins) -> AsyncIterator[Daemon]:
    """A server, while this lasts."""
    daemon, listening = Daemon(collector, plugins), asyncio.Event()
    running = asyncio.ensure_future(daemon.run(listening.set))
    waiting = asyncio.ensure_future(listening.wait())
    await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        yield daemon
    finally:
        daemon.stop()
        await running


def _no_relay() -> Any:
    raise ConnectionError("the demo sends no mail to the world")


def _message_id(sample: Sample) -> str:
    head = sample.data.partition(b"\r\n\r\n")[0]
    [found] = [one for one in head.split(b"\r\n") if one.startswith(b"Message-ID:")]
    return found.decode().split()[1]


def _delivered(sample: Sample, witness: Witness) -> bool:
    seen = [recipient for recipient, _ in witness.results[_message_id(sample)]]
    return seen == list(sample.envelope.recipients)


def _show(console: Console, held: list[Sample], witness: Witness) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("message", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("recipient", no_wrap=True)
    table.add_column("what became of it", overflow="fold")
    for sample in held:
        kind, size = sample.kind, f"{len(sample.data):,}"
        for recipient, result in witness.results[_message_id(sample)]:
            table.add_row(kind, size, recipient, result)
            kind = size = ""
    if not console.is_terminal:
        console.width = 100
    console.print(table)
    console.print()
