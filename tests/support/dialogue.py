"""A provider that follows a script."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast


class Dialogue:
    """One connection of a scripted provider."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.heard: list[str] = []

    async def hear(self, expected: str = "") -> str:
        line = (await asyncio.wait_for(self.reader.readline(), 60)).decode()
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
        assert await asyncio.wait_for(self.reader.read(), 60) == b""

    async def left(self) -> None:
        """The other side says QUIT, or nothing, and closes."""
        if line := (await asyncio.wait_for(self.reader.readline(), 60)):
            assert line == b"QUIT\r\n", line
            self.say("221 bye")
            await self.silence()

    async def starttls(self, context: ssl.SSLContext) -> None:
        """Be the server of a TLS handshake."""
        loop, writer = asyncio.get_running_loop(), cast(Any, self.writer)
        await self.writer.drain()
        transport = self.writer.transport
        protocol: Any = transport.get_protocol()
        tls = await loop.start_tls(transport, protocol, context, server_side=True)
        writer._transport = tls  # Python 3.11 has StreamWriter.start_tls
        protocol._over_ssl = True

    async def ignore(self) -> None:
        """Answer nothing until the other side closes."""
        await asyncio.wait_for(self.reader.read(), 60)

    def say(self, *lines: str | bytes) -> None:
        for line in lines:
            text = line.encode() if isinstance(line, str) else line
            self.writer.write(text + b"\r\n")

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
        self.writer.write(b"BDAT %d LAST\r\n" % len(data) + data)
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
        self.writer.write_eof()

    def abort(self) -> None:
        """Break the connection off."""
        self.writer.transport.abort()


Script = Callable[[Dialogue], Awaitable[None]]


@contextlib.asynccontextmanager
async def scripted(*scripts: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A provider whose first connection follows the first script, and so on; yields its port.

    At the end every script has run to its end, and no one has called once more.
    """
    errors: list[BaseException] = []
    waiting = list(scripts)
    calls = 0
    running: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
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
        await asyncio.wait_for(asyncio.gather(*running), 60)
    if errors:
        raise errors[0]
    assert calls == len(scripts), f"{calls} connections, {len(scripts)} scripts"


async def no_more_mail(provider: Dialogue) -> None:
    """The session that ends a drain."""
    await provider.up_to_atrn()
    await provider.asks("ATRN", "453 you have no mail")
    await provider.asks("QUIT", "221 bye")
