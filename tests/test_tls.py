"""TLS of our own: what a peer, and the protocol above, see of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest
from support.tls import CERTIFICATE, server_tls

from salmon_revsmtp.net import tls
from salmon_revsmtp.net.tls import TlsTransport

PATIENCE = 30
BIG = bytes(range(256)) * 4096 * 4


class Session(asyncio.Protocol):
    """A protocol under TLS that notes what happens to it."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self.transport: Any = None
        self.came = bytearray()
        self.events: list[str] = []
        self.shaken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.free = asyncio.Event()
        self.free.set()
        self.task: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = TlsTransport(transport, server_tls())
        self.task = asyncio.get_running_loop().create_task(self._shake())

    async def _shake(self) -> None:
        try:
            await self.transport.shake_hands(self._patience)
        except OSError as error:
            self.shaken.set_exception(error)
        else:
            self.transport.set_protocol(self)
            self.shaken.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.came += data

    def eof_received(self) -> None:
        self.events.append("eof")

    def pause_writing(self) -> None:
        self.free.clear()

    def resume_writing(self) -> None:
        self.free.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append("lost")
        self.lost.set_result(exc)

    async def until(self, so: Callable[[], object]) -> None:
        while not so():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(patience: float = PATIENCE) -> AsyncIterator[tuple[int, asyncio.Queue[Session]]]:
    """A port, and the sessions that come."""
    sessions: asyncio.Queue[Session] = asyncio.Queue()

    def connect() -> Session:
        session = Session(patience)
        sessions.put_nowait(session)
        return session

    server = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], sessions


def client_tls() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=CERTIFICATE)


def peer(writer: asyncio.StreamWriter) -> asyncio.Transport:
    return cast(asyncio.Transport, writer.transport)


