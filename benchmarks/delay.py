"""A link with a length: every octet arrives so many seconds after it was sent, in both directions.

As a process (``python -m benchmarks.delay SECONDS PORT``) it listens, and connects to a port of the
loopback for every connection that it gets.  It has all the room in the world: what is measured is
distance, not capacity.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque

from benchmarks.processes import end_with_parent

__all__: list[str] = []


class _Way(asyncio.Protocol):
    """One end of the link; what comes here leaves at ``other``, later."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._under_way: deque[tuple[float, bytes | None]] = deque()
        self._transport: asyncio.Transport | None = None
        self.other: _Way | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=1 << 30)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._send(data)

    def eof_received(self) -> bool:
        self._send(None)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._send(None)

    def _send(self, data: bytes | None) -> None:
        if self._seconds == 0:
            self._arrives(data)
            return
        self._under_way.append((self._loop.time() + self._seconds, data))
        if len(self._under_way) == 1:
            self._loop.call_at(self._under_way[0][0], self._arrive)

    def _arrive(self) -> None:
        now = self._loop.time()
        while self._under_way and self._under_way[0][0] <= now:
            self._arrives(self._under_way.popleft()[1])
        if self._under_way:
            self._loop.call_at(self._under_way[0][0], self._arrive)

    def _arrives(self, data: bytes | None) -> None:
        target = self.other._transport if self.other else None
        if target is None or target.is_closing():
            return
        if data is None:
            target.close()
        else:
            target.write(data)


async def main(seconds: float, port: int) -> None:
    """The process: ``seconds`` in one direction."""
    loop = asyncio.get_running_loop()

    async def connect(near: _Way) -> None:
        far = _Way(seconds)
        near.other, far.other = far, near
        # The handshake of TCP has its round trip, too.
        await asyncio.sleep(2 * seconds)
        await loop.create_connection(lambda: far, "127.0.0.1", port)

    tasks: set[asyncio.Task[None]] = set()

    class Near(_Way):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            tasks.add(loop.create_task(connect(self)))

    server = await loop.create_server(lambda: Near(seconds), "127.0.0.1", 0)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    end_with_parent()
    asyncio.run(main(float(sys.argv[1]), int(sys.argv[2])))
