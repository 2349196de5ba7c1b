"""ETRN at the provider: what a client hears, and what goes to the address of the account."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.collecting import collect
from support.configuration import PASSWORD, agent_keys, configuration, etrn_keys
from support.dialogue import Dialogue, scripted
from support.holding import Holding, NoHooks, account
from support.listener import listener
from support.messages import MESSAGE
from support.salmon import Salmon
from support.tls import CERTIFICATE, PRIVATE_KEY, server_tls
from support.world import World, in_the_world, world

from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider import etrn
from salmon_revsmtp.provider.etrn import Etrn
from salmon_revsmtp.provider.handover import MOST_STRIKES
from salmon_revsmtp.provider.hold.store import Arrival, Feed, Held, Settled, State
from salmon_revsmtp.provider.settling import Settler
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.smtp import content
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import EtrnRequest, Receiver, Transaction
from salmon_revsmtp.smtp.replies import Reply

#: An address where no one is.
NOWHERE = "127.0.0.1:9"


def accounts(address: str = NOWHERE) -> list[dict[str, Any]]:
    """Two that have an address for ETRN, one that has none, one that is disabled."""
    keys = {"password": PASSWORD}
    mine = ["example.org", "sub.example.org", "xn--bcher-kva.example"]
    return [
        {**keys, "name": "acme", "domains": mine, "etrn": address},
        {**keys, "name": "alone", "domains": ["alone.example"], "etrn": address},
        {**keys, "name": "plain", "domains": ["example.com"]},
        {**keys, "name": "off", "domains": ["off.example"], "etrn": address, "enabled": False},
    ]


Work = Callable[[World], Awaitable[None]]


def with_a_customer(
    salmon: Salmon, work: Work, *scripts: Callable[[Dialogue], Awaitable[None]]
) -> None:
    """The accounts' address is that of a server that follows these scripts."""

    async def main() -> None:
        async with (
            scripted(*scripts) as port,
            world(salmon, accounts=accounts(f"127.0.0.1:{port}")) as here,
        ):
            await work(here)

    asyncio.run(main())


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etrn, "LINGER", 0.1)


async def greet(server: Dialogue, *keywords: str) -> None:
    server.say("220 home.example.org")
    lines = ["250-home.example.org", *(f"250-{one}" for one in keywords), "250 HELP"]
    await server.asks("EHLO mx.example.net", *lines)


async def take(server: Dialogue, answer: str = "250 taken") -> tuple[list[str], bytes]:
    """Take a message by DATA; returns its recipients and its octets."""
    await server.asks("MAIL FROM:<", "250 ok")
    recipients = []
    while (line := await server.hear()) != "DATA":
        recipients.append(line.removeprefix("RCPT TO:"))
        server.say("250 ok")
    server.say("354 go on")
    content = b""
    while not content.endswith(b"\r\n.\r\n"):
        content += await asyncio.wait_for(server.reader.readline(), 60)
    server.say(answer)
    return recipients, re.sub(rb"^\.", b"", content[:-3], flags=re.MULTILINE)


async def goodbye(server: Dialogue) -> None:
    await server.asks("QUIT", "221 bye")
    await server.silence()


async def take_one(server: Dialogue) -> None:
    """A customer's server to which one message comes, and no more."""
    await greet(server)
    await take(server)
    await goodbye(server)


# -- the machine -------------------------------------------------------------------------------


class Asking:
    """A client of the receiver, without a connection; ETRN is answered when the test says so."""

    def __init__(self, etrn: bool = True, limits: Limits | None = None) -> None:
        self.receiver = Receiver("mx", limits, etrn=etrn)
        self.receiver.data_to_send()

    def say(self, *lines: str) -> list[object]:
        return self.receiver.receive_bytes("".join(f"{one}\r\n" for one in lines).encode())

    def heard(self) -> list[str]:
        return self.receiver.data_to_send().decode().splitlines()


def test_etrn_is_offered_only_where_it_is_answered() -> None:
    asking = Asking()
    asking.say("EHLO x")
    assert "250 ETRN" in asking.heard()
    asking = Asking(etrn=False)
    assert asking.say("EHLO x", "ETRN example.org") == []
    heard = asking.heard()
    assert not any("ETRN" in line for line in heard)
    assert heard[-1].startswith("502 ")


