"""How much work a message is, counted and not timed: a guard against growing slow unnoticed.

The figures are those of one message more in a session, so that what a session costs by itself is
not among them.  The bounds are a little above what is measured, and below what is measured when one
of the things is taken out that make a message cheap.  A bound that is not met wants a reason in the
commit that raises it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import itertools
import logging
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.collecting import collect
from support.configuration import PASSWORD, agent_keys
from support.dialogue import Dialogue, no_more_mail, scripted
from support.holding import Holding, account
from support.salmon import Salmon
from support.world import World, in_the_world

import salmon_revsmtp
from salmon_revsmtp.delivery import batches, dispatcher
from salmon_revsmtp.delivery.dispatcher import Dispatcher, PendingDelivery
from salmon_revsmtp.delivery.router import RouterDelivery
from salmon_revsmtp.delivery.trace import Origin
from salmon_revsmtp.journal.claims import Claims
from salmon_revsmtp.journal.deliveries import DeliveryJournal
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import Receiver, Transaction
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Outgoing, Sender, Sent

FEW, MORE = 20, 60

# Functions of ours that are called for a small message for one recipient, at both ends.  Measured:
# 146 on Python 3.11, fewer where comprehensions are no calls.
CALLS = 148
# The same into a queue; measured: 141.
QUEUE_CALLS = 142

# The same where it comes by itself, command by command.  Measured: 279.
CALLS_BY_ITSELF = 280

PACKAGE = str(Path(salmon_revsmtp.__file__).parent)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts calls in all threads that begin meanwhile, and in this one: of Python functions and of
    C functions by their names, and of all our own under ``"ours"``."""
    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            counts[f"python {frame.f_code.co_name}"] += 1
            counts["ours"] += frame.f_code.co_filename.startswith(PACKAGE)
        elif event == "c_call":
            counts[called.__name__] += 1

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        yield counts
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture(autouse=True)
def no_log(caplog: pytest.LogCaptureFixture) -> None:
    """What a log line costs is up to the handlers of whoever has set it up."""
    caplog.set_level(logging.WARNING, "salmon_revsmtp")


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine makes no smaller batches, and looks no more often at what is done."""
    monkeypatch.setattr(batches, "BATCH_SECONDS", 60.0)
    monkeypatch.setattr(dispatcher, "LOOK_EVERY", 60.0)
    monkeypatch.setattr(dispatcher, "MOMENT", 60.0)


_numbers = itertools.count()


def _transaction(number: int) -> bytes:
    body = b"Subject: %06d\r\n\r\nhello\r\n" % number
    envelope = b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\n"
    return envelope + b"BDAT %d LAST\r\n" % len(body) + body


async def _one_at_a_time(provider: Dialogue, messages: int) -> None:
    """Each command waits for the answer to the one before."""
    commands = [("MAIL FROM:<a@example.net>", 250), ("RCPT TO:<b@example.org>", 250), ("DATA", 354)]
    for _ in range(messages):
        message = f"Subject: {next(_numbers)}\r\n\r\nhello\r\n."
        for said, code in (*commands, (message, 250)):
            provider.say(said)
            await provider.replied(code)
    provider.say("QUIT")


def work_of(
    salmon: Salmon, messages: int, one_at_a_time: bool = False, **service: Any
) -> Counter[str]:
    """A session in which so many messages come at once, or one after another, with all that belongs
    to it."""
    before = len(salmon.handled)

    async def provider(provider: Dialogue) -> None:
        await provider.reverse()
        if one_at_a_time:
            await _one_at_a_time(provider, messages)
            return
        # In one write, and all answers in few reads: the provider is not what we count.
        said = [_transaction(next(_numbers)) for _ in range(messages)]
        provider.say(b"".join(said) + b"QUIT")
        answers = await asyncio.wait_for(provider.reader.read(), 60)
        assert answers.count(b"250 ") == 3 * messages

    async def main() -> None:
        async with scripted(provider, no_more_mail) as port:
            [report] = await collect(salmon, agent_keys(port), default=service)
        assert (report.outcome, report.messages) == (Outcome.COLLECTED, messages)

    with counted() as counts:
        asyncio.run(main())
    expected = messages if service.get("delivery") != "queue" else 0
    assert len(salmon.handled) - before == expected
    return counts


def per_message(salmon: Salmon, **service: Any) -> dict[str, float]:
    """What one message more adds."""
    work_of(salmon, 1, **service)  # whatever is imported or made once
    few, more = work_of(salmon, FEW, **service), work_of(salmon, MORE, **service)
    return {name: (more[name] - few[name]) / (MORE - FEW) for name in more}


def test_a_message_into_handlers(salmon: Salmon) -> None:
    salmon.handle(".*")
    work = per_message(salmon, hostname="mail.example.org")
    # One record written in the journal, and one look into it for all that is delivered in a batch;
    # no other file.
    assert work["executemany"] == 1
    assert work["execute"] <= 0.5
    assert work.get("fsync", 0) == 0
    assert work.get("open", 0) == 0
    # Neither a system call on the wire nor a wake-up of the event loop for each of them.
    assert work["send"] <= 0.3
    assert work["recv"] <= 0.3
    assert work["python call_soon_threadsafe"] <= 0.3
    # The log lines of a batch are written together.
    assert work["python _log_lines"] <= 0.3
    assert work["ours"] <= CALLS


def test_a_message_by_itself(salmon: Salmon) -> None:
    salmon.handle(".*")
    work = per_message(salmon, hostname="mail.example.org", one_at_a_time=True)
    # What submits it answers it: no one wakes the event loop, by a system call and another turn.
    # (One such turn a message is that of a slow machine's thread that is just being started.)
    assert work.get("python call_soon_threadsafe", 0) <= 0.1
    assert work["python _submit"] == 1
    assert work["python _answered"] == 1
    # Both ends: four lines of the provider, four replies.
    assert work["send"] <= 8.1
    assert work["ours"] <= CALLS_BY_ITSELF


def test_a_message_into_a_queue(salmon: Salmon) -> None:
    work = per_message(salmon, hostname="mail.example.org", delivery="queue")
    # The file; and its folder (Maildir) once for all that waited together.
    assert 1 <= work["fsync"] <= 1.3
    # They are recorded together, and found unknown together.
    assert work["executemany"] <= 0.3
    assert work["execute"] <= 0.5
    # The file is opened once, written with one call, and renamed; its folder is not looked at.
    assert work["open"] <= 1.3
    assert work["writev"] == 1
    assert work["rename"] == 1
    assert work.get("write", 0) == 0
    assert work.get("listdir", 0) == 0
    assert work["stat"] <= 1.3
    assert work["send"] <= 0.3
    assert work["python call_soon_threadsafe"] <= 0.3
    assert work["python _log_lines"] <= 0.3
    assert work["ours"] <= QUEUE_CALLS


@pytest.mark.parametrize("how", ["BDAT", "DATA"])
def test_memory_of_a_large_message(how: str) -> None:
    """The machine holds what came, the message, and what is cut from it, and that is all."""
    octets = 8 * 2**20
    content = (b"x" * 76 + b"\r\n") * (octets // 78)
    end = b".\r\n" if how == "DATA" else b""
    command = b"DATA\r\n" if how == "DATA" else b"BDAT %d LAST\r\n" % len(content)
    receiver = Receiver("h", Limits())
    receiver.receive_bytes(b"EHLO x\r\nMAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\n")
    receiver.receive_bytes(command)
    pieces = [content[start : start + 65536] for start in range(0, len(content), 65536)]
    tracemalloc.start()
    try:
        events = [event for piece in [*pieces, end] for event in receiver.receive_bytes(piece)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    [event] = events
    assert isinstance(event, Transaction) and event.data == content
    assert peak <= 3.3 * len(content)


def test_memory_of_messages_under_way() -> None:
    """A sender that is far ahead holds the messages, and little beside them."""
    sender = Sender("h")
    sender.receive_bytes(b"220 x\r\n250-x\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
    sender.data_to_send()
    messages = [
        Outgoing(number, Envelope("a@example.net", ("b@example.org",)), b"x\r\n" * 2000)
        for number in range(200)
    ]
    tracemalloc.start()
    try:
        for message in messages:
            sender.send(message)
        written = sender.data_to_send()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(piece.count(b"MAIL FROM:") for piece in written) == 200
    assert held <= 200 * 4000  # commands and callbacks; the content is not copied
    said = b"250 ok\r\n" * (4 * 200 - 1)
    assert sum(isinstance(event, Sent) for event in sender.receive_bytes(said)) == 200


def test_events_and_replies_of_a_message() -> None:
    """One event, and one write for all that came in one piece."""
    receiver = Receiver("h", Limits(unanswered_messages=100))
    receiver.receive_bytes(b"EHLO x\r\n")
    receiver.data_to_send()
    one = b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nBDAT 3 LAST\r\nx\r\n"
    events = receiver.receive_bytes(one * 50)
    assert len(events) == 50
    for event in events:
        assert isinstance(event, Transaction)
        receiver.answer(event, Reply(250, "ok"))
    assert receiver.data_to_send().count(b"\r\n") == 150


def test_memory_of_a_message_with_bare_line_ends() -> None:
    """They become CRLF, each twice as long, in a few copies."""
    sender = Sender("h")
    sender.receive_bytes(b"220 x\r\n250-x\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
    octets = 8 * 2**20
    message = Outgoing(1, Envelope("a@example.net", ("b@example.org",)), b"\n" * octets)
    tracemalloc.start()
    try:
        sender.send(message)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    said = list(sender.data_to_send())
    while sender.streaming:
        said += sender.data_to_send()
    assert b"".join(said).endswith(b" LAST\r\n" + b"\r\n" * octets)
    assert peak <= 4 * octets


# -- the provider ----------------------------------------------------------------------------------

# As CALLS, of a message that comes alone into the hold store of the provider.  Measured: 310.
HOLD_CALLS = 316
# Of a customer's call, from its connection to the session that is open.  Measured: 441.
LOGIN_CALLS = 450


async def _send(here: World, messages: int) -> None:
    """Send messages to the provider, one at a time: each command waits for its answer."""
    async with here.client() as client:
        for _ in range(messages):
            client.say("MAIL FROM:<a@example.net>")
            await client.replied(250)
            client.say("RCPT TO:<b@example.org>")
            await client.replied(250)
            client.say("DATA")
            await client.replied(354)
            client.say(f"Subject: {next(_numbers)}", "", "hello", ".")
            await client.replied(250)


def _held_alone(salmon: Salmon, messages: int) -> Counter[str]:
    async def work(here: World) -> None:
        await _send(here, 1)
        await _send(here, messages)

    with counted() as counts:
        in_the_world(salmon, work)
    return counts


def test_a_message_that_comes_alone_into_the_hold_store(salmon: Salmon) -> None:
    _held_alone(salmon, 1)  # whatever is imported or made once
    few, more = _held_alone(salmon, FEW), _held_alone(salmon, MORE)
    work = {name: (more[name] - few[name]) / (MORE - FEW) for name in more}
    # One transaction: its begin and end, the message, for whom it is, and how much they have.
    assert work["execute"] <= 5.1
    # One change to the thread that commits, and one back; the others are answers.
    assert work["python call_soon_threadsafe"] <= 1.1
    assert work["send"] <= 12.1  # of both ends
    assert work["ours"] <= HOLD_CALLS


def test_messages_that_come_together_into_the_hold_store(tmp_path: Path) -> None:
    """As many statements as for one."""
    store = EmbeddedStore(tmp_path / "hold")
    envelope = Envelope("a@example.net", ("b@example.org",))
    arrivals = [Arrival(envelope, ("acme",), [b"x\r\n"]) for _ in range(10)]
    store.put(arrivals)
    with counted() as counts:
        store.put(arrivals)
    store.close()
    assert counts["execute"] == 5


def _called(tmp_path: Path, customers: int) -> Counter[str]:
    """So many customers call, one after another, each for a session that stays open."""
    names = [f"home-{number}" for number in range(customers)]
    accounts = [account(name, domains=[f"{name}.example"]) for name in names]
    holding = Holding(tmp_path / f"hold-{next(_numbers)}", *accounts)

    async def call(port: int, name: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        customer = Dialogue(reader, writer)

        async def say(line: str, code: int) -> str:
            customer.say(line)
            return await customer.replied(code)

        await customer.replied(220)
        await say("EHLO x", 250)
        challenge = base64.b64decode((await say("AUTH CRAM-MD5", 334))[4:])
        digest = hmac.new(PASSWORD.encode(), challenge, hashlib.md5).hexdigest()
        await say(base64.b64encode(f"{name} {digest}".encode()).decode(), 235)
        await say("XHOLD", 250)
        await say("ATRN", 250)
        customer.say("220 x")
        await customer.hear("EHLO")
        customer.say("250 x")
        writer.close()

    async def main() -> None:
        async with holding.provider() as provider:
            for name in names:
                await call(provider.port, name)

    with counted() as counts:
        asyncio.run(main())
    holding.close()
    return counts


def test_a_customer_that_calls(tmp_path: Path) -> None:
    _called(tmp_path, 1)
    few, more = _called(tmp_path, FEW), _called(tmp_path, MORE)
    work = {name: (more[name] - few[name]) / (MORE - FEW) for name in more}
    # One look into the hold store, in another thread.
    assert work["python run_in_executor"] <= 1.1
    assert work["execute"] <= 1.1
    assert work["ours"] <= LOGIN_CALLS


class NoThread:
    """Takes deliveries, and does none of them."""

    def __init__(self) -> None:
        self.waits = 0

    def submit(self, *taken: object) -> None:
        """Take them."""

    def acquire(self, timeout: float) -> bool:
        """The event loop waits for an end that does not come."""
        self.waits += 1
        return False


def test_the_event_loop_does_not_wait_for_handlers_that_take_long(salmon: Salmon) -> None:
    thread: Any = NoThread()
    dispatcher = Dispatcher(
        "default",
        RouterDelivery(salmon.folder),
        DeliveryJournal(),
        Claims(),
        Plugins(),
        thread,  # which notifies no one, either
        thread,
        turn=contextlib.nullcontext(),
        spell=str,
        handler_timeout=60,
        repeat_seconds=60,
        at_once=True,
    )
    dispatcher._end = thread

    async def main(messages: int) -> None:
        for _ in range(messages):
            envelope = Envelope("a@example.net", ("b@example.org",))
            pending = PendingDelivery(Origin("default", "h"), envelope, b"x\r\n")
            dispatcher.deliver(pending, lambda: None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(main(31))
    assert thread.waits == 5, "at the 1st, 3rd, 7th, 15th and 31st"
