"""Servers whose clients do nothing, with TLS from the start: a process.

``python -m benchmarks.idling provider ACCOUNTS KEEPALIVE PORT FOLDER`` is our provider; ``asyncio``
and ``ours`` are a server that says one line, over asyncio's own TLS and over ours.  Each prints its
port; a line on its standard input is answered with its processor time and its memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
import time
from pathlib import Path

from benchmarks.callers import account_name
from benchmarks.crowd import open_files
from benchmarks.project import PASSWORD
from salmon_revsmtp.net.address import HostAndPort
from salmon_revsmtp.net.certificate import Certificate
from salmon_revsmtp.net.tls import TlsTransport
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.provider.settings import AccountSettings

__all__: list[str] = []

DEMO = Path(__file__).parent.parent / "salmon_revsmtp/demo"
CERTIFICATE = Certificate(
    "benchmark", DEMO / "localhost-certificate.pem", DEMO / "localhost-key.pem"
)


def resident() -> int:
    """Our memory, in octets (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def asked() -> None:
    """Answer each line of the standard input until it ends."""
    while await asyncio.to_thread(sys.stdin.readline):
        facts = {"cpu": time.process_time(), "clock": time.monotonic(), "resident": resident()}
        print(json.dumps(facts), flush=True)


class Quiet(asyncio.Protocol):
    """Says one line, and, with ``tls``, does the handshake first."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._tls is None:
            self._greet(transport)
            return
        encrypted = TlsTransport(transport, self._tls)
        self._task = asyncio.get_running_loop().create_task(self._shake(encrypted))

    async def _shake(self, encrypted: TlsTransport) -> None:
        await encrypted.shake_hands()
        encrypted.set_protocol(self)
        self._greet(encrypted)
        encrypted.resume_reading()
        self._task = None

    def _greet(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        transport.write(b"220 localhost\r\n")


async def bare(ours: bool) -> None:
    """The process: no provider, only TLS."""
    context = CERTIFICATE.context()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Quiet(context if ours else None),
        "127.0.0.1",
        0,
        backlog=4096,
        ssl=None if ours else context,
    )
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await asked()


async def provider(accounts: int, keepalive: float, port: int, folder: Path) -> None:
    """The process: a provider, the passwords of whose accounts are in clear text."""
    settings = [
        AccountSettings.model_validate(
            {"name": account_name(one), "password": PASSWORD, "domains": [f"home-{one}.example"]}
        )
        for one in range(accounts)
    ]
    one = Provider(
        Accounts(settings, keepalive),
        EmbeddedStore(folder),
        lambda *_: None,
        Plugins(),
        "provider.example.net",
        certificate=CERTIFICATE,
        needs_tls=True,
        addresses=[(HostAndPort("127.0.0.1", port), True)],
        keepalive=keepalive,
    )
    async with one:
        print(json.dumps({"port": one.port}), flush=True)
        await asked()
        os._exit(0)  # as one that is killed: what is measured is not its end


if __name__ == "__main__":
    open_files()
    if sys.argv[1] == "provider":
        asyncio.run(
            provider(int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        )
    else:
        asyncio.run(bare(sys.argv[1] == "ours"))
