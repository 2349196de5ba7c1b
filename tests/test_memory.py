"""Memory that the sessions of a service share: who hears 452 when there is no more, and that all of
it is given back."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from typing import Any

import pytest
from support.client import Client
from support.dialogue import Dialogue
from support.listener import listener
from support.salmon import Salmon, waits_for

from salmon_revsmtp.net import places
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.service import session
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.smtp.budget import Budget
from salmon_revsmtp.smtp.limits import KIB, MIB, Limits

LINE = b"x" * 998 + b"\r\n"


def client(memory: Budget, limits: Limits | None = None) -> Client:
    one = Client(limits)
    one.receiver.memory = memory
    return one


@pytest.mark.parametrize("commands", [b"DATA\r\n", b"BDAT 40000\r\n", b"BDAT 40000 LAST\r\n"])
@pytest.mark.parametrize("size", [1, 997, 40_000])
def test_a_message_for_which_there_is_no_memory_is_deferred(commands: bytes, size: int) -> None:
    memory = Budget(20_000)
    one = client(memory)
    one.begin()
    stream = commands + LINE * 40 + (b".\r\n" if commands == b"DATA\r\n" else b"")
    heard = [one.say(stream[start : start + size]) for start in range(0, len(stream), size)]
    assert " ".join(filter(None, heard)).split()[-1] == "452"
    assert len(one.receiver._content) <= 20_000
    one.say(b"RSET\r\n")
    assert memory.held == 0
    assert one.messages == []
    assert one.say(b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 4 LAST\r\nx\r\ny") == (
        "250 250 250"
    )
    assert memory.held == 0


def test_a_chunk_after_one_that_found_no_memory_makes_no_message() -> None:
    memory = Budget(20_000)
    other = client(memory)
    other.begin()
    other.say(b"BDAT 18000\r\n" + b"x" * 18_000)
    one = client(memory)
    one.begin()
    assert one.say(b"BDAT 3000\r\n" + b"x" * 3000) == "452"
    other.receiver.lost()
    assert one.say(b"BDAT 3 LAST\r\nend") == "452"
    assert one.messages == []
    assert memory.held == 0


def test_a_size_for_which_there_is_no_memory_is_deferred_at_mail() -> None:
    memory = Budget(1 * MIB)
    one = client(memory)
    one.say(b"EHLO p\r\n")
    assert one.say(b"MAIL FROM:<a@example.com> SIZE=2000000\r\nRCPT TO:<b@example.org>\r\n") == (
        "452 503"
    )
    assert one.say(b"MAIL FROM:<a@example.com> SIZE=500000\r\n") == "250"


@pytest.mark.parametrize(
    "end",
    [b"", b"RSET\r\n", b"QUIT\r\n", b"EHLO x\r\n", b"BDAT 99999999999999\r\n", b"BDAT x\r\n"],
)
@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"BDAT 3000\r\n" + b"x" * 3000,
        b"BDAT 3000\r\n" + b"x" * 2000,
        b"DATA\r\n" + LINE * 3,
        b"DATA\r\n" + LINE * 3 + b".\r\nMAIL FROM:<>\r\n",
        b"BDAT 0 LAST\r\n",
    ],
)
def test_however_a_session_ends_its_memory_is_given_back(begin: bytes, end: bytes) -> None:
    memory = Budget(1 * MIB)
    one = client(memory)
    one.begin()
    one.say(begin + end)
    one.receiver.lost()
    assert memory.held == 0


def test_what_waits_for_its_answer_is_held_until_it_has_it() -> None:
    memory = Budget(1 * MIB)
    one = client(memory)
    one.begin()
    [transaction] = one.receiver.receive_bytes(b"BDAT 9000 LAST\r\n" + b"x" * 9000)
    assert memory.held >= 9000
    one.receiver.lost()
    assert memory.held >= 9000
    one.receiver.answer(transaction, one.answer)
    assert memory.held == 0


def test_a_part_of_a_budget_takes_from_the_whole_and_leaves_the_rest() -> None:
    whole = Budget(100)
    part = Budget(75, whole)
    assert part.take(75) and not part.take(1)
    assert whole.take(25) and not whole.take(1)
    part.give(75)
    assert (whole.held, part.held) == (25, 0)
    assert whole.take(75) and not part.take(1)


def test_recipients_are_counted_in_octets() -> None:
    one = Client(Limits(envelope=100 * KIB))
    one.say(b"EHLO p\r\nMAIL FROM:<>\r\n")
    answers = "".join(
        one.say(b"RCPT TO:<%d%s@example.org>\r\n" % (number, b"x" * 3000)) for number in range(1000)
    )
    taken = answers.count("250")
    assert 25 <= taken <= 34 and answers.count("452") == 1000 - taken
    assert one.say(b"BDAT 1 LAST\r\nx") == "250", "the client sends the rest in another transaction"
    assert len(one.messages[0].envelope.recipients) == taken


def test_a_thousand_usual_recipients_are_taken() -> None:
    one = Client()
    one.begin(*(f"somebody.with.a.name.{number}@example.org" for number in range(1000)))


def test_messages_that_are_read_ahead_are_counted_with_their_recipients() -> None:
    one = Client()
    one.begin()
    one.say(b"RSET\r\n")
    envelope = b"MAIL FROM:<>\r\n" + b"".join(
        b"RCPT TO:<%d%s@example.org>\r\n" % (number, b"x" * 3000) for number in range(100)
    )
    events = one.receiver.receive_bytes((envelope + b"BDAT 0 LAST\r\n") * 50)
    assert one.receiver.paused
    assert len(events) <= 4


def test_a_service_has_room_for_one_of_the_largest_messages_by_default() -> None:
    for size in (1000, 50 * MIB, 200 * MIB):
        service = Service("x", ServiceSettings(max_message_size=size))
        assert service.strangers.free > 2 * size


# -- over the wire ---------------------------------------------------------------------------------


async def greeted(port: int, source: str = "127.0.0.1") -> Dialogue:
    one = Dialogue(*await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)))
    await one.replied(220)
    one.say("EHLO x")
    await one.replied(250)
    return one


async def begun(one: Dialogue, octets: int) -> None:
    """A message that never ends."""
    one.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
    await one.replied(250)
    await one.replied(250)
    one.writer.write(b"BDAT 1000000\r\n" + b"x" * octets)
    await one.writer.drain()


def small(salmon: Salmon, **keys: Any) -> Any:
    return listener(salmon, max_message_size=1 * MIB, max_memory=4 * MIB, **keys)


async def until(holds: Any) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came about")


def test_messages_that_never_end_take_their_share_and_no_more(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others hear 452 and come again; for whom places are kept there is memory, too."""
    monkeypatch.setattr(places, "START", 1000.0)
    salmon.handle(".*")

    async def main() -> None:
        keep = ["127.0.9.0/24"]
        async with small(salmon, keep_places_for=keep) as one:
            strangers = [await greeted(one.port, f"127.0.{n}.1") for n in range(1, 6)]
            for stranger in strangers[:3]:
                await begun(stranger, 999_000)
            stranger, provider = strangers[4], await greeted(one.port, "127.0.9.1")
            heard = ""
            while not heard.startswith("452 4.3.1"):
                stranger.say("RSET", "MAIL FROM:<a@example.net> SIZE=900000")
                await stranger.replied(250)
                heard = await stranger.hear()
                assert heard[:3] in ("250", "452")
            assert (await provider.send(b"x" * 900_000)).startswith("250")
            strangers[0].abort()
            while not heard.startswith("250"):
                stranger.say("RSET", "MAIL FROM:<a@example.net> SIZE=900000")
                await stranger.replied(250)
                heard = await stranger.hear()
            for other in (*strangers, provider):
                other.abort()

    asyncio.run(main())
    assert len(salmon.handled) == 1


