"""Live: a sender hears what the customer says, and what becomes of mail when it says nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any

import pytest
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.configuration import PASSWORD
from support.ends import PATIENCE, Ends, both_ends, message
from support.proxy import Direction
from support.salmon import Salmon, fails, waits_for

from salmon_revsmtp import Reply, hookimpl
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider import handover, intake, live

OTHER = {"name": "other", "password": PASSWORD, "domains": ["example.com"]}


def codes(heard: list[Reply]) -> list[int]:
    return [reply.code for reply in heard]


class Refuses:
    """A plugin that refuses recipients whose names say so."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()

    @hookimpl
    def recipient_requested(self, agent: Any, envelope: Any, recipient: str) -> Reply | None:
        name = recipient.partition("@")[0]
        self.asked.append(name)
        if name == "slow":
            self.go.wait(PATIENCE)
        return {
            "never": Reply(550, "no such mailbox", "5.1.1"),
            "later": Reply(450, "mailbox busy", "4.2.1"),
            "syntax": Reply(501, "what?", "5.5.4"),
        }.get(name)


@pytest.fixture
def refuses() -> Refuses:
    return Refuses()


@pytest.fixture
def plugins(refuses: Refuses) -> Plugins:
    plugins = Plugins.load()
    plugins.register(refuses, "refuses")
    return plugins


# -- what a sender hears ---------------------------------------------------------------------------


