"""How long a client may take, on a loop whose clock the test turns: nothing here waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.holding import NoHooks, account

from salmon_revsmtp.delivery.dispatcher import PendingDelivery
from salmon_revsmtp.delivery.trace import Origin
from salmon_revsmtp.journal.deliveries import MessageKey
from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.provider.accounts import Accounts
from salmon_revsmtp.provider.connection import LOGIN_PATIENCE, Connection
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.recipients import Recipients
from salmon_revsmtp.service.session import Session, Tally
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Sender

TIMEOUT = 300.0
OK = Reply(250, "ok")
ACME = account(password="secret")


class Loop(asyncio.SelectorEventLoop):
    """Its time is what the test says."""

    now = 0.0

    def time(self) -> float:
        return self.now


class Wire(asyncio.Transport):
    """The client's end of a session."""

    unread = 0  # octets of what we said
    reading = True
    sinks = None

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop, self.heard, self.closed_at = loop, b"", -1.0
        self.handed_over: list[Callable[[], None]] = []
        self.answered = 0
        self.slow = False
        self.session = self.connect()
        self.session.connection_made(self)

    def connect(self) -> Driver:
        service = Service("x", ServiceSettings(hostname="h", domains=("example.org",)))
        dispatcher: Any = self
        origin = Origin(service.name, service.hostname)
        return Session(
            service, Recipients(service.recipient_policy(())), dispatcher, origin, Tally(), TIMEOUT
        )

    def deliver(self, pending: PendingDelivery, answered: Callable[[], None]) -> None:
        """As the dispatcher has it."""
        pending.since = self.loop.now
        pending.replies, pending.delivered = [OK], 1
        pending.key = MessageKey("x", "", b"")
        pending.reply = OK
        self.handed_over.append(answered)
        if not self.slow:
            self.answer(1)

    def answer(self, messages: int) -> None:
        """Some of those that have been handed over are delivered."""
        for answered in self.handed_over[self.answered : self.answered + messages]:
            self.answered += 1
            self.loop.call_soon(answered)

    async def say(self, data: bytes) -> None:
        self.session.data_received(data)
        await self.let_run()

    async def let_run(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def later(self, seconds: float) -> bool:
        """Turn the clock on; whether the client is still there."""
        self.loop.now += seconds
        await self.let_run()
        return self.closed_at < 0

    # -- what a session wants of a transport ------------------------------------------------

    def write(self, data: Any) -> None:
        self.heard += data
        if self.unread:
            self.unread += len(data)

    def abort(self) -> None:
        if self.closed_at < 0:
            self.closed_at = self.loop.now
            self.loop.call_soon(self.session.connection_lost, None)

    close = abort

    def is_closing(self) -> bool:
        return self.closed_at >= 0

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


class NoStore:
    """Nothing is held."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class ProviderWire(Wire):
    """The customer's end of a connection to the provider."""

    patience: float | None = None

    def connect(self) -> Driver:
        accounts = Accounts([ACME])
        provider = Provider(
            accounts, NoStore(), lambda *told: None, NoHooks(), "h", timeout=TIMEOUT
        )
        connection = Connection(provider, lambda driver: None, implicit_tls=False)
        connection._patience = self.patience
        return connection


class Client(Driver):
    """A connection in the client role."""

    def __init__(self) -> None:
        super().__init__(Sender("h"), TIMEOUT)

    def handle(self, event: object) -> None:
        pass


class ServerWire(Wire):
    """The server's end of a connection in the client role."""

    def connect(self) -> Driver:
        return Client()


def on_the_wire(talk: Callable[[Wire], Awaitable[None]], kind: type[Wire] = Wire) -> Wire:
    """Have ``talk`` speak to a session; returns its wire when the session is over."""
    loop = Loop()

    async def main() -> Wire:
        wire = kind(loop)
        await talk(wire)
        wire.session.abort("the test is over")
        await wire.session.ended
        return wire

    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


class HastyWire(ProviderWire):
    patience = LOGIN_PATIENCE


def test_a_customer_that_never_comes_to_the_point_is_sent_away() -> None:
    async def talk(wire: Wire) -> None:
        await wire.say(b"EHLO p\r\n")
        while await wire.later(10):
            await wire.say(b"NOOP\r\n")

    wire = on_the_wire(talk, HastyWire)
    assert LOGIN_PATIENCE <= wire.closed_at <= LOGIN_PATIENCE + 10
    assert wire.heard.splitlines()[-1].startswith(b"421 4.4.2 ")


BEGIN = b"EHLO p\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\n"


def test_octets_of_a_command_do_not_wind_the_clock_up() -> None:
    """RFC 5321 4.5.3.2: the timeout is for a whole command."""

    async def talk(wire: Wire) -> None:
        await wire.say(b"EHLO p\r\n")
        for octet in range(299):
            assert await wire.later(1), octet
            await wire.say(b"x")
        assert not await wire.later(1)

    wire = on_the_wire(talk)
    assert wire.closed_at == TIMEOUT
    assert wire.session.broken == "the provider sent no whole command in 300 seconds"


def test_a_command_that_becomes_whole_winds_the_clock_up() -> None:
    async def talk(wire: Wire) -> None:
        for _ in range(6):
            await wire.say(b"NO")
            assert await wire.later(299)
            await wire.say(b"OP\r\n")

    assert on_the_wire(talk).closed_at == 6 * 299


def test_a_line_that_is_too_long_and_never_ends() -> None:
    async def talk(wire: Wire) -> None:
        for _ in range(299):
            await wire.say(b"x" * 100_000)
            assert await wire.later(1)
        assert not await wire.later(1)

    assert on_the_wire(talk).closed_at == TIMEOUT


def test_content_may_come_slowly() -> None:
    """A tenth of what a 9,600 baud line brings, in pieces with long pauses between them."""

    async def talk(wire: Wire) -> None:
        await wire.say(BEGIN + b"DATA\r\n")
        for _ in range(100):
            assert await wire.later(299)
            await wire.say(b"x" * 29_998 + b"\r\n")
        assert await wire.later(299)
        await wire.say(b"\r\n.\r\n")
        assert wire.heard.endswith(b"250 2.0.0 ok\r\n")

    on_the_wire(talk)


def test_content_an_octet_at_a_time_is_no_progress() -> None:
    for begin in (b"DATA\r\n", b"BDAT 1000000 LAST\r\n"):

        async def talk(wire: Wire, begin: bytes = begin) -> None:
            await wire.say(BEGIN + begin)
            for _ in range(299):
                assert await wire.later(1)
                await wire.say(b"x")
            assert not await wire.later(1)

        wire = on_the_wire(talk)
        assert wire.closed_at == TIMEOUT
        assert wire.session.broken == (
            "the provider sent no more than 299 octets of a message in 300 seconds"
        )


def test_each_small_chunk_that_becomes_whole_is_progress() -> None:
    async def talk(wire: Wire) -> None:
        await wire.say(BEGIN)
        for _ in range(3):
            await wire.say(b"BDAT 2\r\nx")
            assert await wire.later(299)
            await wire.say(b"\n")
            assert await wire.later(299)

    on_the_wire(talk)


@pytest.mark.parametrize(
    ("begin", "again"),
    [
        (BEGIN, b"BDAT 1\r\nx"),
        (b"EHLO p\r\n", b"NOOP\r\n"),
        (b"EHLO p\r\nMAIL FROM:<>\r\n", b"RCPT TO:<b@example.org>\r\n"),
        (b"EHLO p\r\nMAIL FROM:<>\r\n", b"RCPT TO:<b@elsewhere.example>\r\n"),
        (b"EHLO p\r\n", b"MAIL FROM:<>\r\nRSET\r\n"),
    ],
)
def test_what_brings_no_message_to_its_end_is_ended_after_half_an_hour(
    begin: bytes, again: bytes
) -> None:
    async def talk(wire: Wire) -> None:
        await wire.say(begin)
        while await wire.later(200):
            await wire.say(again)

    wire = on_the_wire(talk)
    assert 1800 <= wire.closed_at <= 2000
    assert wire.heard.splitlines()[-1].startswith(b"421 4.4.2 no message came to its end in ")


def test_a_message_now_and_then_keeps_the_session() -> None:
    async def talk(wire: Wire) -> None:
        await wire.say(b"EHLO p\r\n")
        for _ in range(20):
            for _ in range(5):
                assert await wire.later(299)
                await wire.say(b"NOOP\r\n")
            await wire.say(BEGIN.partition(b"\r\n")[2] + b"BDAT 1 LAST\r\nx")
        assert wire.heard.count(b"250 2.0.0 ok\r\n") >= 20

    on_the_wire(talk)


def test_the_clock_stands_still_while_we_deliver_and_begins_anew_after_it() -> None:
    async def talk(wire: Wire) -> None:
        wire.slow = True
        await wire.say(BEGIN + b"BDAT 1 LAST\r\nx")
        assert await wire.later(3600)
        wire.slow = False
        wire.answer(1)
        await wire.let_run()
        assert await wire.later(299)
        assert not await wire.later(1)

    wire = on_the_wire(talk)
    assert wire.closed_at == 3600 + TIMEOUT
    assert wire.session.broken == "the provider said nothing in 300 seconds"


def test_octets_that_come_while_we_deliver_do_not_stop_the_clock_behind_it() -> None:
    async def talk(wire: Wire) -> None:
        wire.slow = True
        await wire.say(BEGIN + b"BDAT 1 LAST\r\nxMAI")
        wire.slow = False
        wire.answer(1)
        await wire.let_run()
        for _ in range(299):
            assert await wire.later(1)
            await wire.say(b"x")
        assert not await wire.later(1)

    on_the_wire(talk)


TRANSACTION = b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 3 LAST\r\nx\r\n"


def test_messages_wait_with_the_client_while_handlers_are_slow() -> None:
    """Read ahead, they would be deferred when ``handler_timeout`` has gone by."""

    async def talk(wire: Wire) -> None:
        wire.slow = True
        await wire.say(b"EHLO p\r\n" + 100 * TRANSACTION)
        for answered in range(100):
            assert len(wire.handed_over) == min(answered + 16, 100)
            assert await wire.later(1.2)
            wire.answer(1)
            await wire.let_run()

    on_the_wire(talk)


def test_as_much_is_read_ahead_as_is_delivered_in_a_second() -> None:
    async def talk(wire: Wire) -> None:
        wire.slow = True
        await wire.say(b"EHLO p\r\n" + 16 * TRANSACTION)
        assert await wire.later(0.4)
        wire.answer(16)
        await wire.let_run()
        await wire.say(100 * TRANSACTION)
        assert len(wire.handed_over) == 16 + 40
        wire.slow = False
        wire.answer(40)
        await wire.let_run()

    on_the_wire(talk)


def test_a_half_close_in_the_turn_of_the_answer_does_not_cost_it() -> None:
    async def talk(wire: Wire) -> None:
        wire.slow = True
        await wire.say(BEGIN + b"BDAT 1 LAST\r\nx")
        wire.answer(1)
        kept: list[bool] = []
        wire.loop.call_soon(lambda: kept.append(wire.session.eof_received()))
        await wire.let_run()
        assert kept == [True], "the connection is kept open for it"
        assert wire.heard.endswith(b"250 2.0.0 ok\r\n")

    on_the_wire(talk)


# -- what holds for every connection ---------------------------------------------------------------


@pytest.fixture(params=[Wire, ProviderWire], ids=["a service", "the provider"])
def kind(request: pytest.FixtureRequest) -> type[Wire]:
    chosen: type[Wire] = request.param
    return chosen


def test_an_octet_now_and_then_keeps_no_connection(kind: type[Wire]) -> None:
    async def talk(wire: Wire) -> None:
        for octet in range(299):
            assert await wire.later(1), octet
            await wire.say(b"x")
        assert not await wire.later(1)

    assert on_the_wire(talk, kind).closed_at == TIMEOUT


def test_commands_that_are_unproductive_keep_no_connection(kind: type[Wire]) -> None:
    async def talk(wire: Wire) -> None:
        for number in range(200):
            await wire.say(b"NOOP\r\n")
            if not await wire.later(10):
                assert number == 100
                return
        raise AssertionError("it may go on for ever")

    assert b"421 4.7.0 too many unproductive commands" in on_the_wire(talk, kind).heard


def test_a_peer_that_reads_slowly_but_steadily_is_not_cut_off(kind: type[Wire]) -> None:
    async def talk(wire: Wire) -> None:
        wire.session.pause_writing()
        for _ in range(100):
            wire.unread -= 100 * 300
            assert await wire.later(299)
        assert await wire.later(2)
        assert not await wire.later(300), "it reads no more"

    much: type[Wire] = type("Much", (kind,), {"unread": 100_000_000})
    broken = on_the_wire(talk, much).session.broken
    assert broken is not None and broken.endswith("read too little of what we sent in 300 seconds")


def test_while_our_replies_are_not_read_nothing_is_read(kind: type[Wire]) -> None:
    """What a peer can make us say is bounded by what it reads."""

    async def talk(wire: Wire) -> None:
        wire.session.pause_writing()
        await wire.say(b"EHLO x\r\n")
        assert not wire.reading
        wire.session.resume_writing()
        assert wire.reading

    on_the_wire(talk, kind)


def test_a_client_reads_replies_while_it_writes() -> None:
    """RFC 2920 3.1: otherwise it waits for ever for a server that does the same, and what has been
    answered is sent again."""

    async def talk(wire: Wire) -> None:
        await wire.say(b"220 server\r\n")
        wire.session.pause_writing()
        await wire.say(b"250 server\r\n")
        assert wire.reading

    on_the_wire(talk, ServerWire)


def test_a_half_closed_peer_hears_everything_however_slowly_it_reads(kind: type[Wire]) -> None:
    async def talk(wire: Wire) -> None:
        wire.session.pause_writing()
        await wire.say(b"EHLO x\r\nNOOP\r\n")
        assert wire.session.eof_received()
        await wire.let_run()
        assert wire.closed_at < 0
        wire.session.resume_writing()
        assert wire.closed_at == 0

    assert on_the_wire(talk, kind).heard.endswith(b"250 2.0.0 ok\r\n")


def test_what_comes_after_the_end_of_a_connection_is_not_handled() -> None:
    """Exim's messages that are encrypted twice end it."""

    async def talk(wire: Wire) -> None:
        wire.session.tls = True
        await wire.say(BEGIN + b"BDAT 2 LAST\r\n\x17\x03" + BEGIN + b"BDAT 1 LAST\r\nxQUIT\r\n")
        assert wire.handed_over == []

    wire = on_the_wire(talk)
    assert wire.session.broken is not None and "encrypted twice" in wire.session.broken
