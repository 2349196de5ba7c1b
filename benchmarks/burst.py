"""Large messages that arrive at once, each over a connection of its own: a process.

``python -m benchmarks.burst PORT MESSAGES OCTETS`` sends them in pieces that take turns, so that
all are under way together.  One that is deferred is sent again, over the same connection.  It
prints the seconds, and how often one was deferred.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from benchmarks.feeding import PIECE, RECIPIENT, SENDER, message

__all__: list[str] = []

# Seconds until a message that was deferred is sent again.
AGAIN = 0.5


class _Client:
    """One connection."""

    def __init__(self, number: int, octets: int) -> None:
        self._number, self._octets = number, octets
        self.deferred = 0

    async def connect(self, port: int) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        await self._code(b"")
        await self._code(b"EHLO feeder.example.net\r\n")

    async def send(self) -> None:
        while not await self._sent():
            self.deferred += 1
            await asyncio.sleep(AGAIN)
        self._writer.close()

    async def _sent(self) -> bool:
        """Whether the message was taken."""
        for command in (f"MAIL FROM:<{SENDER}>", f"RCPT TO:<{RECIPIENT}>", "DATA"):
            code = await self._code(f"{command}\r\n".encode())
            if code // 100 == 4:
                await self._code(b"RSET\r\n")
                return False
            assert code in (250, 354), (command, code)
        own, rest = message(self._number, self._octets)
        self._writer.write(own)
        for start in range(0, len(rest), PIECE):
            self._writer.write(memoryview(rest)[start : start + PIECE])
            await self._writer.drain()
        code = await self._code(b".\r\n")
        assert code // 100 in (2, 4), code
        return code == 250

    async def _code(self, line: bytes) -> int:
        """The code of the reply to a line."""
        self._writer.write(line)
        while (reply := await self._reader.readline())[3:4] == b"-":
            pass
        return int(reply[:3])


async def main(port: int, messages: int, octets: int) -> dict[str, float]:
    """The process."""
    clients = [_Client(number, octets) for number in range(messages)]
    await asyncio.gather(*(one.connect(port) for one in clients))
    started = time.monotonic()
    await asyncio.gather(*(one.send() for one in clients))
    seconds = time.monotonic() - started
    return {"seconds": seconds, "deferred": sum(one.deferred for one in clients)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(*map(int, sys.argv[1:])))))
