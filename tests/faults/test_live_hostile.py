"""Customers that mean harm or do not know better, as a live transaction finds them: what they say
to a question or a message does a sender no harm, and refuses nothing that they did not refuse."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.configuration import PASSWORD
from support.dialogue import Dialogue
from support.ends import message
from support.salmon import Salmon
from support.senders import Line, connected
from support.world import World, in_the_world

from salmon_revsmtp.provider import live
from salmon_revsmtp.smtp.replies import Reply

# What a sender has to read of one reply, at most.
MOST = 4_096
LINE = re.compile(rb"[245][0-9][0-9][ -][\x20-\x7e]{0,506}")

# What a customer says, again and again if it is to be without an end, and what a sender may make of
# it: the code that it hears.  HELD is our own acceptance.
HELD = 250
SAYS: dict[str, tuple[bytes, bool, int]] = {
    "garbage": (b"\x00\xff\xfe nothing like a reply\r\n", False, HELD),
    "HTTP": (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, HELD),
    "a code that there is not": (b"999 what\r\n", False, HELD),
    "one digit": (b"5\r\n", False, HELD),
    "two codes in one reply": (b"550-5.1.1 no\r\n250 yes\r\n", False, HELD),
    "the data is wanted": (b"354 go ahead\r\n", False, HELD),
    "it closes": (b"421 4.3.2 closing\r\n", False, HELD),
    "later": (b"451 4.3.0 later\r\n", False, HELD),
    "it does not know the command": (b"502 5.5.1 not implemented\r\n", False, HELD),
    "it wants a login": (b"530 5.7.0 authenticate first\r\n", False, HELD),
    "it does not know a parameter": (b"504 5.5.4 not implemented\r\n", False, HELD),
    "it does not know a form": (b"501 5.5.4 what?\r\n", False, HELD),
    "no, for an address is not whole": (b"504 5.5.2 <root@nas>: not whole\r\n", False, 504),
    "no, for an address is none": (b"501 5.1.3 bad recipient\r\n", False, 501),
    "a line without an end": (b"550 " + b"x" * 4096, True, HELD),
    "a reply without an end": (b"550-5.1.1 no\r\n" * 100, True, HELD),
    "empty lines without an end": (b"\r\n" * 1000, True, HELD),
    "a greeting": (b"220 2.0.0 welcome\r\n", False, 250),
    "a goodbye": (b"221 2.0.0 bye\r\n", False, 250),
    "a long yes": (b"250-2.1.5 %b\r\n" % (b"y" * 400) * 120 + b"250 ok\r\n", False, 250),
    "no": (b"550 5.1.1 no such user\r\n", False, 550),
    "no, in no words": (b"550\r\n", False, 550),
    "no, as if it were yes": (b"550 2.1.5 ok\r\n", False, 550),
    "no, in a hundred lines": (b"550-5.7.1 line\r\n" * 99 + b"550 5.7.1 last\r\n", False, 550),
    "no, in long lines": (b"550-%b\r\n" % (b"n" * 8000) * 7 + b"550 n\r\n", False, 550),
    "no, to a terminal": (b"550 5.1.1 \x1b[2J\x07\x1b]0;own\x07\x00\x7f\x9b31m\r\n", False, 550),
    "no, with a CR": (b"550 5.1.1 no\r250 yes\r221 bye\r\n", False, 550),
    "no, with other line ends": (
        "550 5.1.1 no\x0b250 yes\x0c250 yes\x85250 yes\u2028250 yes\r\n".encode(),
        False,
        550,
    ),
    "no, in Greek": ("550 5.1.1 \u03bf\u03c7\u03b9\r\n".encode(), False, 550),
}


class Customer:
    """A customer with an open session, that answers RCPT or the data as it is told to, once; when
    it is asked again, and what is held is sent to it, it says that it comes too soon."""

    def __init__(self, dialogue: Dialogue, says: bytes, endless: bool, to: str) -> None:
        self._dialogue, self._says, self._endless, self._to = dialogue, says, endless, to

    async def open(self) -> None:
        """Log in, and have a session."""
        customer = self._dialogue
        await customer.replied(220)
        customer.say("EHLO home.example.org")
        await customer.replied(250)
        customer.say("AUTH CRAM-MD5")
        challenge = base64.b64decode((await customer.replied(334))[4:])
        digest = hmac.new(PASSWORD.encode(), challenge, hashlib.md5).hexdigest()
        customer.say(base64.b64encode(f"acme {digest}".encode()))
        await customer.replied(235)
        customer.say("XHOLD", "ATRN")
        await customer.replied(250)
        await customer.replied(250)
        customer.say("220 home.example.org")

    async def serve(self) -> None:
        """Answer until the provider has enough."""
        try:
            while line := await self._dialogue.reader.readline():
                word = line[:4].decode().strip()
                if word == "BDAT":
                    await self._dialogue.reader.readexactly(int(line.split()[1]))
                if word == self._to:
                    await self._say()
                    self._says = b"451 4.3.0 too soon\r\n"
                elif word == "EHLO":
                    self._dialogue.say("250-home", "250-PIPELINING", "250-CHUNKING", "250 PRDR")
                else:
                    self._dialogue.say("250 2.0.0 ok")
        except (OSError, asyncio.IncompleteReadError):
            pass  # it has

    async def _say(self) -> None:
        self._dialogue.writer.write(self._says)
        while self._endless:
            self._dialogue.writer.write(self._says)
            await self._dialogue.writer.drain()


async def ask(line: Line, said: str) -> tuple[Reply, bytes]:
    """The reply to this, and what it was on the wire."""
    before = len(line.received)
    reply = await line.ask(said)
    return reply, bytes(line.received[before:])


def harmless(octets: bytes) -> bool:
    """These are one reply as any client reads it."""
    lines = octets.split(b"\r\n")
    assert lines.pop() == b"" and len(octets) <= MOST
    assert all(LINE.fullmatch(one) for one in lines), octets
    assert len({one[:3] for one in lines}) == 1
    assert [one[3:4] for one in lines] == [b"-"] * (len(lines) - 1) + [b" "]
    return True


def with_customer(
    salmon: Salmon, what: str, to: str, work: Callable[[World, Line], Awaitable[None]]
) -> None:
    """Run ``work`` with a sender that has said MAIL, while a customer is there that says this to
    RCPT or BDAT."""
    says, endless, _ = SAYS[what]

    async def main(here: World) -> None:
        dialogue = Dialogue(*await asyncio.open_connection("127.0.0.1", here.odmr))
        customer = Customer(dialogue, says, endless, to)
        await customer.open()
        serving = asyncio.create_task(customer.serve())
        await here.until(lambda: here.collector.providing.live.verdict("b@example.org") is not None)
        async with connected(here.mx) as line:
            await line.hear()
            await line.ask("EHLO sender.example.net")
            await line.ask("MAIL FROM:<a@example.net>")
            await work(here, line)
            assert str(await line.ask("QUIT")).startswith("221 2.0.0"), "no reply too many"
        dialogue.abort()
        await serving

    in_the_world(salmon, main)
    assert salmon.relayed == []


@pytest.mark.parametrize("what", SAYS)
def test_whatever_is_said_to_rcpt(salmon: Salmon, what: str) -> None:
    async def work(here: World, line: Line) -> None:
        reply, octets = await ask(line, "RCPT TO:<b@example.org>")
        assert reply.code == SAYS[what][2] and harmless(octets)

    with_customer(salmon, what, "RCPT", work)


@pytest.mark.parametrize("what", [one for one in SAYS if one != "the data is wanted"])
def test_whatever_is_said_to_the_data(salmon: Salmon, what: str) -> None:
    code = SAYS[what][2]
    ours = SAYS[what][0][:1] != b"2" and code == HELD

    async def work(here: World, line: Line) -> None:
        assert (await line.ask("RCPT TO:<b@example.org>")).code == 250
        assert (await line.ask("DATA")).code == 354
        data = message("one")
        reply, octets = await ask(line, f"{data.decode()}.")
        assert reply.code == code and harmless(octets)
        assert ("held as" in reply.text) is ours
        found = [here.data(one) for one in here.held()]
        assert [one.endswith(data) for one in found] == [True] * ours

    with_customer(salmon, what, "BDAT", work)


def test_replies_of_which_there_is_one_per_recipient_and_no_last_one(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The customer announces them to a sender that did not ask for that, and says no more."""
    monkeypatch.setattr(live, "MESSAGE_IN", 0.5)
    monkeypatch.setitem(SAYS, "353", (b"353 one each\r\n550 5.7.1 no\r\n", False, HELD))

    async def work(here: World, line: Line) -> None:
        await line.ask("RCPT TO:<b@example.org>")
        await line.ask("DATA")
        reply, octets = await ask(line, f"{message('one').decode()}.")
        assert reply.code == HELD and "held as" in reply.text and harmless(octets)
        assert len(here.held()) == 1

    with_customer(salmon, "353", "BDAT", work)