@pytest.mark.parametrize(
    ("lines", "last"),
    [
        (["ETRN example.org"], "503 5.5.1 send EHLO first"),
        (["HELO x", "ETRN example.org"], "503 5.5.1 send EHLO first"),
        (["EHLO x", "MAIL FROM:<>", "ETRN example.org"], "503 5.5.1 a transaction is under way"),
        (["EHLO x", "ETRN"], "501 5.5.4 "),
        (["EHLO x", "ETRN example.org example.com"], "501 5.5.4 "),
        (["EHLO x", "ETRN example.org\x07"], "500 5.5.2 "),
        (["EHLO x", f"ETRN {'x' * 5000}"], "500 5.5.2 "),
    ],
)
def test_a_request_that_is_none(lines: list[str], last: str) -> None:
    asking = Asking()
    assert asking.say(*lines) == []
    assert asking.heard()[-1].startswith(last)


def test_nothing_more_is_read_until_the_answer() -> None:
    asking = Asking()
    assert asking.say("EHLO x", "ETRN @example.org", "NOOP") == [EtrnRequest("@example.org")]
    assert asking.receiver.paused and asking.receiver.at_boundary
    asking.heard()
    assert asking.say("ETRN b") == []
    asking.receiver.answer_etrn(Reply(251, "none"))
    assert asking.receiver.advance() == [EtrnRequest("b")]
    assert [line[:3] for line in asking.heard()] == ["251", "250"]


def test_the_answer_comes_after_that_to_a_message_before_it() -> None:
    asking = Asking()
    mail = ["MAIL FROM:<>", "RCPT TO:<b@example.org>", "BDAT 1 LAST"]
    [message, request] = asking.say("EHLO x", *mail, "xETRN example.org")
    asking.heard()
    assert isinstance(message, Transaction) and isinstance(request, EtrnRequest)
    asking.receiver.answer_etrn(Reply(250, "started"))
    assert asking.heard() == []
    asking.receiver.answer(message, Reply(250, "held"))
    assert asking.heard() == ["250 2.0.0 held", "250 2.0.0 started"]


def test_a_session_that_ends_while_it_waits_hears_no_answer() -> None:
    asking = Asking()
    asking.say("EHLO x", "ETRN example.org")
    asking.heard()
    asking.receiver.shut_down()
    assert [line[:3] for line in asking.heard()] == ["421"]
    asking.receiver.answer_etrn(Reply(250, "started"))
    assert asking.heard() == [] and asking.receiver.closed


def test_requests_without_end_come_to_one() -> None:
    asking = Asking(limits=Limits(requests=3))
    asking.say("EHLO x")
    for _ in range(3):
        assert asking.say("ETRN example.org") == [EtrnRequest("example.org")]
        asking.receiver.answer_etrn(Reply(459, "no"))
    asking.heard()
    asking.say("ETRN example.org")
    assert asking.heard() == ["421 4.7.0 more than 3 ETRN, closing"]


# -- what a client hears -----------------------------------------------------------------------


def test_only_a_service_that_holds_has_it(salmon: Salmon) -> None:
    async def main() -> None:
        async with listener(salmon) as service:
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            client = Dialogue(reader, writer)
            await client.replied(220)
            client.say("EHLO x")
            await client.replied(250)
            client.say("ETRN example.org")
            await client.replied(502)
            assert not any("ETRN" in line for line in client.heard)
            await client.quit()
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("example.org", "251 2.0.0 OK, no messages waiting for node example.org"),
        ("EXAMPLE.ORG.", "251 2.0.0 OK, no messages waiting for node EXAMPLE.ORG."),
        ("@example.org", "251 2.0.0 OK, no messages waiting for node @example.org"),
        ("bücher.example", "251 2.0.0 "),
        ("xn--bcher-kva.example", "251 2.0.0 "),
        ("@", "501 5.5.4 ETRN takes a domain, or @ and a domain"),
        ("#", "501 5.5.4 "),
        ("@@example.org", "501 5.5.4 "),
        ("a..b", "501 5.5.4 "),
        ("[127.0.0.1]", "501 5.5.4 "),
        ("a@example.org", "501 5.5.4 "),
    ],
)
def test_names(salmon: Salmon, name: str, answer: str) -> None:
    async def work(here: World) -> None:
        [heard] = await here.ask(name)
        assert heard.startswith(answer)

    in_the_world(salmon, work, accounts=accounts())


