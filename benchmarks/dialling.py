"""Many connections of one client, under asyncio's own TLS: a process.

``python -m benchmarks.dialling PORT NUMBER`` opens one, and then so many more, to a server that
says one line; prints the octets of memory that each of the latter takes, and keeps them.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys

from benchmarks.crowd import open_files
from benchmarks.idling import resident
from benchmarks.processes import end_with_parent

__all__: list[str] = []

# Connections that are opened at a time.
AT_ONCE = 50


class Heard(asyncio.Protocol):
    """Waits for one line."""

    def __init__(self) -> None:
        self.heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.heard.done():
            self.heard.set_result(None)


async def main(port: int, number: int) -> None:
    """The process."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    loop = asyncio.get_running_loop()
    kept: list[Heard] = []

    async def dial() -> None:
        _, protocol = await loop.create_connection(Heard, "127.0.0.1", port, ssl=context)
        await protocol.heard
        kept.append(protocol)

    await dial()
    before = resident()
    for start in range(0, number, AT_ONCE):
        await asyncio.gather(*(dial() for _ in range(min(AT_ONCE, number - start))))
    print(json.dumps({"octets": (resident() - before) / number}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    end_with_parent()
    open_files()
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
