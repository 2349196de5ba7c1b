"""Senders: mail servers that send a message again until they hear what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from salmon_revsmtp.smtp.replies import Reply, ReplyParser

__all__ = ["Line", "Mail", "connected", "send_until_heard"]

# Seconds that a sender waits for a reply, unless a test says otherwise.
PATIENCE = 60.0


@dataclass(frozen=True)
class Mail:
    """A message, and to whom it goes.

    ``prdr``  its sender asks for a reply per recipient, and sends BDAT; else it sends DATA.
    """

    data: bytes
    recipients: tuple[str, ...] = ("b@example.org",)
    prdr: bool = False
    sender: str = "a@example.net"


class Line:
    """One connection of a sender.

    ``received``  all that has come.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, patience: float
    ) -> None:
        self._reader, self._writer, self._patience = reader, writer, patience
        self._parser = ReplyParser()
        self.received = bytearray()

    def say(self, data: bytes) -> None:
        self._writer.write(data)

    def abort(self) -> None:
        """Break it off, with a reset."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def hear(self) -> Reply:
        """The next reply.  Raises :class:`OSError` when there is none."""
        while (reply := self._parser.next_reply()) is None:
            # Its TimeoutError is an OSError as from Python 3.11.
            reading = asyncio.ensure_future(self._reader.read(1 << 16))
            await asyncio.wait([reading], timeout=self._patience)
            if not reading.done():
                reading.cancel()
                raise TimeoutError("no reply in time")
            if not (data := reading.result()):
                raise ConnectionError("the server has closed the connection")
            self.received += data
            self._parser.receive_bytes(data)
        return reply

    async def ask(self, line: str) -> Reply:
        self.say(f"{line}\r\n".encode())
        return await self.hear()


async def _at_once() -> None:
    pass


@contextlib.asynccontextmanager
async def connected(port: int, patience: float = PATIENCE) -> AsyncIterator[Line]:
    """Be a sender, on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Line(reader, writer, patience)
    finally:
        writer.close()


async def send_until_heard(
    port: int,
    mail: Mail,
    *,
    heard: Callable[[str, Reply], None] = lambda recipient, reply: None,
    again: Callable[[], Awaitable[None]] = _at_once,
    patience: float = PATIENCE,
    most: int = 50,
) -> dict[str, Reply]:
    """Send a message, and again to those of whom nothing final was heard, until there is a 2yz or a
    5yz for each; returns these.

    ``heard``     called with each at the instant that it is heard.
    ``again``     waited for before it is sent again.
    ``patience``  seconds until a sender that hears nothing hangs up, in its first try.
    """
    final: dict[str, Reply] = {}
    for number in range(most):
        left = tuple(one for one in mail.recipients if one not in final)
        if number:
            await again()
        with contextlib.suppress(OSError):
            async with connected(port, PATIENCE if number else patience) as line:
                await _try(line, mail, left, final, heard)
        if len(final) == len(mail.recipients):
            return final
    raise AssertionError(f"a sender gives up: {final}")


async def _try(
    line: Line,
    mail: Mail,
    recipients: Sequence[str],
    final: dict[str, Reply],
    heard: Callable[[str, Reply], None],
) -> None:
    def note(recipient: str, reply: Reply) -> None:
        if not reply.transient:
            final[recipient] = reply
            heard(recipient, reply)

    for said in (await line.hear(), await line.ask("EHLO sender.example.net")):
        if not said.positive:
            return
    prdr = mail.prdr and len(recipients) > 1
    if not (await line.ask(f"MAIL FROM:<{mail.sender}>{' PRDR' * prdr}")).positive:
        return
    accepted = []
    for one in recipients:
        reply = await line.ask(f"RCPT TO:<{one}>")
        if reply.positive:
            accepted.append(one)
        else:
            note(one, reply)
    if not accepted:
        return
    for one, reply in (await _give(line, mail, accepted, prdr, note)).items():
        note(one, reply)
    await line.ask("QUIT")


async def _give(
    line: Line,
    mail: Mail,
    accepted: Sequence[str],
    prdr: bool,
    note: Callable[[str, Reply], None],
) -> dict[str, Reply]:
    """The data; returns what was said of each recipient."""
    if mail.prdr:
        line.say(b"BDAT %d LAST\r\n%s" % (len(mail.data), mail.data))
    else:
        if (reply := await line.ask("DATA")).code != 354:
            return {}
        line.say(mail.data.replace(b"\r\n.", b"\r\n..") + b".\r\n")
    reply = await line.hear()
    if not prdr or reply.code != 353:
        return dict.fromkeys(accepted, reply)
    each: dict[str, Reply] = {}
    for one in accepted:
        each[one] = await line.hear()
        # As Exim does it: a 5yz counts at once, a 2yz only when the last reply is here.
        if each[one].permanent:
            note(one, each[one])
    last = await line.hear()
    return each if last.positive else {**dict.fromkeys(accepted, last), **_refusals(each)}


def _refusals(each: dict[str, Reply]) -> dict[str, Reply]:
    return {one: reply for one, reply in each.items() if reply.permanent}
