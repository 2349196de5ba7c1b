"""Many providers in one process: a port for each.

``python -m benchmarks.crowd PROVIDERS CUSTOMERS MESSAGES OCTETS`` prints the ports; then, when as
many customers have called, when the first and the last did (monotonic clock); and at the end how
many messages were answered in how many seconds, with the slowest and the median latency: from the
write of a message to its answer.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import deque

from benchmarks.feeding import RECIPIENT, SENDER, message
from benchmarks.processes import end_with_parent

__all__ = ["open_files"]


def open_files() -> None:
    """Have as many descriptors as we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Crowd:
    """What all providers have in common, and what came of it."""

    def __init__(self, customers: int, messages: int, octets: int) -> None:
        self.customers, self.messages, self.octets = customers, messages, octets
        self.numbers = 0
        self.first_call = self.last_call = self.started = 0.0
        self.called = 0
        self.latencies: list[float] = []

    def call(self) -> None:
        """A customer has called for the first time."""
        self.called += 1
        now = time.monotonic()
        if self.called == 1:
            self.first_call = now
        if self.called == self.customers:
            self.last_call = now
            _tell(first_call=self.first_call, last_call=self.last_call)

    def answered(self, latency: float) -> None:
        """A message has its 250."""
        self.latencies.append(latency)
        if len(self.latencies) == self.customers * self.messages:
            seconds = time.monotonic() - self.started
            _tell(
                messages=len(self.latencies),
                seconds=seconds,
                slowest=max(self.latencies),
                median=sorted(self.latencies)[len(self.latencies) // 2],
            )

    def next_message(self) -> bytes:
        """One more, as a pipelined transaction."""
        self.numbers += 1
        own, rest = message(self.numbers, self.octets)
        return (
            (
                f"MAIL FROM:<{SENDER}>\r\nRCPT TO:<{RECIPIENT}>\r\n"
                f"BDAT {len(own) + len(rest)} LAST\r\n"
            ).encode()
            + own
            + rest
        )


class _Provider(asyncio.Protocol):
    """One connection: anybody may log in; the first who asks has mail, later ones have not."""

    def __init__(self, crowd: Crowd, served: list[bool]) -> None:
        self._crowd, self._served = crowd, served
        self._buffer = b""
        self._take = self._command
        self._written: deque[float] = deque()
        self._replies = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if not self._served:
            self._served.append(False)
            self._crowd.call()
        transport.write(b"220 provider.example.net\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._take(line.rstrip(b"\r"))

    def _command(self, line: bytes) -> None:
        answers = {
            b"EHLO": b"250-provider.example.net\r\n250-AUTH CRAM-MD5\r\n250 ATRN\r\n",
            b"AUTH": b"334 PDFAeD4=\r\n",
            b"ATRN": b"453 you have no mail\r\n",
            b"QUIT": b"221 bye\r\n",
        }
        verb = line[:4].upper()
        if verb == b"ATRN" and self._crowd.messages and not self._served[0]:
            self._served[0] = True
            self._take = self._greeting
            self._transport.write(b"250 reversing\r\n")
            return
        # Whatever else comes is the answer to AUTH's challenge.
        self._transport.write(answers.get(verb, b"235 welcome\r\n"))
        if verb == b"QUIT":
            self._transport.close()

    def _greeting(self, line: bytes) -> None:
        self._transport.write(b"EHLO provider.example.net\r\n")
        self._take = self._ehlo

    def _ehlo(self, line: bytes) -> None:
        if line[3:4] == b"-":
            return
        self._take = self._reply
        crowd = self._crowd
        crowd.started = crowd.started or time.monotonic()
        for _ in range(crowd.messages):
            self._transport.write(crowd.next_message())
            self._written.append(time.monotonic())

    def _reply(self, line: bytes) -> None:
        if not line.startswith(b"2"):
            _tell(failure=line.decode("ascii", "replace"))
        self._replies += 1
        if self._replies % 3 == 0 and self._written:
            self._crowd.answered(time.monotonic() - self._written.popleft())
            if not self._written:
                self._transport.write(b"QUIT\r\n")


def _tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


async def main(providers: int, customers: int, messages: int, octets: int) -> None:
    """The process."""
    loop = asyncio.get_running_loop()
    crowd = Crowd(customers, messages, octets)
    ports = []
    for _ in range(providers):
        served: list[bool] = []
        server = await loop.create_server(
            lambda served=served: _Provider(crowd, served),  # type: ignore[misc]
            "127.0.0.1",
            0,
        )
        ports.append(server.sockets[0].getsockname()[1])
    _tell(ports=ports)
    await asyncio.Event().wait()


if __name__ == "__main__":
    end_with_parent()
    open_files()
    asyncio.run(main(*map(int, sys.argv[1:5])))