def test_no_one_learns_which_domains_are_held(salmon: Salmon) -> None:
    """No account, no address for ETRN, a disabled account, a name to log in with: all the same."""
    names = ["example.net", "example.com", "off.example", "ple.org", "deep.sub.example.org"]
    names += ["@example.com", "@example.net", "#acme", "#plain", "#nothing"]

    async def work(here: World) -> None:
        for recipient in ("b@example.com", "b@off.example", "b@example.org"):
            here.hold(recipient)
        for name, answer in zip(names, await here.ask(*names), strict=True):
            reason = "its mail is not sent on request here"
            assert answer == f"459 4.7.1 node {name} not allowed: {reason}"
        assert len(here.held("plain")) == len(here.held("off")) == 1

    in_the_world(salmon, work, accounts=accounts())


def test_a_request_that_concerns_too_many_accounts(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etrn, "MOST_ACCOUNTS", 0)

    async def work(here: World) -> None:
        assert (await here.ask("@org"))[0].startswith("459 ")

    in_the_world(salmon, work, accounts=accounts())


def test_how_many_domains_there_are_does_not_matter_to_who_asks_for_one(salmon: Salmon) -> None:
    """The event loop answers, and no one else is served meanwhile."""
    domains = [f"d{number}.example.org" for number in range(50_000)]
    many = [
        account(f"a{start}", domains=domains[start : start + 20], etrn=NOWHERE)
        for start in range(0, len(domains), 20)
    ]

    async def main() -> float:
        held = Holding(salmon.folder / "provider", *many)
        answers = Etrn(held.accounts, held.store, Settler(held.store, held.notify, NoHooks()))
        began = time.thread_time()
        for _ in range(500):
            for name in ("@example.net", "@d1", "@org"):
                assert (await answers.answer(name, "mx")).code == 459
        held.close()
        return time.thread_time() - began

    assert asyncio.run(main()) < 1.0