Work = Callable[[Session, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def with_peer(work: Work, context: ssl.SSLContext | None = None) -> None:
    """A session, and asyncio's own TLS on the other side."""

    async def main() -> None:
        async with serving() as (port, sessions):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=context or client_tls(), server_hostname="localhost"
            )
            session = await sessions.get()
            await session.shaken
            session.transport.resume_reading()
            await work(session, reader, writer)
            session.transport.abort()
            writer.transport.abort()
            await session.lost

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_octets_arrive_as_they_were_sent_in_both_directions(version: ssl.TLSVersion) -> None:
    context = client_tls()
    context.maximum_version = version

    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        pieces = [b"", b"x", BIG[:4095], BIG[:4097], BIG[:70_000], BIG]
        for piece in pieces:
            session.transport.write(piece)
            writer.write(piece)
        session.transport.write(bytearray(b"end"))
        writer.write(b"end")
        whole = b"".join(pieces) + b"end"
        assert await reader.readexactly(len(whole)) == whole
        await session.until(lambda: len(session.came) >= len(whole))
        assert session.came == whole
        assert session.transport.get_extra_info("ssl_object").version() == {
            ssl.TLSVersion.TLSv1_2: "TLSv1.2",
            ssl.TLSVersion.TLSv1_3: "TLSv1.3",
        }.get(version)
        assert session.transport.get_extra_info("cipher")[0]
        assert session.transport.get_extra_info("peercert") is None
        assert session.transport.get_extra_info("peername")[0] == "127.0.0.1"

    with_peer(work, context)


def test_what_a_caller_changes_after_it_wrote_it_is_not_changed_on_the_wire() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        data = bytearray(BIG)
        session.transport.write(data)
        data[:] = bytes(len(data))
        assert await reader.readexactly(len(BIG)) == BIG

    with_peer(work)


def test_a_peer_that_does_not_read_stops_the_protocol_from_writing() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer(writer).pause_reading()
        written = 0
        while session.free.is_set():
            session.transport.write(BIG[:65536])
            written += 65536
            assert written < 1 << 26
            await asyncio.sleep(0)
        assert session.transport.get_write_buffer_size() > 0
        peer(writer).resume_reading()
        assert len(await reader.readexactly(written)) == written
        await session.free.wait()

    with_peer(work)


def test_a_protocol_that_does_not_read_stops_the_peer_from_writing() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        session.transport.pause_reading()
        assert not session.transport.is_reading()
        # What is on its way has room in the buffers of both systems and of asyncio, and no more.
        transport: Any = writer.transport
        written = 0
        while transport.get_write_buffer_size() < 1 << 20:
            writer.write(BIG[: 1 << 20])
            written += 1 << 20
            assert written < 1 << 28
            await asyncio.sleep(0.01)
        assert not session.came
        session.transport.resume_reading()
        await session.until(lambda: len(session.came) == written)

    with_peer(work)


def test_a_pause_while_data_is_received_loses_nothing() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        take = session.data_received

        def now_and_then(data: bytes) -> None:
            take(data)
            session.transport.pause_reading()
            loop.call_soon(session.transport.resume_reading)

        session.data_received = now_and_then  # type: ignore[method-assign]
        writer.write(BIG)
        await session.until(lambda: len(session.came) == len(BIG))
        assert session.came == BIG

    with_peer(work)


def test_what_came_with_the_end_of_the_handshake_waits_for_someone_to_read() -> None:
    async def main() -> None:
        async with serving() as (port, sessions):
            client = asyncio.create_task(
                asyncio.open_connection(
                    "127.0.0.1", port, ssl=client_tls(), server_hostname="localhost"
                )
            )
            session = await sessions.get()
            _, writer = await client
            writer.write(b"early")
            await session.shaken
            assert session.came == b""
            session.transport.resume_reading()
            await session.until(lambda: session.came == b"early")
            writer.transport.abort()
            await session.lost

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_what_was_written_last_arrives_before_a_close_also_when_the_peer_has_sent_more() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        session.transport.pause_reading()
        writer.write(BIG[:100_000])
        session.transport.write(BIG)
        session.transport.close()
        session.transport.close()
        assert session.transport.is_closing()
        session.transport.write(b"too late")
        assert await reader.read(-1) == BIG
        assert await session.lost is None
        assert session.events == ["lost"], "nothing came after the close"
        assert not session.came

    with_peer(work)


def test_who_is_turned_away_after_the_handshake_hears_it_also_when_it_has_said_something() -> None:
    async def main() -> None:
        async with serving() as (port, sessions):
            wire = Wire(port)
            with wire.socket:
                loop = asyncio.get_running_loop()
                with pytest.raises(ssl.SSLWantReadError):
                    wire.tls.do_handshake()
                await wire.send(wire.outgoing.read())
                wire.incoming.write(await loop.sock_recv(wire.socket, 65536))
                wire.tls.do_handshake()
                early = wire.outgoing.read() + wire.record(b"EHLO x\r\n") + wire.record(BIG[:9000])
                await wire.send(early)
                session = await sessions.get()
                await session.shaken
                session.transport.write(b"421 too many\r\n")
                session.transport.close()
                await wire.send(wire.record(b"QUIT\r\n"))
                wire.incoming.write(await wire.rest_until_closed())
                assert wire.tls.read(100) == b"421 too many\r\n"
                assert await session.lost is None
                assert not session.came

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_a_peer_that_closes_is_at_its_end() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"the last")
        writer.close()
        assert await session.lost is None
        assert (bytes(session.came), session.events) == (b"the last", ["eof", "lost"])

    with_peer(work)


def test_an_abort_ends_it_at_once() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        peer(writer).pause_reading()
        session.transport.write(BIG)
        session.transport.abort()
        assert await session.lost is None
        assert not session.transport.can_write_eof()

    with_peer(work)


def test_a_protocol_that_fails_loses_its_connection() -> None:
    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)

        def fails(data: bytes) -> None:
            raise ValueError("no")

        session.data_received = fails  # type: ignore[method-assign]
        writer.write(b"x")
        assert isinstance(await session.lost, ValueError)

    with_peer(work)