def test_what_senders_ask_that_are_gone_is_asked_no_more(salmon: Salmon) -> None:
    """Strangers ask and leave, while a customer that takes one command at a time is slow: who asks
    then does not wait for what no one wants to know."""

    async def main(here: World) -> None:
        dialogue = Dialogue(*await asyncio.open_connection("127.0.0.1", here.odmr))
        await Customer(dialogue, b"", False, "").open()
        await dialogue.asks("EHLO", "250 home")
        providing = here.collector.providing
        await here.until(lambda: providing.live.verdict("b@example.org") is not None)
        listener: Any = here.daemon.listeners[0]

        async def asks(line: Line, name: str) -> None:
            await line.hear()
            await line.ask("EHLO sender.example.net")
            await line.ask("MAIL FROM:<a@example.net>")
            line.say(f"RCPT TO:<{name}@example.org>\r\n".encode())
            sessions = len(listener._connections)
            await here.until(lambda: sum(one.busy for one in listener._connections) == sessions)

        async with connected(here.mx) as first:
            await asks(first, "first")
            await dialogue.asks("MAIL", "250 ok")
            await dialogue.hear("RCPT TO:<first@example.org>")
            for number in range(5):
                async with connected(here.mx) as gone:
                    await asks(gone, f"gone{number}")
                    gone.abort()
                await here.until(lambda: len(listener._connections) == 1)
            async with connected(here.mx) as last:
                await asks(last, "last")
                dialogue.say("250 ok")
                assert (await first.hear()).code == 250
                await dialogue.asks("RSET", "250 ok")
                await dialogue.asks("MAIL", "250 ok")
                await dialogue.asks("RCPT TO:<last@example.org>", "550 5.1.1 no such user")
                await dialogue.asks("RSET", "250 ok")
                assert (await last.hear()).code == 550
        dialogue.abort()

    in_the_world(salmon, main)