def test_when_memory_is_short_whoever_is_slow_gives_way(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "START", 0.0)
    monkeypatch.setattr(places, "HASTE", 10**9)  # slow is whoever waits at all
    salmon.handle(".*")

    async def main() -> None:
        async with small(salmon) as one:
            strangers = [await greeted(one.port, f"127.0.{n}.1") for n in range(1, 5)]
            for stranger in strangers[:3]:
                await begun(stranger, 999_000)
            heard = ""
            while not heard.startswith("452 4.3.1"):
                strangers[3].say("RSET", "MAIL FROM:<a@example.net> SIZE=1000000")
                await strangers[3].replied(250)
                heard = await strangers[3].hear()
            for stranger in strangers[:3]:
                await stranger.hear("421 4.3.1 too slow while memory is short")
            strangers[3].say("RSET")
            await strangers[3].replied(250)
            assert (await strangers[3].send(b"x" * 999_000)).startswith("250")
            strangers[3].abort()

    asyncio.run(main())
    assert len(salmon.handled) == 1


@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_is_gone_leaves_only_what_is_being_handled(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    """It has no 250 for the others, and sends them again; then each is handled once."""
    monkeypatch.setattr(session, "HALF_CLOSED", 0.0)
    go_on = threading.Event()
    salmon.handle(".*", waits_for(go_on))
    services: list[Service] = []
    kept = Collector.listeners

    async def listeners(self: Collector) -> Any:
        services.extend(self.services.values())
        return await kept(self)

    monkeypatch.setattr(Collector, "listeners", listeners)
    messages = [b"Subject: %d\r\n\r\n" % number + LINE * 300 for number in range(3)]

    async def main() -> None:
        async with listener(salmon) as one:
            client = await greeted(one.port)
            for data in messages:
                client.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>")
                client.writer.write(b"BDAT %d LAST\r\n" % len(data) + data)
            memory = services[0].memory
            await until(lambda: salmon.handled and memory.held >= 900_000)
            if reset:
                end = client.writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.abort()
            await until(lambda: memory.held <= 310_000)
            assert len(salmon.handled) == 1
            go_on.set()
            await until(lambda: memory.held == 0)
            again = await greeted(one.port)
            for data in messages:
                assert (await again.send(data)).startswith("250")
            again.abort()

    asyncio.run(main())
    assert len(salmon.handled) == 3, "the first was recorded, and is not handled again"


def test_memory_below_two_messages_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_memory: found 1000, allowed is twice"):
        ServiceSettings(max_message_size=501, max_memory=1000)
    assert ServiceSettings(max_message_size=500, max_memory=1000).memory == 1000