# -- peers on the wire ---------------------------------------------------------------------------


class Wire:
    """A client whose every octet on the wire is in the hands of the test."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = (context or client_tls()).wrap_bio(
            self.incoming, self.outgoing, server_hostname="localhost"
        )
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)

    async def send(self, data: bytes, at_a_time: int = 1 << 20) -> None:
        for start in range(0, len(data), at_a_time):
            await asyncio.get_running_loop().sock_sendall(
                self.socket, data[start : start + at_a_time]
            )
            await asyncio.sleep(0)

    async def shake(self, at_a_time: int = 1 << 20) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.send(self.outgoing.read(), at_a_time)
                self.incoming.write(await loop.sock_recv(self.socket, 65536))
            else:
                await self.send(self.outgoing.read(), at_a_time)
                return

    def record(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.outgoing.read()

    async def rest_until_closed(self) -> bytes:
        """The same, of one that waits for us to close our side, too."""
        found = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        await self.send(self.outgoing.read())
        return found + await self.rest()

    async def rest(self) -> bytes:
        """What is sent until the end of the connection."""
        found = b""
        while data := await asyncio.get_running_loop().sock_recv(self.socket, 65536):
            found += data
        return found


def with_wire(work: Callable[[Wire, Session], Awaitable[None]], at_a_time: int = 1 << 20) -> None:
    async def main() -> None:
        async with serving() as (port, sessions):
            wire = Wire(port)
            with wire.socket:
                await wire.shake(at_a_time)
                session = await sessions.get()
                await session.shaken
                session.transport.resume_reading()
                await work(wire, session)
                session.transport.abort()
                await session.lost

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_every_octet_may_come_by_itself() -> None:
    async def work(wire: Wire, session: Session) -> None:
        await wire.send(wire.record(b"NOOP\r\n") + wire.record(b"QUIT\r\n"), at_a_time=1)
        await session.until(lambda: session.came == b"NOOP\r\nQUIT\r\n")

    with_wire(work, at_a_time=1)


def test_a_connection_that_ends_without_a_word_is_at_its_end() -> None:
    """Many close without a close_notify; what was whole is known from SMTP itself."""

    async def work(wire: Wire, session: Session) -> None:
        await wire.send(wire.record(b"whole") + wire.record(b"half")[:-1])
        wire.socket.shutdown(socket.SHUT_WR)
        assert await session.lost is None
        assert (bytes(session.came), session.events) == (b"whole", ["eof", "lost"])

    with_wire(work)


def test_octets_that_were_changed_on_the_way_end_the_connection() -> None:
    async def work(wire: Wire, session: Session) -> None:
        record = bytearray(wire.record(b"MAIL FROM:<a@example.net>\r\n"))
        record[-1] ^= 1
        await wire.send(wire.record(b"NOOP\r\n") + bytes(record) + wire.record(b"QUIT\r\n"))
        assert isinstance(await session.lost, ssl.SSLError)
        assert b"MAIL" not in session.came and b"QUIT" not in session.came

    with_wire(work)


def test_a_reset_is_told() -> None:
    async def work(wire: Wire, session: Session) -> None:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.socket.close()
        assert isinstance(await session.lost, ConnectionResetError)

    with_wire(work)


@pytest.mark.parametrize("reads", [True, False])
def test_a_peer_that_does_not_close_its_side_is_left(
    monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    monkeypatch.setattr(tls, "CLOSE", 0.1)

    async def work(wire: Wire, session: Session) -> None:
        session.transport.write(BIG if not reads else b"bye")
        session.transport.close()
        if reads:
            await wire.rest()
        await session.lost

    with_wire(work)


def test_a_peer_that_reads_slowly_what_was_said_last_gets_it_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tls, "CLOSE", 1.0)

    async def work(wire: Wire, session: Session) -> None:
        loop = asyncio.get_running_loop()
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        session.transport.write(BIG)
        session.transport.close()
        heard = 0
        while heard < len(BIG):
            wire.incoming.write(await loop.sock_recv(wire.socket, 200_000))
            with contextlib.suppress(ssl.SSLWantReadError):
                while piece := wire.tls.read(65536):
                    heard += len(piece)
            await asyncio.sleep(0.02)

    with_wire(work)


# -- handshakes ------------------------------------------------------------------------------------


async def refused(session: Session) -> Exception:
    with pytest.raises(OSError) as error:
        await session.shaken
    assert session.events == [], "the protocol has never had it"
    return error.value


def test_a_peer_hears_why_there_is_no_handshake() -> None:
    async def main() -> None:
        context = client_tls()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")  # for a key of another kind
        async with serving() as (port, sessions):
            wire = Wire(port, context)
            with wire.socket:
                with pytest.raises(ssl.SSLError, match=r"(?i)alert handshake failure"):
                    await wire.shake()
                assert isinstance(await refused(await sessions.get()), ssl.SSLError)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_what_is_no_tls_is_refused() -> None:
    async def main() -> None:
        async with serving() as (port, sessions):
            wire = Wire(port)
            with wire.socket:
                await wire.send(b"EHLO x\r\n" * 100)
                assert isinstance(await refused(await sessions.get()), ssl.SSLError)

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@pytest.mark.parametrize("octets", [0, 1, 100])
def test_a_handshake_has_a_time(octets: int) -> None:
    async def main() -> None:
        async with serving(0.1) as (port, sessions):
            wire = Wire(port)
            with pytest.raises(ssl.SSLWantReadError):
                wire.tls.do_handshake()
            await wire.send(wire.outgoing.read()[:octets])
            session = await sessions.get()
            assert isinstance(await refused(session), ConnectionAbortedError)
            assert await wire.rest() == b""
            wire.socket.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_a_peer_that_goes_within_its_handshake_is_noticed() -> None:
    async def main() -> None:
        async with serving() as (port, sessions):
            for octets in (0, 5, 200):
                wire = Wire(port)
                with pytest.raises(ssl.SSLWantReadError):
                    wire.tls.do_handshake()
                await wire.send(wire.outgoing.read()[:octets])
                wire.socket.close()
                await refused(await sessions.get())

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_while_many_shake_hands_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of the event loop does one handshake here; as many rounds as handshakes go by."""
    monkeypatch.setattr(tls, "ROUND", 0.0)
    number = 30

    async def main() -> None:
        loop = asyncio.get_running_loop()
        rounds: list[int] = []
        done = 0

        async def count() -> None:
            while done < number:
                rounds.append(done)
                await asyncio.sleep(0)

        async with serving() as (port, sessions):
            wires = [Wire(port) for _ in range(number)]
            for wire in wires:
                with pytest.raises(ssl.SSLWantReadError):
                    wire.tls.do_handshake()
                wire.socket.sendall(wire.outgoing.read())
            counting = loop.create_task(count())
            shaking = [asyncio.create_task(one.shake()) for one in wires]
            served = [await sessions.get() for _ in wires]
            for session in served:
                await session.shaken
                done += 1
            await asyncio.gather(*shaking)
            await counting
            assert len(rounds) >= number
            for wire, session in zip(wires, served, strict=True):
                wire.socket.close()
                session.transport.abort()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_an_idle_connection_keeps_little_memory_after_much_has_passed() -> None:
    """What OpenSSL was given at a time is what it keeps."""

    async def work(
        session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        largest = 0
        given = session.transport._incoming

        class Counting:
            pending = property(lambda self: given.pending)

            def write(self, data: bytes) -> int:
                nonlocal largest
                largest = max(largest, given.pending + len(data))
                return int(given.write(data))

        session.transport._incoming = Counting()
        writer.write(BIG)
        await session.until(lambda: len(session.came) == len(BIG))
        assert 0 < largest <= tls.PIECE

    with_peer(work)