def test_mail_that_a_stranger_sent_costs_little_when_a_stranger_asks(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipients are counted, too: a message may have a thousand."""
    monkeypatch.setattr(etrn, "LOOKED_AT_RECIPIENTS", 10)
    monkeypatch.setattr(etrn, "LOOK", 2)

    async def work(here: World) -> None:
        for _ in range(3):
            here.hold(*(f"b{number}@sub.example.org" for number in range(5)))
        assert await here.ask("example.org") == [
            "250 2.0.0 OK, queuing for node example.org started"
        ]

    in_the_world(salmon, work, accounts=accounts())


def test_any_number_of_requests_leave_threads_for_others(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(here: World) -> None:
        listing, looks, may_look = here.store.listing, threading.Event(), threading.Event()

        def waits(*arguments: Any) -> Sequence[Held]:
            looks.set()
            assert may_look.wait(60)
            return listing(*arguments)

        here.hold("b@example.org")
        monkeypatch.setattr(here.store, "listing", waits)
        answer = here.collector.providing.etrn.answer
        # More than a pool of threads has on any machine.
        asking = [asyncio.create_task(answer("example.org", "mx")) for _ in range(40)]
        await here.until(looks.is_set)
        await asyncio.wait_for(asyncio.to_thread(int), 60)
        may_look.set()
        codes = [reply.code for reply in await asyncio.gather(*asking)]
        assert sorted(codes) == [250] * 39 + [253]

    in_the_world(salmon, work, accounts=accounts())


def test_a_store_that_cannot_be_read(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise OSError("the disk is gone")

    async def work(here: World) -> None:
        here.hold("b@example.org")
        monkeypatch.setattr(here.store, "listing", fails)
        [answer] = await here.ask("example.org")
        assert answer.startswith("458 4.3.0 unable to queue messages for node example.org")

    in_the_world(salmon, work, accounts=accounts())


# -- what is sent ------------------------------------------------------------------------------


def test_what_waits_for_the_domain_is_sent_and_is_gone(salmon: Salmon) -> None:
    taken: list[tuple[list[str], bytes]] = []

    async def home(server: Dialogue) -> None:
        await greet(server)
        taken.append(await take(server))
        taken.append(await take(server))
        await goodbye(server)

    async def work(here: World) -> None:
        here.hold("b@example.org", "c@sub.example.org", data=b"Subject: 1\r\n\r\n.one\r\n")
        here.hold("d@EXAMPLE.org")
        other = here.hold("e@sub.example.org")
        assert await here.ask("example.org") == [
            "253 2.0.0 OK, 2 pending messages for node example.org started"
        ]
        await here.until(lambda: len(here.held()) == 2)
        assert [one.envelope.recipients for one in here.held()] == [
            ("c@sub.example.org",),
            ("e@sub.example.org",),
        ]
        assert other in [one.key for one in here.held()]

    with_a_customer(salmon, work, home)
    assert taken == [
        (["<b@example.org>"], b"Subject: 1\r\n\r\n.one\r\n"),
        (["<d@EXAMPLE.org>"], MESSAGE),
    ]


def test_the_subdomains_too(salmon: Salmon) -> None:
    taken: list[list[str]] = []

    async def home(server: Dialogue) -> None:
        await greet(server)
        for _ in range(2):
            taken.append((await take(server))[0])
        await goodbye(server)

    async def work(here: World) -> None:
        here.hold("b@example.org")
        here.hold("c@sub.example.org")
        here.hold("d@xn--bcher-kva.example")
        [answer] = await here.ask("@example.org")
        assert answer.startswith("253 2.0.0 OK, 2 pending messages ")
        await here.until(lambda: len(here.held()) == 1)

    with_a_customer(salmon, work, home)
    assert taken == [["<b@example.org>"], ["<c@sub.example.org>"]]


def test_all_domains_of_an_account_are_all_that_it_has(salmon: Salmon) -> None:
    """Mail for the postmaster of this host has no domain."""
    taken: list[list[str]] = []

    async def home(server: Dialogue) -> None:
        await greet(server)
        taken.append((await take(server))[0])
        await goodbye(server)

    async def work(here: World) -> None:
        here.store.put([Arrival(Envelope("", ("postmaster",)), ("alone",), [MESSAGE])])
        [answer] = await here.ask("alone.example")
        assert answer.startswith("253 2.0.0 OK, 1 pending messages ")
        await here.until(lambda: not here.held("alone"))

    with_a_customer(salmon, work, home)
    assert taken == [["<postmaster>"]]


def test_the_number_of_messages_is_not_counted_for_long(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etrn, "LOOKED_AT", 2)

    async def work(here: World) -> None:
        here.hold("b@example.org")
        here.hold("b@example.org")
        here.hold("c@sub.example.org")
        assert await here.ask("example.org", "bücher.example") == [
            "252 2.0.0 OK, pending messages for node example.org started",
            "250 2.0.0 OK, queuing for node b?cher.example started",
        ]

    in_the_world(salmon, work, accounts=accounts())


def test_each_answer_is_settled_as_it_is(salmon: Salmon) -> None:
    async def home(server: Dialogue) -> None:
        await greet(server)
        for answer in ("250 taken", "451 later", "550 never"):
            await take(server, answer)
            if answer[0] != "2":
                await server.asks("RSET", "250 ok")
        await goodbye(server)

    async def work(here: World) -> None:
        for name in ("good", "later", "never"):
            here.hold(f"{name}@example.org")
        await here.ask("example.org")
        await here.until(lambda: len(here.held()) == 1)
        await here.until(lambda: bool(salmon.relayed))

    with_a_customer(salmon, work, home)
    [(_, to, report)] = salmon.relayed
    assert to == "a@example.net"
    assert "never@example.org" in report and "550 never" in report


def test_a_large_message_of_dots_goes_to_a_server_without_chunking(salmon: Salmon) -> None:
    """A piece of it, with the dots that DATA adds, is more than is written at a time."""
    taken: list[bytes] = []
    data = b"Subject: x\r\n\r\n" + (b".\r\n" + b"x" * 1000 + b"\r\n") * 600

    async def home(server: Dialogue) -> None:
        await greet(server)
        taken.append((await take(server))[1])
        await goodbye(server)

    async def work(here: World) -> None:
        here.hold("b@example.org", data=data)
        await here.ask("example.org")
        await here.until(lambda: not here.held())

    with_a_customer(salmon, work, home)
    assert taken == [data]


def test_a_second_request_meanwhile_starts_nothing_more(salmon: Salmon) -> None:
    begun, asked = asyncio.Event(), asyncio.Event()

    async def home(server: Dialogue) -> None:
        await greet(server)
        begun.set()
        await asked.wait()
        await take(server, "451 later")
        await server.asks("RSET", "250 ok")
        await goodbye(server)

    async def work(here: World) -> None:
        here.hold("b@example.org")
        await here.ask("example.org")
        await begun.wait()
        again = await here.ask("example.org", "@example.org")
        assert again == [
            "250 2.0.0 OK, queuing for node example.org started",
            "253 2.0.0 OK, 1 pending messages for node @example.org started",
        ]
        asked.set()
        await here.until(lambda: bool(here.held()[0].reason))

    with_a_customer(salmon, work, home)


def test_what_has_come_since_goes_with_it_when_it_is_asked_for(salmon: Salmon) -> None:
    taken: list[bytes] = []
    begun, asked = asyncio.Event(), asyncio.Event()

    async def home(server: Dialogue) -> None:
        await greet(server)
        begun.set()
        await server.asks("MAIL", "250 ok")
        await asked.wait()
        await server.asks("RCPT", "250 ok")
        await server.asks("DATA", "354 go on")
        while (await server.hear()) != ".":
            pass
        server.say("250 taken")
        taken.append((await take(server))[1])
        await goodbye(server)

    async def work(here: World) -> None:
        here.hold("b@example.org")
        await here.ask("example.org")
        await begun.wait()
        await here.until(
            lambda: here.collector.providing.etrn._orders["acme"].hand_over is not None
        )
        here.hold("b@example.org", data=b"Subject: second\r\n\r\nx\r\n")
        [answer] = await here.ask("example.org")
        assert answer.startswith("250 ")
        asked.set()
        await here.until(lambda: not here.held())

    with_a_customer(salmon, work, home)
    assert taken == [b"Subject: second\r\n\r\nx\r\n"]


def test_what_is_asked_for_meanwhile_goes_down_the_same_connection(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etrn, "LINGER", 20.0)
    taken: list[list[str]] = []

    async def home(server: Dialogue) -> None:
        await greet(server)
        taken.append((await take(server))[0])
        taken.append((await take(server))[0])
        await goodbye(server)

    async def work(here: World) -> None:
        here.hold("b@example.org")
        here.hold("c@sub.example.org")
        await here.ask("example.org")
        await here.until(lambda: len(here.held()) == 1)
        [answer] = await here.ask("sub.example.org")
        assert answer.startswith("253 ")
        await here.until(lambda: not here.held())

    with_a_customer(salmon, work, home)
    assert taken == [["<b@example.org>"], ["<c@sub.example.org>"]]


def test_what_the_customer_defers_is_not_sent_again_before_the_next_delivery(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often anyone asks for it while the connection stays open for other domains."""
    monkeypatch.setattr(etrn, "LINGER", 1.0)

    async def home(server: Dialogue) -> None:
        await greet(server)
        await take(server, "451 later")
        await server.asks("RSET", "250 ok")
        await goodbye(server)

    async def work(here: World) -> None:
        here.hold("b@example.org")
        await here.ask("example.org")
        await here.until(lambda: bool(here.held()[0].reason))
        [answer] = await here.ask("example.org")
        assert answer.startswith("253 ")
        await here.until(lambda: here.collector.providing.etrn._orders["acme"].call is None)

    with_a_customer(salmon, work, home)


def test_the_next_delivery_begins_a_while_after_the_last(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etrn, "EVERY", 1.0)
    began: list[float] = []

    async def home(server: Dialogue) -> None:
        began.append(asyncio.get_running_loop().time())
        await greet(server)
        await take(server)
        await goodbye(server)

    async def work(here: World) -> None:
        for _ in range(2):
            here.hold("b@example.org")
            codes = [line[:3] for line in await here.ask("example.org", "example.org")]
            assert codes == ["253", "250"]
            await here.until(lambda: not here.held())
            await here.until(lambda: here.collector.providing.etrn._orders["acme"].call is None)

    with_a_customer(salmon, work, home, home)
    assert began[1] - began[0] > 0.8


def test_who_asks_while_an_attempt_fails_gets_another(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection may lead to where the customer was before it asked."""
    monkeypatch.setattr(etrn, "EVERY", 0.5)
    begun, asked = asyncio.Event(), asyncio.Event()

    async def gone(server: Dialogue) -> None:
        begun.set()
        await asked.wait()
        server.abort()

    async def work(here: World) -> None:
        here.hold("b@example.org")
        await here.ask("example.org")
        await begun.wait()
        [answer] = await here.ask("example.org")
        assert answer.startswith("250 ")
        asked.set()
        await here.until(lambda: not here.held())

    with_a_customer(salmon, work, gone, take_one)


def test_an_address_where_no_one_is(salmon: Salmon, caplog: pytest.LogCaptureFixture) -> None:
    async def work(here: World) -> None:
        here.hold("b@example.org")
        [answer] = await here.ask("example.org")
        assert answer.startswith("253 ")
        await here.until(lambda: "Connection refused" in caplog.text)
        [held] = here.held()
        assert (held.state, held.strikes) == (State.WAITING, 0)

    in_the_world(salmon, work, accounts=accounts("127.0.0.1:1"))
    assert "account=acme to=127.0.0.1:1 sending its mail, as ETRN asked: 127.0.0.1: " in caplog.text


@pytest.mark.parametrize("greeting", ["554 go away", "421 busy", "HTTP/1.1 400 Bad Request", ""])
def test_a_server_that_is_none(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, greeting: str
) -> None:
    async def home(server: Dialogue) -> None:
        if greeting:
            server.say(greeting)
            await server.ignore()

    async def work(here: World) -> None:
        here.hold("b@example.org")
        await here.ask("example.org")
        await here.until(lambda: "as ETRN asked: " in caplog.text)
        assert (here.held()[0].state, here.held()[0].strikes) == (State.WAITING, 0)

    with_a_customer(salmon, work, home)
    assert greeting in caplog.text


def test_a_message_over_which_the_session_breaks_is_set_aside(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etrn, "EVERY", 0.0)

    async def home(server: Dialogue) -> None:
        await greet(server)
        await server.hear("MAIL")
        server.abort()

    async def work(here: World) -> None:
        key = here.hold("b@example.org")
        order = here.collector.providing.etrn._orders
        for strikes in range(1, MOST_STRIKES + 1):
            await here.ask("example.org")
            await here.until(lambda: order["acme"].task is None)
            assert here.held()[0].strikes == strikes
        [held] = here.held()
        assert (held.key, held.state) == (key, State.ASIDE)
        [answer] = await here.ask("example.org")
        assert answer.startswith("251 ")

    with_a_customer(salmon, work, *[home] * MOST_STRIKES)


def test_what_is_under_way_when_the_store_fails_is_not_sent_by_two_at_once(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is dropped before the message is anyone's again, and has no strike for it."""
    monkeypatch.setattr(etrn, "EVERY", 0.0)
    monkeypatch.setattr(etrn, "SETTLING", 60.0)
    fails, may_settle = threading.Event(), threading.Event()

    async def cut(server: Dialogue) -> None:
        await greet(server, "PIPELINING", "CHUNKING")
        for _ in range(2):
            while not (await server.hear()).startswith("BDAT "):
                pass
            await server.reader.readexactly(len(MESSAGE))
        server.say("250 ok", "250 ok", "250 taken")
        await here_is[0].until(lambda: settling == [1])
        fails.set()
        await server.ignore()
        may_settle.set()

    here_is: list[World] = []
    settling: list[int] = []

    async def work(here: World) -> None:
        here_is.append(here)
        first, second = here.hold("b@example.org"), here.hold("c@example.org")
        feed, settle = here.store.feed, here.store.settle

        def feeds(*arguments: Any) -> Feed:
            made = feed(*arguments)
            return made if fails.is_set() else FeedThatFails(made, fails)

        def settles(done: Sequence[Settled]) -> None:
            settling.append(len(done))
            assert may_settle.wait(30)
            settle(done)

        monkeypatch.setattr(here.store, "feed", feeds)
        monkeypatch.setattr(here.store, "settle", settles)
        await here.ask("example.org")
        await here.until(may_settle.is_set)
        await here.until(lambda: here.collector.providing.etrn._orders["acme"].task is None)
        [held] = here.held()
        assert (held.key, held.strikes, held.reason) == (second, 0, "") and held.key != first
        await here.ask("example.org")
        await here.until(lambda: not here.held())

    with_a_customer(salmon, work, cut, take_one)


class FeedThatFails:
    """A feed of a store that cannot be read any more when the first messages are under way."""

    def __init__(self, feed: Feed, fails: threading.Event) -> None:
        self._feed, self._fails, self._took = feed, fails, False
        self.leave, self.start_over, self.close = feed.leave, feed.start_over, feed.close
        self.has = feed.has

    def take(self, messages: int, octets: int) -> Sequence[Held]:
        if self._took:
            assert self._fails.wait(30)
            raise OSError("the disk is gone")
        self._took = True
        return self._feed.take(messages, octets)


def test_a_session_that_breaks_lets_go_of_its_mail_whatever_fails_beside(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etrn, "EVERY", 0.0)

    async def breaks(server: Dialogue) -> None:
        await greet(server)
        await server.hear("MAIL")
        server.abort()

    def no_thread(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def work(here: World) -> None:
        here.hold("b@example.org")
        monkeypatch.setattr(here.store, "strike", no_thread)
        await here.ask("example.org")
        await here.until(lambda: here.collector.providing.etrn._orders["acme"].task is None)
        await here.ask("example.org")
        await here.until(lambda: not here.held())

    with_a_customer(salmon, work, breaks, take_one)


def test_no_one_waits_while_a_large_message_of_strange_lines_is_made_ready(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line ends of 50 MB are a second's work, and anyone may send such mail."""
    line, lines, looked_at = b"x" * 1000 + b"\0", 300, set[threading.Thread]()
    taken: list[bytes] = []
    with_crlf, hides_an_end = content._with_crlf, content._hides_an_end

    async def home(server: Dialogue) -> None:
        await greet(server)
        taken.append((await take(server))[1])
        await goodbye(server)

    async def work(here: World) -> None:
        for name, real in (("_with_crlf", with_crlf), ("_hides_an_end", hides_an_end)):
            monkeypatch.setattr(content, name, noting_the_thread(real, looked_at))
        here.hold("b@example.org", data=b"Subject: x\r\n\r\n" + (b"\n.\r" + line) * lines)
        await here.ask("example.org")
        await here.until(lambda: not here.held())

    with_a_customer(salmon, work, home)
    assert taken == [b"Subject: x\r\n\r\n" + (b"\r\n.\r\n" + line) * lines + b"\r\n"]
    assert looked_at and threading.main_thread() not in looked_at


def noting_the_thread(
    work: Callable[[bytes], Any], threads: set[threading.Thread]
) -> Callable[[bytes], Any]:
    def noted(data: bytes) -> Any:
        threads.add(threading.current_thread())
        return work(data)

    return noted


# -- TLS ---------------------------------------------------------------------------------------


async def one_message(here: World) -> None:
    here.hold("b@example.org")
    await here.ask("example.org")
    await here.until(lambda: not here.held())


def test_it_is_encrypted_where_that_is_offered_whoever_it_is(salmon: Salmon) -> None:
    async def home(server: Dialogue) -> None:
        await greet(server, "STARTTLS", "PIPELINING")
        await server.asks("STARTTLS", "220 go ahead")
        await server.starttls(server_tls())
        await server.asks("EHLO mx.example.net", "250 home.example.org")
        assert (await take(server))[1] == MESSAGE
        await server.asks("QUIT", "221 bye")

    with_a_customer(salmon, one_message, home)


def test_a_server_that_says_no_to_tls_gets_it_in_the_clear(salmon: Salmon) -> None:
    async def home(server: Dialogue) -> None:
        await greet(server, "STARTTLS")
        await server.asks("STARTTLS", "454 not now")
        await take(server)
        await goodbye(server)

    with_a_customer(salmon, one_message, home)


def test_a_server_whose_tls_fails_is_called_again_in_the_clear(salmon: Salmon) -> None:
    async def broken(server: Dialogue) -> None:
        await greet(server, "STARTTLS")
        await server.asks("STARTTLS", "220 go ahead")
        await server.reader.read(1)
        server.say("this is no TLS")
        await server.ignore()

    async def home(server: Dialogue) -> None:
        await greet(server, "STARTTLS")
        await take(server)
        await goodbye(server)

    with_a_customer(salmon, one_message, broken, home)


# -- beside it ---------------------------------------------------------------------------------


def test_a_stop_finishes_what_is_under_way_and_leaves_the_rest(salmon: Salmon) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def home(server: Dialogue) -> None:
        await greet(server)
        await server.asks("MAIL", "250 ok")
        await server.asks("RCPT", "250 ok")
        await server.asks("DATA", "354 go on")
        while (await server.hear()) != ".":
            pass
        begun.set()
        await stopped.wait()
        server.say("250 taken")
        await goodbye(server)

    left: list[Held] = []

    async def main() -> None:
        async with (
            scripted(home) as port,
            world(salmon, accounts=accounts(f"127.0.0.1:{port}")) as here,
        ):
            first = here.hold("b@example.org")
            here.hold("c@example.org")
            await here.ask("example.org")
            await begun.wait()
            here.daemon.stop()
            await here.until(lambda: here.collector.providing.etrn._stopping)
            stopped.set()
            await here.until(lambda: first not in [one.key for one in here.held()])
            left.extend(here.held())

    asyncio.run(main())
    assert [one.envelope.recipients for one in left] == [("c@example.org",)]


def test_our_own_agent_and_our_own_service(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in one process: it asks, and the mail is in the handler."""
    salmon.handle("good@.*")

    def never(message: MailRequest) -> None:
        raise SMTPError(550, "never")

    salmon.handle("never@.*", never)
    tls: dict[str, Any] = {"tls_cert": str(CERTIFICATE), "tls_key": str(PRIVATE_KEY)}

    async def main() -> None:
        domains = ["example.org", "sub.example.org"]
        async with (
            listener(salmon, domains=domains, **tls) as service,
            world(salmon, accounts=accounts(f"localhost:{service.port}"), **tls) as here,
        ):
            for number in range(50):
                here.hold("good@example.org", data=b"Subject: %d\r\n\r\nx\r\n" % number)
            here.hold("good@sub.example.org", "never@sub.example.org")
            keys = etrn_keys(here.mx, "example.org", "sub.example.org", "example.net")
            keys["tls"] = "opportunistic"
            [report] = await collect(salmon, keys)
            assert report.outcome is Outcome.REFUSED
            assert report.error is not None and "459" in report.error
            assert "253 2.0.0 OK, 50 pending messages for node example.org" in report.answers[0]
            assert report.answers[1].partition(": ")[2][:4] == "253 "
            await here.until(lambda: not here.held())
            keys["domains"] = ["example.org", "@sub.example.org"]
            [report] = await collect(salmon, keys)
            assert report.outcome is Outcome.NO_MAIL

    asyncio.run(main())
    assert len([one for one in salmon.handled if one.To.startswith("good@")]) == 51


def test_a_push_session_gets_what_the_other_way_left(salmon: Salmon) -> None:
    """Both for one account: no message goes both ways at a time, and none is forgotten."""
    salmon.handle(".*")
    offered = asyncio.Event()
    pushed = asyncio.Event()

    async def home(server: Dialogue) -> None:
        await greet(server)
        await server.asks("MAIL", "250 ok")
        offered.set()
        await pushed.wait()
        await server.asks("RCPT", "421 closing")

    async def work(here: World) -> None:
        here.hold("b@example.org", data=b"Subject: first\r\n\r\nx\r\n")
        await here.ask("example.org")
        await offered.wait()
        plugins = Plugins.load()
        valid = configuration(agent_keys(here.odmr, server="127.0.0.1", push=True), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as customer:
            collection = customer.collection(valid.agents[0])
            collection.may_push = True
            running = asyncio.create_task(customer.run(valid.agents[0], collection))
            await here.until(lambda: collection.pushing)
            here.hold("b@example.org", data=b"Subject: second\r\n\r\nx\r\n")
            await here.until(lambda: len(salmon.handled) == 1)
            pushed.set()
            await here.until(lambda: len(salmon.handled) == 2)
            await here.until(lambda: not here.held())
            collection.stop()
            await running

    with_a_customer(salmon, work, home)
    assert [one["Subject"] for one in salmon.handled] == ["second", "first"]