@pytest.mark.parametrize(
    ("says", "held", "told"),
    [
        ("250 2.0.0 taken", 0, 0),
        ("550 5.7.1 no thanks", 0, 1),
        ("451 4.3.0 later", 1, 0),
        ("530 5.7.0 authenticate first", 1, 0),
        ("504 5.5.4 not implemented", 1, 0),
        ("504 5.5.2 <root@nas>: need fully-qualified address", 0, 1),
    ],
)
def test_an_answer_that_comes_late_settles_what_is_held(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, says: str, held: int, told: int
) -> None:
    """A customer that does not know a message again is not sent it twice."""
    monkeypatch.setattr(live, "MESSAGE_IN", 0.5)

    async def main(here: World) -> None:
        dialogue = Dialogue(*await asyncio.open_connection("127.0.0.1", here.odmr))
        await Customer(dialogue, b"", False, "").open()
        await dialogue.asks("EHLO", "250 home")
        providing = here.collector.providing
        await here.until(lambda: providing.live.verdict("b@example.org") is not None)
        async with connected(here.mx) as line:
            await line.hear()
            await line.ask("EHLO sender.example.net")
            await line.ask("MAIL FROM:<a@example.net>")
            line.say(b"RCPT TO:<b@example.org>\r\n")
            for command in ("MAIL", "RCPT", "RSET"):
                await dialogue.asks(command, "250 ok")
            assert (await line.hear()).code == 250
            assert (await line.ask("DATA")).code == 354
            line.say(message("one") + b".\r\n")
            for command in ("MAIL", "RCPT"):
                await dialogue.asks(command, "250 ok")
            await dialogue.asks("DATA", "354 go on")
            while await dialogue.hear() != ".":
                pass
            assert "held as" in (await line.hear()).text
            [one] = here.held()
            # What is held after it goes out, and it does not.
            here.hold("b@example.org", data=message("two"))
            dialogue.say(says)
            if not says.startswith("250"):
                await dialogue.asks("RSET", "250 ok")
            await dialogue.asks("MAIL", "250 ok")
            await dialogue.asks("RCPT", "250 ok")
            await dialogue.asks("DATA", "354 go on")
            lines = []
            while (content := await dialogue.hear()) != ".":
                lines.append(content)
            assert "Subject: two" in lines
            dialogue.say("250 ok")
            await here.until(lambda: len(here.held()) == held)
            assert [found.key for found in here.held()] == [one.key] * held
            assert all(says[:3] in found.reason for found in here.held())
        dialogue.abort()

    in_the_world(salmon, main)
    assert len(salmon.relayed) == told


def test_what_a_customer_says_of_the_session_returns_no_mail(salmon: Salmon) -> None:
    """Its server at home wants a login: its owner's mistake is no reason to refuse held mail."""

    async def main(here: World) -> None:
        key = here.hold("b@example.org")
        dialogue = Dialogue(*await asyncio.open_connection("127.0.0.1", here.odmr))
        await Customer(dialogue, b"", False, "").open()
        await dialogue.asks("EHLO", "250 home")
        await dialogue.asks("MAIL", "530 5.7.0 authenticate first")
        await here.until(lambda: "530" in here.held()[0].reason)
        assert [one.key for one in here.held()] == [key]
        dialogue.abort()

    in_the_world(salmon, main)
    assert salmon.relayed == []