def test_a_sender_hears_the_answer_of_home_and_nothing_is_held(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        session = await ends.open()
        held = ends.provider.store.listing
        heard = await ends.send(message("one"))
        assert [str(reply) for reply in heard] == ["250 2.1.5 recipient ok", "250 2.0.0 delivered"]
        assert ends.handled == ["one"] and list(held()) == []
        [row] = await ends.log_lines()
        assert (row["live"], row["fell_back"], row["messages"]) == (1, 0, 1)
        assert ends.sessions == [session]

    both_ends(salmon, work)
    [line] = [one for one in caplog.messages if "2.0.0 delivered" in one and "service=mx" in one]
    assert line.endswith("reply='250 2.0.0 delivered' live")


def test_an_unknown_recipient_is_refused_by_home(
    salmon: Salmon, plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        heard = await ends.send(message("one"), "never", "b")
        assert str(heard[0]) == "550 5.1.1 no such mailbox"
        assert codes(heard) == [550, 250, 250]
        assert await ends.counts() == {"recipient": 1, "recipient refused": 1, "live": 1}
        assert codes(await ends.send(message("two"), "never")) == [550]
        assert ends.handled == ["one"] and ends.held == 0

    both_ends(salmon, work, plugins=plugins)
    assert salmon.relayed == [], "no one is notified"


def test_spam_is_refused_by_home(salmon: Salmon) -> None:
    salmon.handle("b@.*", fails(554, "5.7.1 we do not like it"))

    async def work(ends: Ends) -> None:
        await ends.open()
        [_, reply] = await ends.send(message("spam"))
        assert str(reply) == "554 5.7.1 we do not like it"
        assert ends.held == 0

    both_ends(salmon, work)
    assert salmon.relayed == []


def test_what_home_cannot_say_now_is_held_and_pushed(
    salmon: Salmon, plugins: Plugins, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    times = 0

    def later(message: MailRequest) -> None:
        nonlocal times
        times += 1
        if times == 1:
            raise SMTPError(451, "4.3.0 later")

    salmon.handle(".*", later)

    async def work(ends: Ends) -> None:
        await ends.open()
        heard = await ends.send(message("one"))
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        await ends.until(lambda: times >= 2 and ends.held == 0)
        [row] = await ends.log_lines()
        assert (row["live"], row["fell_back"]) == (0, 1)

    both_ends(salmon, work, plugins=plugins)
    assert any("held: the customer says 451 4.3.0 later" in one for one in caplog.messages)


def test_a_recipient_that_home_defers_is_accepted(salmon: Salmon, plugins: Plugins) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        heard = await ends.send(message("one"), "later")
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        assert ends.held == 1

    both_ends(salmon, work, plugins=plugins)
    assert salmon.relayed == []


def test_a_5yz_of_the_protocol_is_not_the_senders(salmon: Salmon, plugins: Plugins) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        assert codes(await ends.send(message("one"), "syntax")) == [250, 250]

    both_ends(salmon, work, plugins=plugins)


def test_what_home_cannot_be_sent_is_held(salmon: Salmon) -> None:
    """Our own sender refuses it; home has said nothing."""
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        heard = await ends.send(b"Subject: x\r\n\r\n\0.\r\nx\r\n")
        assert codes(heard) == [250, 250] and "held as" in heard[1].text

    both_ends(salmon, work)


def test_with_live_switched_off_mail_is_held_and_pushed(salmon: Salmon, plugins: Plugins) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.until(lambda: any(one.push for one in ends.sessions))
        heard = await ends.send(message("one"), "b")
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        await ends.until(lambda: ends.handled == ["one"] and ends.held == 0)

    both_ends(salmon, work, account={"live": False}, plugins=plugins)


def test_while_home_is_away_mail_is_held(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        heard = await ends.send(message("one"))
        assert codes(heard) == [250, 250] and "held as" in heard[1].text

    both_ends(salmon, work, agent={"enabled": False})


# -- several recipients ----------------------------------------------------------------------------


def by_name(message: MailRequest) -> None:
    """Handlers that answer as their recipients' names say."""
    name = str(message.To).partition("@")[0]
    if name.startswith("no"):
        raise SMTPError(550, "5.7.1 not this")
    if name.startswith("later"):
        raise SMTPError(451, "4.3.0 later")


def test_with_prdr_each_recipient_has_homes_answer(salmon: Salmon) -> None:
    salmon.handle(".*", by_name)

    async def work(ends: Ends) -> None:
        await ends.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", ends.way_in.port)
        data = message("one")
        writer.write(
            b"EHLO x\r\nMAIL FROM:<a@example.net> PRDR\r\nRCPT TO:<yes@example.org>\r\n"
            b"RCPT TO:<no@example.org>\r\nRCPT TO:<later@example.org>\r\nBDAT %d LAST\r\n%s"
            b"QUIT\r\n" % (len(data), data)
        )
        heard = (await asyncio.wait_for(reader.read(), PATIENCE)).decode().splitlines()
        assert [int(line[:3]) for line in heard[-7:]] == [250, 353, 250, 550, 250, 250, 221]
        assert heard[-4] == "550 5.7.1 not this" and "held as" in heard[-3]
        writer.close()

    both_ends(salmon, work)
    assert salmon.relayed == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("yes1", "yes2"), "250 2.0.0 delivered"),
        (("no1", "no2"), "550 5.7.1 not this"),
        (("yes1", "no1"), "held as"),  # its refusal becomes a notification
        (("later1", "no1"), "held as"),
    ],
)
def test_without_prdr_there_is_one_answer(
    salmon: Salmon, names: tuple[str, ...], expected: str
) -> None:
    salmon.handle(".*", by_name)

    async def work(ends: Ends) -> None:
        await ends.open()
        reply = (await ends.send(message("one"), *names))[-1]
        assert expected in str(reply)
        if "held as" in expected:
            await ends.until(lambda: salmon.relayed)

    both_ends(salmon, work)
    told = [to for _, to, _ in salmon.relayed]
    assert told == (["a@example.net"] if "held as" in expected else [])
    served = [one for one in salmon.handled if str(one.To).startswith("yes")]
    assert len(served) == sum(name.startswith("yes") for name in names)


def test_recipients_of_several_accounts_are_checked_and_held(
    salmon: Salmon, plugins: Plugins
) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        heard = await ends.send(message("one"), "never", "b", "x@example.com")
        assert codes(heard) == [550, 250, 250, 250] and "held as" in heard[-1].text
        await ends.until(lambda: ends.handled == ["one"])
        listing = ends.provider.store.listing
        await ends.until(lambda: [one.account for one in listing()] == ["other"])

    both_ends(salmon, work, plugins=plugins, accounts=[OTHER])


# -- time ------------------------------------------------------------------------------------------


def test_a_recipient_that_takes_too_long_is_accepted_and_held(
    salmon: Salmon, plugins: Plugins, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "RECIPIENT_IN", 2.0)
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        session = await ends.open()
        heard = await ends.send(message("one"), "slow")
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        # As long as it has not answered, others do not wait for it.
        asked = len(refuses.asked)
        heard = await ends.send(message("two"), "b")
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        assert len(refuses.asked) == asked
        refuses.go.set()
        await ends.until(lambda: sorted(ends.handled) == ["one", "two"] and ends.held == 0)
        await ends.open()
        assert str((await ends.send(message("three")))[-1]) == "250 2.0.0 delivered"
        assert ends.sessions == [session]

    try:
        both_ends(salmon, work, plugins=plugins)
    finally:
        refuses.go.set()


def test_a_message_that_takes_too_long_is_held_and_handled_once(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MESSAGE_IN", 2.0)
    go = threading.Event()
    salmon.handle("slow@.*", waits_for(go))
    salmon.handle("b@.*")

    async def work(ends: Ends) -> None:
        await ends.open()
        heard = await ends.send(message("one"), "slow")
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        go.set()
        await ends.until(lambda: ends.held == 0)
        assert ends.handled == ["one"]
        await ends.open()
        assert str((await ends.send(message("two")))[-1]) == "250 2.0.0 delivered"

    both_ends(salmon, work)


def test_a_sender_that_takes_its_time_is_in_no_ones_way(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", ends.way_in.port)
        writer.write(
            b"EHLO x\r\nMAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nDATA\r\nSubject: 1"
        )
        while not (await asyncio.wait_for(reader.readline(), PATIENCE)).startswith(b"354"):
            pass
        for number in range(2, 5):
            assert str((await ends.send(message(f"{number}")))[-1]) == "250 2.0.0 delivered"
        writer.write(b"\r\n\r\nx\r\n.\r\n")
        assert await asyncio.wait_for(reader.readline(), PATIENCE) == b"250 2.0.0 delivered\r\n"
        writer.close()
        assert ends.handled == ["2", "3", "4", "1"]

    both_ends(salmon, work)


def test_many_senders_at_a_time(salmon: Salmon, plugins: Plugins) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        session = await ends.open()
        sending = [
            ends.send(message(f"{number}"), "never", *["b"] * (number % 2)) for number in range(300)
        ]
        for number, heard in enumerate(await asyncio.gather(*sending)):
            assert codes(heard) == ([550, 250, 250] if number % 2 else [550])
        assert sorted(map(int, ends.handled)) == list(range(1, 300, 2))
        assert ends.sessions == [session], "questions do not wear a session out"

    both_ends(salmon, work, plugins=plugins, mx={"max_connections": 1000})


# -- a session that ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["broken", "replaced", "stopped", "silent"])
def test_whatever_ends_a_session_the_message_is_safe_and_handled_once(
    salmon: Salmon, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MESSAGE_IN", 3.0)
    go, begun = threading.Event(), threading.Event()

    def slow(message: MailRequest) -> None:
        begun.set()
        go.wait(PATIENCE)

    salmon.handle(".*", slow)

    async def work(ends: Ends) -> None:
        session = await ends.open()
        sending = asyncio.ensure_future(ends.send(message("one")))
        await asyncio.to_thread(begun.wait, PATIENCE)
        if end == "broken":
            session.abort("the test breaks it")
        elif end == "replaced":
            session.replace()
        elif end == "silent":
            ends.proxy.stall(Direction.TO_PROVIDER)
        else:
            ends.provider.daemon.stop()
        heard = await sending
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        go.set()
        if end != "stopped":
            await ends.until(lambda: ends.held == 0)

    both_ends(salmon, work, provider={"keepalive": 1})
    assert [str(one["Subject"]) for one in salmon.handled] == ["one"]


@pytest.mark.parametrize("live_too", [True, False])
def test_a_sender_that_comes_again_is_answered_as_before(salmon: Salmon, live_too: bool) -> None:
    """It heard nothing the first time, because its connection broke."""
    salmon.handle(".*")
    last = b"2.0.0 delivered" if live_too else b"held as"

    async def work(ends: Ends) -> None:
        await ends.open()
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", ends.way_in.port)
            data = message("one")
            writer.write(
                b"EHLO x\r\nMAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\n"
                b"BDAT %d LAST\r\n%s" % (len(data), data)
            )
            heard = b""
            while last not in heard:
                heard += await asyncio.wait_for(reader.read(1000), PATIENCE)
            writer.transport.abort()
            await ends.way_in.quiet()
        await ends.until(lambda: ends.held == 0)
        assert ends.handled == ["one"]

    both_ends(salmon, work, account={"live": live_too})


@pytest.mark.parametrize("end", ["reset", "closed"])
def test_a_sender_that_comes_again_while_the_first_is_under_way(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Its connection broke while home was at work: that is no second message."""
    monkeypatch.setattr(live, "RECIPIENT_IN", 0.2)
    go, begun = threading.Event(), threading.Event()

    def slow(message: MailRequest) -> None:
        begun.set()
        go.wait(PATIENCE)

    salmon.handle(".*", slow)

    async def work(ends: Ends) -> None:
        await ends.open()
        data = message("one")
        _, writer = await asyncio.open_connection("127.0.0.1", ends.provider.mx)
        writer.write(
            b"EHLO x\r\nMAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\n"
            b"BDAT %d LAST\r\n%s" % (len(data), data)
        )
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        if end == "reset":
            writer.transport.abort()
        else:
            writer.close()
        assert "held as" in str((await ends.send(data))[-1])
        go.set()
        await ends.until(lambda: ends.held == 0)
        assert ends.handled == ["one"]

    both_ends(salmon, work)


def test_with_prdr_a_sender_comes_again_for_those_of_whom_it_heard_nothing(salmon: Salmon) -> None:
    """Exim does, whose connection breaks after a 550 and before the last reply."""
    salmon.handle(".*", by_name)

    async def work(ends: Ends) -> None:
        await ends.open()
        data = message("one")
        for names, last in ((("yes", "no"), b"550 5.7.1 not this"), (("yes",), b"250 2.0.0")):
            reader, writer = await asyncio.open_connection("127.0.0.1", ends.way_in.port)
            writer.write(b"EHLO x\r\nMAIL FROM:<a@example.net> PRDR\r\n")
            writer.writelines(b"RCPT TO:<%s@example.org>\r\n" % one.encode() for one in names)
            writer.write(b"BDAT %d LAST\r\n%s" % (len(data), data))
            line = b""
            while not line.startswith(last):
                line = await asyncio.wait_for(reader.readline(), PATIENCE)
                assert line
            writer.transport.abort()
            await ends.way_in.quiet()
        handled = [str(one.To).partition("@")[0] for one in ends.salmon.handled]
        assert sorted(handled) == ["no", "yes"] and ends.held == 0

    both_ends(salmon, work)
    assert salmon.relayed == []


@pytest.mark.parametrize("live_too", [True, False])
def test_the_same_octets_twice_are_two_messages_where_the_first_was_heard(
    salmon: Salmon, live_too: bool
) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.until(lambda: any(one.push for one in ends.sessions))
        for _ in range(3):
            assert codes(await ends.send(message("one"))) == [250, 250]
        await ends.until(lambda: len(ends.handled) == 3 and ends.held == 0)
        sending = [ends.send(message("one")) for _ in range(5)]
        assert {reply.code for heard in await asyncio.gather(*sending) for reply in heard} == {250}
        await ends.until(lambda: len(ends.handled) == 8 and ends.held == 0)

    both_ends(salmon, work, account={"live": live_too})


def test_what_was_refused_and_comes_again_is_judged_again(salmon: Salmon) -> None:
    times = 0

    def judge(message: MailRequest) -> None:
        nonlocal times
        times += 1
        if times == 1:
            raise SMTPError(554, "5.7.1 not this")

    salmon.handle(".*", judge)

    async def work(ends: Ends) -> None:
        await ends.open()
        assert [codes(await ends.send(message("one"))) for _ in range(3)] == [
            [250, 554],
            [250, 250],
            [250, 250],
        ]
        assert times == 3

    both_ends(salmon, work)


async def send_and_leave(port: int, data: bytes, source: str) -> None:
    """Send a message, and break the connection when its answer is there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    writer.write(
        b"EHLO x\r\nMAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\n"
        b"BDAT %d LAST\r\n%s" % (len(data), data)
    )
    heard = b""
    while not heard.endswith((b"delivered\r\n", b"not this\r\n")):
        heard += await asyncio.wait_for(reader.read(1000), PATIENCE)
    writer.transport.abort()


@pytest.mark.parametrize("refused", [False, True])
def test_a_stranger_cannot_have_a_message_taken_for_his(salmon: Salmon, refused: bool) -> None:
    """He knows its octets, and sends them first, from elsewhere."""

    def judge(message: MailRequest) -> None:
        if refused and str(message.Peer[0]) == "127.0.1.1":
            raise SMTPError(554, "5.7.1 not this")

    salmon.handle(".*", judge)

    async def work(ends: Ends) -> None:
        await ends.open()
        await send_and_leave(ends.provider.mx, message("one"), "127.0.1.1")
        assert str((await ends.send(message("one")))[-1]) == "250 2.0.0 delivered"
        assert ends.handled == ["one", "one"]

    both_ends(salmon, work)


@pytest.mark.parametrize("octets", [400_000, 2_000_000])
def test_a_large_message_that_is_no_smtp_goes_live_only_if_it_is_small(
    salmon: Salmon, octets: int
) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        data = message("bare", octets) + b"a bare\nline end\r\n"
        reply = (await ends.send(data))[-1]
        assert reply.code == 250
        assert ("held as" in reply.text) == (octets > 1_000_000)
        await ends.until(lambda: ends.handled == ["bare"] and ends.held == 0)

    both_ends(salmon, work)


def test_beyond_some_questions_recipients_are_accepted_at_once(
    salmon: Salmon, plugins: Plugins, refuses: Refuses
) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", ends.way_in.port)
        # The first waits for its answer; those that find room behind it wait for the first.
        names = ["slow", *(f"b{number}" for number in range(899))]
        writer.write(b"EHLO x\r\nMAIL FROM:<a@example.net>\r\n")
        writer.write(b"".join(f"RCPT TO:<{name}@example.org>\r\n".encode() for name in names))
        [session] = ends.sessions
        live_session = session.live
        assert live_session is not None
        await ends.until(lambda: len(live_session._under_way) == handover.MOST_WAITING)
        heard = await ends.send(message("one"))
        assert codes(heard) == [250, 250] and "held as" in heard[1].text
        refuses.go.set()
        for _ in range(1 + 10 + len(names)):
            assert (await asyncio.wait_for(reader.readline(), PATIENCE))[:3] in (b"220", b"250")
        writer.close()

    try:
        both_ends(salmon, work, plugins=plugins)
    finally:
        refuses.go.set()


# -- the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize("octets", [300_000, 3_000_000])
def test_a_large_message_goes_through_and_leaves_no_file(salmon: Salmon, octets: int) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        data = message("large", octets)
        assert str((await ends.send(data))[-1]) == "250 2.0.0 delivered"
        [handled] = ends.salmon.handled
        assert isinstance(handled.Data, bytes)
        assert handled.Data.endswith(data.replace(b"\r\n", b"\n").rstrip(b"\n"))
        folder = ends.salmon.folder / "run/hold"
        await ends.until(lambda: not [*folder.glob("tmp/*"), *folder.glob("bodies/*")])

    both_ends(salmon, work)


def test_a_session_that_breaks_while_a_large_message_is_made_ready(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No one waits for an answer that cannot come."""
    monkeypatch.setattr(live, "MESSAGE_IN", 10.0 * PATIENCE)
    salmon.handle(".*")
    make_ready = intake._content

    async def work(ends: Ends) -> None:
        session = await ends.open()
        loop = asyncio.get_running_loop()

        def slowly(arrival: Any) -> Any:
            loop.call_soon_threadsafe(session.abort, "the test breaks it")
            asyncio.run_coroutine_threadsafe(gone(), loop).result(PATIENCE)
            return make_ready(arrival)

        async def gone() -> None:
            await ends.until(lambda: session not in ends.sessions)

        monkeypatch.setattr(intake, "_content", slowly)
        sending = ends.send(message("large", 600_000))
        assert (await asyncio.wait_for(sending, PATIENCE))[-1].code == 250
        monkeypatch.undo()
        await ends.until(lambda: ends.handled == ["large"] and ends.held == 0)

    both_ends(salmon, work)


def test_what_the_disk_has_lost_of_a_message_does_not_go_through(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home keeps nothing of it; here it is the file that is synced which counts."""
    salmon.handle(".*")
    read = os.pread

    async def work(ends: Ends) -> None:
        session = await ends.open()
        data = message("large", 600_000)
        monkeypatch.setattr(os, "pread", lambda *which: bytes(len(read(*which))))
        assert "held as" in (await ends.send(data))[-1].text
        await ends.until(lambda: session not in ends.sessions)
        await ends.until(lambda: ends.handled == ["large"] and ends.held == 0)
        assert ends.salmon.handled[0].Data.endswith(data.replace(b"\r\n", b"\n").rstrip(b"\n"))

    both_ends(salmon, work)


def test_a_large_message_that_home_defers_is_held(salmon: Salmon) -> None:
    times: list[int] = []

    def later(message: MailRequest) -> None:
        times.append(len(message.Data or ""))
        if len(times) == 1:
            raise SMTPError(451, "later")

    salmon.handle(".*", later)

    async def work(ends: Ends) -> None:
        await ends.open()
        assert "held as" in (await ends.send(message("large", 500_000)))[-1].text
        await ends.until(lambda: len(times) == 2 and ends.held == 0)
        assert times[0] == times[1]

    both_ends(salmon, work)


def test_homes_filters_see_the_sender(salmon: Salmon) -> None:
    seen: list[Any] = []

    class Filter:
        @hookimpl
        def message_received(self, agent: Any, envelope: Any, message: bytes) -> None:
            seen.append((envelope.client, envelope.helo))

    plugins = Plugins.load()
    plugins.register(Filter())
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        await ends.send(message("one"))
        [(client, helo)] = seen
        assert (client.address, helo) == ("127.0.0.1", "sender.example.net")
        assert ends.salmon.handled[0].Peer == (client.address, client.port)

    both_ends(salmon, work, plugins=plugins)


def test_plugins_hear_of_what_was_passed_on(salmon: Salmon) -> None:
    told: list[Any] = []

    class Hears:
        @hookimpl
        def message_handed_over(
            self, account: str, envelope: Any, recipient: str, reply: Reply
        ) -> None:
            told.append((account, recipient, reply.code))

        @hookimpl
        def message_held(self, account: str, envelope: Any, key: int) -> None:
            told.append((account, envelope.recipients))

    plugins = Plugins.load()
    plugins.register(Hears())
    salmon.handle(".*", by_name)

    async def work(ends: Ends) -> None:
        await ends.open()
        await ends.send(message("one"), "yes")
        await ends.send(message("two"), "no")
        assert told == [("acme", "yes@example.org", 250), ("acme", "no@example.org", 550)]
        del told[:]
        await ends.send(message("three"), "later")
        # One that waits is handed over at once, and so perhaps before plugins hear that it is held.
        assert ("acme", ("later@example.org",)) in told

    both_ends(salmon, work, at_provider=plugins)
