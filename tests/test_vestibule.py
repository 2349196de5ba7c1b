"""A listener that begins with TLS: a connection has a place from its first moment."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

import pytest
from support.tls import CERTIFICATE, server_tls

from salmon_revsmtp.net import places
from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.listener import Admit, Listener
from salmon_revsmtp.smtp.receiver import Quit, Receiver


class Session(Driver):
    """A server that takes no mail."""

    def __init__(self, admit: Admit) -> None:
        self.receiver = Receiver("h")
        super().__init__(self.receiver, 60)
        self._admit = admit

    def connected(self) -> None:
        if refusal := self._admit(self):
            self.receiver.refuse_session(refusal)

    def handle(self, event: object) -> None:
        self.clean = isinstance(event, Quit)


KEPT: list[asyncio.StreamWriter] = []  # or they would be closed


async def silent(port: int, source: str) -> asyncio.StreamReader:
    """A client that says nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    KEPT.append(writer)
    return reader


async def greeting(port: int, source: str, early: bytes = b"") -> bytes:
    """The code that a client hears after its handshake."""
    context = ssl.create_default_context(cafile=CERTIFICATE)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost", local_addr=(source, 0)
    )
    writer.write(early)
    heard = (await reader.readline())[:3]
    if early:
        heard += b" " + (await reader.readline())[:3]
    writer.close()
    return heard


def with_listener(work: Callable[[int, Listener], Awaitable[None]], most: int) -> None:
    async def main() -> None:
        one = Listener(
            "x", Session, "127.0.0.1", 0, tls=server_tls, max_connections=most, max_per_address=2
        )
        await one.start()
        await asyncio.wait_for(work(one.port, one), 30)
        await asyncio.wait_for(one.stop(5), 60)
        while KEPT:
            KEPT.pop().close()

    asyncio.run(main())


def test_handshakes_that_never_end_keep_no_one_out() -> None:
    async def work(port: int, listener: Listener) -> None:
        waiting = [await silent(port, f"127.0.{n}.{m}") for n in (1, 2) for m in (1, 2)]
        assert await greeting(port, "127.0.9.1") == b"220"
        gone = [asyncio.ensure_future(one.read()) for one in waiting]
        done, rest = await asyncio.wait(gone, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) >= 1
        for one in rest:
            one.cancel()

    with_listener(work, most=4)


def test_of_one_network_no_more_than_its_share_may_shake_hands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(port: int, listener: Listener) -> None:
        for _ in range(2):
            await silent(port, "127.0.1.1")
        reader = await silent(port, "127.0.1.2")
        assert await _read(reader) == b"", "turned away"
        monkeypatch.setattr(places, "IDLE", 0.0)
        assert await greeting(port, "127.0.1.3") == b"220"

    with_listener(work, most=10)


def test_what_comes_glued_to_the_handshake_is_not_lost() -> None:
    async def work(port: int, listener: Listener) -> None:
        for _ in range(20):
            assert await greeting(port, "127.0.1.1", early=b"NOOP\r\n") == b"220 250"

    with_listener(work, most=10)


def test_a_stop_ends_those_that_shake_hands() -> None:
    async def work(port: int, listener: Listener) -> None:
        reader = await silent(port, "127.0.1.1")
        other = await silent(port, "127.0.2.1")
        # Both have been accepted when a third that came after them is greeted.
        assert await greeting(port, "127.0.3.1") == b"220"
        await listener.stop(5)
        assert await _read(reader) == await _read(other) == b""

    with_listener(work, most=10)


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await asyncio.wait_for(reader.read(), 60)
    except ConnectionResetError:
        return b""
