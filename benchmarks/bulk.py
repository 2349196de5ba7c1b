"""A server with TLS that takes or gives octets as fast as it can: a process.

``python -m benchmarks.bulk asyncio|ours take|give OCTETS`` prints its port, and for each connection
the processor seconds that it took.  OCTETS are sent or read once per connection.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from benchmarks.idling import CERTIFICATE
from benchmarks.processes import end_with_parent
from salmon_revsmtp.net.tls import TlsTransport

__all__: list[str] = []

# As the driver writes.
PIECE = 256 * 1024


class Bulk(asyncio.Protocol):
    """One connection."""

    def __init__(self, ours: bool, give: bool, octets: int) -> None:
        self._ours, self._give, self._left = ours, give, octets
        self._piece = bytes(PIECE)
        self._free = True
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._ours:
            self._begin(transport)
            return
        context = CERTIFICATE.context()
        assert context is not None
        self._task = asyncio.get_running_loop().create_task(
            self._shake(TlsTransport(transport, context))
        )

    async def _shake(self, encrypted: TlsTransport) -> None:
        await encrypted.shake_hands()
        encrypted.set_protocol(self)
        self._begin(encrypted)
        encrypted.resume_reading()

    def _begin(self, transport: asyncio.Transport) -> None:
        self._transport, self._started = transport, time.process_time()
        self._pump()

    def pause_writing(self) -> None:
        self._free = False

    def resume_writing(self) -> None:
        self._free = True
        self._pump()

    def _pump(self) -> None:
        assert self._transport is not None
        while self._give and self._free and self._left > 0:
            self._left -= PIECE
            self._transport.write(self._piece)
            if self._left <= 0:
                self._end()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._left -= len(data)
        if not self._give and self._left <= 0:
            self._transport.write(b"x")
            self._end()

    def _end(self) -> None:
        print(json.dumps({"cpu": time.process_time() - self._started}), flush=True)


async def main(ours: bool, give: bool, octets: int) -> None:
    """The process."""
    server = await asyncio.get_running_loop().create_server(
        lambda: Bulk(ours, give, octets),
        "127.0.0.1",
        0,
        ssl=None if ours else CERTIFICATE.context(),
    )
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(main(sys.argv[1] == "ours", sys.argv[2] == "give", int(sys.argv[3])))
