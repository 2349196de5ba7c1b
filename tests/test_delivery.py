"""What becomes of a message in Salmon, and what the provider hears of it."""

from __future__ import annotations

import asyncio
import contextlib
import email
import errno
import gc
import io
import logging
import smtplib
import sqlite3
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from email import policy
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import Router
from salmon.server import SMTPError, SMTPReceiver
from support.collecting import collect, exchange
from support.configuration import DEFAULT, agent_keys
from support.dialogue import Dialogue, Script, no_more_mail, scripted
from support.messages import MESSAGE
from support.salmon import Salmon, explodes, fails, waits_for

from salmon_revsmtp import Agent, Envelope, QueueConsumer, Reply, hookimpl
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery import batches as rounds
from salmon_revsmtp.delivery import dispatcher as dispatcher
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.smtp.envelope import Client


@pytest.mark.parametrize(
    ("code", "text", "reply"),
    [
        (550, "no such user", "550 5.0.0 no such user"),
        (550, "5.1.1 no such user", "550 5.1.1 no such user"),
        (451, "not\r\nnow", "451 4.0.0 not now"),
        (999, "strange", "451 4.3.0 handler error: strange"),
    ],
)
def test_a_handlers_smtp_error_becomes_its_reply(
    salmon: Salmon, code: int, text: str, reply: str
) -> None:
    salmon.handle(".*", fails(code, text))
    heard, report = exchange(salmon, "b@example.org")
    assert heard == [reply]
    assert (report.messages, report.refused) == (0, 1)
    assert salmon.undeliverable() == []


def test_a_handlers_exception_goes_to_the_undeliverable_queue_and_nowhere_else(
    salmon: Salmon,
) -> None:
    salmon.handle(".*", explodes)
    salmon.handle("b@.*", explodes)  # a second handler for the same message raises, too
    heard, report = exchange(salmon, "b@example.org")
    assert heard[0].startswith("250 ")
    assert report.messages == 1
    [kept] = salmon.undeliverable()
    assert kept.startswith(
        b"Return-Path: <ann@example.net>\nDelivered-To: b@example.org\n"
        b"X-Undeliverable-Reason: a handler raised RuntimeError: handler bug (salmon.py, line "
    )
    assert b"\nReceived: from " in kept and kept.endswith(b"Subject: hi\n\n.hello")


def test_with_salmons_exceptions_raised_it_is_kept_once_all_the_same(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Router, "LOG_EXCEPTIONS", False)
    salmon.handle(".*", explodes)
    heard, _ = exchange(salmon, "b@example.org")
    assert heard[0].startswith("250 ")
    assert len(salmon.undeliverable()) == 1


def test_a_handler_that_wants_to_end_the_process(salmon: Salmon) -> None:
    def leave(message: MailRequest) -> None:
        raise SystemExit(1)

    salmon.handle(".*", leave)
    heard, _ = exchange(salmon, "b@example.org")
    assert heard[0].startswith("250 ")
    assert len(salmon.undeliverable()) == 1


def test_mail_that_no_handler_takes_is_kept(salmon: Salmon) -> None:
    salmon.handle("other@.*")
    heard, _ = exchange(salmon, "b@example.org")
    assert heard[0].startswith("250 ")
    assert len(salmon.undeliverable()) == 1


def test_a_message_that_salmons_parser_rejects_is_kept_as_it_came(salmon: Salmon) -> None:
    salmon.handle(".*")
    data = b"From: =?x?b?/w?=\r\nSubject: caf\xe9\r\n\r\nhello\r\n"
    heard, _ = exchange(salmon, "b@example.org", data=data, sender="")
    assert heard[0].startswith("250 ")
    assert salmon.handled == []
    [kept] = salmon.undeliverable()
    assert kept.endswith(b"From: =?x?b?/w?=\nSubject: caf\xe9\n\nhello")


def test_without_an_undeliverable_queue_one_is_made(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", None)
    heard, _ = exchange(salmon, "b@example.org")
    assert heard[0].startswith("250 ")
    assert len(salmon.undeliverable()) == 1


@pytest.mark.parametrize("left", [(), ("tmp",), ("tmp", "new")])
def test_an_undeliverable_queue_in_the_making_of_which_a_process_died(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, left: tuple[str, ...]
) -> None:
    for part in ("tmp", "new", "cur"):
        if part not in left:
            (Path("run/undeliverable") / part).rmdir()
    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", queue.Queue("run/undeliverable"))
    heard, _ = exchange(salmon, "b@example.org")
    assert heard[0].startswith("250 ")
    assert len(salmon.undeliverable()) == 1


@pytest.mark.parametrize(("number", "reply"), [(errno.ENOSPC, "452 4.3.1"), (errno.EIO, "451 4")])
def test_undeliverable_mail_that_cannot_be_kept_stays_with_the_provider(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, number: int, reply: str
) -> None:
    def push(message: object) -> str:
        raise OSError(number, "disk")

    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", SimpleNamespace(push=push))
    salmon.handle("boom@.*", explodes)
    for recipient in ("boom@example.org", "nobody@example.org"):
        heard, report = exchange(salmon, recipient)
        assert heard[0].startswith(reply)
        assert report.messages == 0


def test_mail_of_salmons_own_receivers_is_not_touched(salmon: Salmon) -> None:
    exchange(salmon, "b@example.org")
    assert len(salmon.undeliverable()) == 1
    Router.deliver(MailRequest("peer", "x@example.net", "y@example.org", MESSAGE.decode()))
    assert len(salmon.undeliverable()) == 2


def test_the_null_reverse_path_as_salmon_has_it(salmon: Salmon) -> None:
    salmon.handle(".*")
    exchange(salmon, "b@example.org", sender="")
    assert salmon.handled[0].From == "Ann <ann@example.net>"


def test_the_envelope_decides_the_recipient_not_the_header(salmon: Salmon) -> None:
    salmon.handle(".*")
    exchange(salmon, '"strange <x"@example.org')
    assert salmon.handled[0].To == '"strange <x"@example.org'


def test_data_is_what_salmons_own_receiver_passes(salmon: Salmon) -> None:
    """The same bytes, once through Salmon's SMTPReceiver and once collected."""
    from salmon._vendor import asyncore

    salmon.handle(".*")
    data = b"From: a@example.net\r\nSubject: x\r\n\r\n.dot\r\nbare\rcr\r\n\r\ncaf\xe9\r\n\r\n"
    receiver = SMTPReceiver("127.0.0.1", 0)
    address = receiver.socket.getsockname()
    try:
        client = smtplib.SMTP()
        raw = b"\r\n".join(b"." + one if one[:1] == b"." else one for one in data.split(b"\r\n"))

        def send() -> None:
            client.connect(*address)
            for command in ("HELO x", "MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>"):
                client.docmd(command)
            client.docmd("DATA")
            client.send(raw + b".\r\n")
            client.getreply()
            client.quit()

        thread = threading.Thread(target=send)
        thread.start()
        while thread.is_alive():
            asyncore.loop(timeout=0.05, use_poll=True, count=1)
        thread.join()
    finally:
        asyncore.close_all()
    exchange(salmon, "b@example.org", data=data, sender="a@example.net")
    theirs, ours = salmon.handled
    assert ours.Data.partition(b"From: ")[2] == theirs.Data.partition(b"From: ")[2]
    assert type(ours.Data) is type(theirs.Data)
    assert (ours.From, ours.To, type(ours.Peer)) == (theirs.From, theirs.To, type(theirs.Peer))


# -- several recipients ------------------------------------------------------------------------


def test_each_recipient_is_one_mail_request(salmon: Salmon) -> None:
    salmon.handle(".*")
    heard, report = exchange(salmon, "a@example.org", "b@example.org", "A@example.org")
    assert heard[0].startswith("250 ")
    assert [message.To for message in salmon.handled] == [
        "a@example.org",
        "b@example.org",
        "a@example.org",
    ]
    assert (report.messages, report.recipients) == (1, 3)


SPELLINGS = [
    "b\u00fccher.example",
    "B\u00dcCHER.Example.",
    "xn--bcher-kva.example",
    "XN--BCHER-KVA.example.",
]


@pytest.mark.parametrize("written", ["B\u00fccher.example", "xn--bcher-kva.example."])
@pytest.mark.parametrize("named_by", ["agent", "service"])
@pytest.mark.parametrize("delivery", ["router", "queue"])
def test_every_accepted_spelling_of_a_domain_is_routed_as_the_settings_have_it(
    salmon: Salmon, written: str, named_by: str, delivery: str
) -> None:
    form = written.lower().rstrip(".")
    salmon.handle(f"[^@]+@{form}$")
    salmon.handle(r"[^@]+@customer\.example$")
    names = [written, "Customer.example"]
    recipients = [f"x{n}@{one}" for n, one in enumerate(SPELLINGS)] + ["bob@CUSTOMER.example."]
    agent = {"domains": ["example.org"] if named_by == "service" else names}
    service: dict[str, Any] = {"domains": names} if named_by == "service" else {}
    heard, report = exchange(
        salmon,
        *recipients,
        mail=" SMTPUTF8 PRDR",
        agent=agent,
        delivery=delivery,
        **service,
    )
    assert [line[:3] for line in heard] == ["353", *["250"] * 5, "250"]
    assert report.recipients == 5
    if delivery == "queue":
        QueueConsumer().start(one_shot=True)
    expected = [f"x{n}@{form}" for n in range(4)] + ["bob@customer.example"]
    assert sorted(message.To for message in salmon.handled) == sorted(expected)
    assert salmon.undeliverable() == []


def test_one_mailbox_in_two_spellings_is_served_once(salmon: Salmon) -> None:
    """In one message, and when it is redelivered."""
    salmon.handle("b@example.org$")
    first, _ = exchange(salmon, "b@example.org.", "b@EXAMPLE.ORG")
    again, _ = exchange(salmon, "b@Example.Org")
    assert [line[:3] for line in first + again] == ["250", "250"]
    assert [message.To for message in salmon.handled] == ["b@example.org"]


@pytest.mark.parametrize(
    ("written", "given", "routed"),
    [
        (["*"], "x@B\u00fccher.example.", "x@xn--bcher-kva.example"),
        (["*"], "x@Stra\u00dfe.example.", "x@stra\u00dfe.example"),
        (["*"], "x@[IPv6:2001:DB8::1]", "x@[ipv6:2001:db8::1]"),
        (["@B\u00fccher.example"], "x@Sub.xn--bcher-kva.example.", "x@sub.b\u00fccher.example"),
        (["xn--bcher-kva.example", "b\u00fccher.example"], "x@b\u00fccher.example", None),
        (["example.org"], "Postmaster", "Postmaster"),
        (["example.org"], '"a@B"@EXAMPLE.org', '"a@B"@example.org'),
    ],
)
def test_how_a_recipient_is_spelled(written: list[str], given: str, routed: str | None) -> None:
    service = Service("x", ServiceSettings(), written)
    assert service.spell(given) == (routed or "x@xn--bcher-kva.example")


def test_with_prdr_each_recipient_has_its_reply(salmon: Salmon) -> None:
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(451, "later"))
    salmon.handle("c@.*", fails(550, "never"))
    heard, report = exchange(
        salmon, "a@example.org", "b@example.org", "c@example.org", mail=" PRDR"
    )
    assert [line[:3] for line in heard] == ["353", "250", "451", "550", "250"]
    assert (report.messages, report.recipients, report.refused) == (1, 1, 2)
    assert salmon.relayed == []


def test_a_temporary_failure_is_retried_for_the_unserved_only(salmon: Salmon) -> None:
    trouble = [SMTPError(451, "later")]

    def sometimes(message: MailRequest) -> None:
        if trouble:
            raise trouble.pop()

    salmon.handle("a@.*")
    salmon.handle("b@.*", sometimes)
    heard, report = exchange(salmon, "a@example.org", "b@example.org", times=2)
    assert [line[:3] for line in heard] == ["451", "250"]
    assert [message.To[0] for message in salmon.handled] == ["a", "b", "b"]
    assert report.recipients == 2


def test_after_a_restart_the_retry_serves_only_the_unserved(salmon: Salmon) -> None:
    ready: list[bool] = []

    def not_yet(message: MailRequest) -> None:
        if not ready:
            raise SMTPError(451, "later")

    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550, "5.1.1 no b here"))
    salmon.handle("c@.*", not_yet)
    everyone = ("a@example.org", "b@example.org", "c@example.org")
    heard, report = exchange(salmon, *everyone)
    assert (heard[0][:3], report.recipients) == ("451", 1)
    assert salmon.relayed == [], "the provider has not let go of it yet"
    ready.append(True)
    heard, report = exchange(salmon, *everyone)
    assert (heard[0][:3], report.recipients) == ("250", 1)
    assert [message.To[0] for message in salmon.handled] == ["a", "b", "c", "c"]
    [(_, _, text)] = salmon.relayed
    assert "b@example.org" in text and "c@example.org" not in text


def test_a_repeat_is_answered_as_before_and_not_handled_again(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    salmon.handle("a@.*")
    heard, report = exchange(salmon, "a@example.org", times=3)
    assert [line[:3] for line in heard] == ["250", "250", "250"]
    assert len(salmon.handled) == 1
    assert report.messages == 1
    said = [line for line in caplog.messages if "to=<a@example.org>" in line]
    assert [line.endswith("reply='250 2.0.0 delivered' repeat") for line in said] == [0, 1, 1]
    heard, report = exchange(salmon, "a@example.org")
    assert (heard[0][:3], report.messages) == ("250", 0)
    assert len(salmon.handled) == 1


def test_a_repeat_of_a_sender_that_is_no_utf8_is_known(salmon: Salmon) -> None:
    class Archive(Agent):
        """Reads its envelopes from files, as the octets are."""

        protocol = "archive"
        domains = ("example.org",)

        async def collect(self, collection: Collection) -> Outcome:
            sender = b"j\xfcrgen@example.net".decode("utf-8", "surrogateescape")
            [reply] = await collection.deliver(Envelope(sender, ("b@example.org",)), MESSAGE)
            assert reply.positive, reply
            return Outcome.COLLECTED

    class Plugin:
        @hookimpl
        def register_agent_types(self, register: Any) -> None:
            register(Archive)

    salmon.handle(".*")
    plugins = Plugins.load()
    plugins.register(Plugin())
    for _ in range(2):
        agent = {"name": "old", "protocol": "archive"}
        [report] = asyncio.run(collect(salmon, agent, plugins=plugins, default=DEFAULT))
        assert (report.outcome, report.error) == (Outcome.COLLECTED, None)
    assert len(salmon.handled) == 1


def test_a_refusal_is_repeated_as_before(salmon: Salmon) -> None:
    salmon.handle("a@.*", fails(550, "5.1.1 no a here"))
    for _ in range(2):
        heard, _ = exchange(salmon, "a@example.org")
        assert heard == ["550 5.1.1 no a here"]
    assert len(salmon.handled) == 1


def test_behind_the_window_a_repeat_is_handled_again(salmon: Salmon) -> None:
    salmon.handle("a@.*")
    for _ in range(2):
        heard, _ = exchange(salmon, "a@example.org", repeat_window=1e-9)
        assert heard[0].startswith("250 ")
    assert len(salmon.handled) == 2


# -- slow handlers -----------------------------------------------------------------------------


class Slow:
    """A handler that waits to be let go, for messages that say so."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Event()

    def __call__(self, message: MailRequest) -> None:
        if b"slow" in message.Data:
            self.began.set()
            if not self.go.wait(60):
                raise SMTPError(554, "no one has let it go")


def slowly(salmon: Salmon, script: Script, **service: Any) -> Report:
    """Collect from a provider that follows a script, with a short ``handler_timeout``."""
    keys = {**DEFAULT, "handler_timeout": 1.5, **service}

    async def main() -> Report:
        async with scripted(script, no_more_mail) as port:
            [report] = await collect(salmon, agent_keys(port), default=keys)
        return report

    return asyncio.run(main())


SLOW = MESSAGE.replace(b"hello", b"slow")


def test_a_slow_handler_is_deferred_and_its_late_success_not_repeated(salmon: Salmon) -> None:
    slow = Slow()
    salmon.handle(".*", slow)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(SLOW)).startswith("451 4.3.0 ")
        slow.go.set()
        assert (await provider.send(SLOW)).startswith("250 ")
        await provider.quit()

    report = slowly(salmon, script)
    assert len(salmon.handled) == 1
    assert report.outcome is Outcome.COLLECTED
    assert salmon.undeliverable() == []


def test_what_waits_after_a_slow_handler_is_deferred_unhandled(salmon: Salmon) -> None:
    slow = Slow()
    salmon.handle(".*", slow)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(SLOW)).startswith("451 ")
        assert (await provider.send(MESSAGE)).startswith("451 ")
        slow.go.set()
        assert (await provider.send(SLOW)).startswith("250 ")
        assert (await provider.send(MESSAGE)).startswith("250 ")
        await provider.quit()

    slowly(salmon, script)
    assert [b"slow" in message.Data for message in salmon.handled] == [True, False]


@pytest.mark.parametrize(("with_others", "threads"), [(False, 1), (True, 1), (False, 2)])
def test_what_a_hanging_handler_leaves_unanswered_lets_its_data_go(
    salmon: Salmon, with_others: bool, threads: int
) -> None:
    """Whether the provider sends the same message again and again, or others after it."""
    slow, held = Slow(), []
    salmon.handle(".*", slow)
    size, times = 2**20, 20

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        for _ in range(100):  # on a busy machine its time may be up before its turn comes
            await provider.send(SLOW)
            if slow.began.is_set():
                break
        assert slow.began.is_set()
        gc.collect()
        tracemalloc.start()
        for number in range(times):
            line = b"x" * 1022 + b"\r\n"
            subject = b"Subject: slow %d\r\n\r\n" % (number if with_others else 0)
            assert (await provider.send(subject + line * (size // 1024))).startswith("451 ")
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        slow.go.set()
        await provider.quit()

    async def main() -> None:
        async with scripted(script) as port:
            service = {**DEFAULT, "handler_timeout": 0.05, "delivery_threads": threads}
            await collect(salmon, agent_keys(port), default=service)

    asyncio.run(main())
    # A second thread has the first of them in hand, and no more.
    assert held[0] < 3.5 * size, held
    assert len(salmon.handled) == threads, "no other is handled when the handler returns"


def test_with_prdr_a_slow_handler_puts_off_its_own_recipient_only(salmon: Salmon) -> None:
    slow = Slow()
    salmon.handle("a@.*")
    salmon.handle("b@.*", slow)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        codes = []
        for recipients in (["a", "b", "c"], ["b", "c"]):
            provider.say("MAIL FROM:<ann@example.net> PRDR")
            for name in recipients:
                provider.say(f"RCPT TO:<{name}@example.org>")
            for _ in ("MAIL", *recipients):
                await provider.replied(250)
            provider.say(b"BDAT %d LAST\r\n%s" % (len(SLOW), SLOW[:-2]))
            codes.append([(await provider.hear())[:3] for _ in ("353", *recipients, "all")])
            slow.go.set()
        await provider.quit()
        assert codes == [["353", "250", "451", "451", "250"], ["353", "250", "250", "250"]]

    report = slowly(salmon, script)
    assert [message.To[0] for message in salmon.handled] == ["a", "b"]
    assert len(salmon.undeliverable()) == 1, "c, which no handler takes"
    assert report.recipients == 2


def test_the_handler_that_is_late_is_waited_for_before_the_process_ends(salmon: Salmon) -> None:
    slow = Slow()
    salmon.handle(".*", slow)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(SLOW)).startswith("451 ")
        threading.Timer(0.3, slow.go.set).start()
        await provider.quit()

    async def main() -> Report:
        async with scripted(script) as port:
            keys = {**DEFAULT, "handler_timeout": 0.1}
            [report] = await collect(salmon, agent_keys(port), default=keys)
        return report

    report = asyncio.run(main())
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "451" in report.error
    heard, _ = exchange(salmon, "b@example.org", data=SLOW, sender="a@example.net")
    assert heard[0].startswith("250 ")
    assert len(salmon.handled) == 1


def at_once(
    salmon: Salmon,
    *transactions: bytes,
    until: threading.Event | None = None,
    plugins: Plugins | None = None,
    **service: Any,
) -> list[str]:
    """Collect from a provider that sends messages in one piece, of which those behind the first
    are delivered in one round; returns the answers to the data.

    ``until``  is set when all but the last one have been answered.
    """
    first = transaction(b"Subject: first\r\n\r\nx\r\n", "first@example.org")
    loop: list[asyncio.AbstractEventLoop] = []

    def waits(message: MailRequest) -> None:
        # Until the event loop, which is reading what was sent, has nothing more to do.
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop[0]).result(20)

    salmon.handle("first@.*", waits)
    answers: list[str] = []

    async def script(provider: Dialogue) -> None:
        loop.append(asyncio.get_running_loop())
        await provider.reverse()
        provider.say(b"".join((first, *transactions)) + b"NOOP")
        while len(answers) <= len(transactions):
            line = await provider.hear()
            if not line.startswith("250 2.1."):  # to MAIL or RCPT
                answers.append(line)
            if until is not None and len(answers) == len(transactions):
                until.set()
        await provider.hear("250 2.0.0 ok")
        await provider.quit()

    async def main() -> None:
        async with scripted(script, no_more_mail) as port:
            keys = {**DEFAULT, **service}
            await collect(salmon, agent_keys(port), plugins=plugins, default=keys)

    asyncio.run(main())
    return answers[1:]


def transaction(data: bytes, *recipients: str) -> bytes:
    """A message as it is written down ahead of all answers."""
    lines = ["MAIL FROM:<ann@example.net>", *(f"RCPT TO:<{one}>" for one in recipients)]
    commands = "".join(f"{line}\r\n" for line in lines).encode()
    return commands + b"BDAT %d LAST\r\n" % len(data) + data


def test_a_slow_handler_does_not_hold_up_the_answer_to_the_message_before(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answered = threading.Event()
    salmon.handle("fast@.*")
    seen = []

    def slow(message: MailRequest) -> None:
        seen.append((answered.wait(60), "to=<fast@example.org>" in caplog.text))

    salmon.handle("slow@.*", slow)
    fast = transaction(MESSAGE, "fast@example.org")
    answers = at_once(salmon, fast, transaction(SLOW, "slow@example.org"), until=answered)
    assert seen == [(True, True)], "answered, and in the log"
    assert answers == ["250 2.0.0 delivered"] * 2


def test_what_was_done_in_time_is_not_deferred_for_a_slow_one_after_it(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(dispatcher, "LOOK_EVERY", 9.0)  # no one looks before the time is up
    salmon.handle("fast@.*")
    answered = threading.Event()
    salmon.handle("slow@.*", waits_for(answered))
    answers = at_once(
        salmon,
        transaction(MESSAGE, "fast@example.org"),
        transaction(SLOW, "slow@example.org"),
        transaction(MESSAGE, "behind@example.org"),
        until=answered,
        handler_timeout=3,
    )
    late = "451 4.3.0 not done in 3 seconds, try again later"
    assert answers == ["250 2.0.0 delivered", late, late]
    assert "to=<fast@example.org>" in caplog.text
    assert caplog.text.count("handler still running") == 1
    assert caplog.text.count("not started") == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_a_message_twice_in_one_round_is_handled_and_notified_once(
    salmon: Salmon, threads: int
) -> None:
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550, "5.1.1 no b here"))
    twice = transaction(MESSAGE, "a@example.org", "b@example.org")
    at_once(salmon, twice, twice, delivery_threads=threads)
    handled = [message.To.partition("@")[0] for message in salmon.handled]
    assert sorted(handled) == ["a", "b", "first"]
    assert len(salmon.relayed) == 1


def test_a_hook_that_ends_the_process_ends_the_delivery_of_one_message(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    class Leaves:
        @hookimpl
        def message_received(self, message: bytes) -> None:
            if b"poison" in message:
                raise SystemExit(3)

    salmon.handle("[ab]@.*")
    plugins = Plugins.load()
    plugins.register(Leaves())
    good, bad = MESSAGE, MESSAGE.replace(b"hello", b"poison")
    answers = at_once(
        salmon,
        transaction(good, "a@example.org"),
        transaction(bad, "a@example.org"),
        transaction(good, "b@example.org"),
        plugins=plugins,
    )
    assert answers == [
        "250 2.0.0 delivered",
        "451 4.3.0 internal error, try again later",
        "250 2.0.0 delivered",
    ]
    assert "SystemExit: 3" in caplog.text


def test_a_hook_that_ends_the_process_when_a_message_is_delivered(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    class Leaves:
        @hookimpl
        def message_delivered(self, recipient: str) -> None:
            if recipient.startswith("bad"):
                raise SystemExit(3)

    caplog.set_level("INFO")
    salmon.handle("bad@.*")
    plugins = Plugins.load()
    plugins.register(Leaves())
    bad = transaction(MESSAGE, "bad@example.org")
    answers = at_once(salmon, bad, bad, plugins=plugins)
    assert answers == ["451 4.3.0 internal error, try again later", "250 2.0.0 delivered"]
    assert [message.To.partition("@")[0] for message in salmon.handled] == ["first", "bad"]
    said = [line for line in caplog.messages if "to=<bad@" in line]
    assert [line.endswith("repeat") for line in said] == [False, True]


def test_what_a_slow_log_costs_is_not_the_event_loops(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "LOOK_EVERY", 0.01)
    wrote: list[str] = []

    def slow(record: logging.LogRecord) -> bool:
        if "to=<s" in record.getMessage():
            wrote.append(threading.current_thread().name)
        return True

    def takes_some_looks(message: MailRequest) -> None:
        assert not threading.Event().wait(0.1)

    salmon.handle("s[0-9]@.*", takes_some_looks)
    with log_filter(slow):
        at_once(salmon, transaction(MESSAGE, *(f"s{one}@example.org" for one in range(4))))
    assert len(wrote) == 4
    assert threading.main_thread().name not in wrote


@contextlib.contextmanager
def log_filter(accepts: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """A filter of the user's at the loggers of a delivery."""
    loggers = [logging.getLogger(module.__name__) for module in (dispatcher, rounds)]
    for logger in loggers:
        logger.addFilter(accepts)
        logger.setLevel("INFO")
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(accepts)
            logger.setLevel("NOTSET")


class Gone(io.StringIO):
    """Standard error of a process whose log is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("gone", [False, True])
def test_a_filter_of_the_log_that_raises_costs_a_line_and_no_mail(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    def broken(record: logging.LogRecord) -> bool:
        if "to=<a@" in record.getMessage():
            raise ValueError("a bug in a filter")
        return True

    monkeypatch.setattr(rounds, "BATCH_SECONDS", 0.0)  # the second waits for the first's lines
    if gone:
        monkeypatch.setattr(sys, "stderr", Gone())
    salmon.handle("[ab]@.*")
    messages = [transaction(MESSAGE, f"{one}@example.org") for one in "ab"]
    with log_filter(broken):
        answers = at_once(salmon, *messages)
    assert answers == ["250 2.0.0 delivered"] * 2
    assert "to=<b@example.org>" in caplog.text


def test_a_filter_that_raises_at_an_error_does_not_end_the_deliveries(salmon: Salmon) -> None:
    class Leaves:
        @hookimpl
        def message_received(self, message: bytes) -> None:
            if b"poison" in message:
                raise SystemExit(3)

    def broken(record: logging.LogRecord) -> bool:
        if record.exc_info:
            raise ValueError("a bug in a filter")
        return True

    salmon.handle("[ab]@.*")
    plugins = Plugins.load()
    plugins.register(Leaves())
    with log_filter(broken):
        answers = at_once(
            salmon,
            transaction(MESSAGE.replace(b"hello", b"poison"), "a@example.org"),
            transaction(MESSAGE, "b@example.org"),
            plugins=plugins,
        )
    assert answers == ["451 4.3.0 internal error, try again later", "250 2.0.0 delivered"]


def test_a_filter_that_raises_at_what_is_deferred_keeps_no_one_waiting(salmon: Salmon) -> None:
    def broken(record: logging.LogRecord) -> bool:
        if "reply='451" in record.getMessage():
            raise ValueError("a bug in a filter")
        return True

    slow = Slow()
    salmon.handle(".*", slow)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(SLOW)).startswith("451 4.3.0 ")
        assert (await provider.send(MESSAGE)).startswith("451 4.3.0 ")
        slow.go.set()
        assert (await provider.send(SLOW)).startswith("250 ")
        await provider.quit()

    with log_filter(broken):
        assert slowly(salmon, script).outcome is Outcome.COLLECTED


def test_a_mailbox_twice_in_an_envelope_is_tried_once(salmon: Salmon) -> None:
    salmon.handle(".*", fails(450, "later"))
    heard, _ = exchange(salmon, "b@example.org", "b@example.org")
    assert heard[0].startswith("450 ")
    assert len(salmon.handled) == 1


def test_a_delivery_is_in_the_journals_file_before_it_is_answered(salmon: Salmon) -> None:
    salmon.handle(".*")

    def recorded() -> int:
        with contextlib.closing(sqlite3.connect("run/revsmtp.sqlite3")) as database:
            [count] = database.execute("SELECT count(*) FROM deliveries").fetchone()
            return int(count)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        for number in range(1, 4):
            data = MESSAGE + b"%d\r\n" % number
            assert (await provider.send(data)).startswith("250 ")
            assert recorded() == number
        await provider.quit()

    async def main() -> None:
        async with scripted(script, no_more_mail) as port:
            await collect(salmon, agent_keys(port))

    asyncio.run(main())


def test_a_permanent_failure_beside_a_success_is_notified(salmon: Salmon) -> None:
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550, "5.1.1 no b here"))
    heard, report = exchange(
        salmon, "a@example.org", "b@example.org", data=MESSAGE.replace(b"hi", b"caf\xc3\xa9")
    )
    assert heard[0].startswith("250 ")
    assert (report.recipients, report.refused) == (1, 1)
    [(sender, to, text)] = salmon.relayed
    assert (sender, to) == ("<>", "ann@example.net")
    assert text.isascii()
    notice = email.message_from_string(text, policy=policy.default)
    assert notice.get_content_type() == "multipart/report"
    assert notice["Auto-Submitted"] == "auto-replied"
    explanation, status, headers = notice.iter_parts()
    assert "no b here" in explanation.get_content()
    assert isinstance(status, EmailMessage)
    _, recipient = status.iter_parts()
    assert recipient["Final-Recipient"] == "rfc822; b@example.org"
    assert (recipient["Action"], recipient["Status"]) == ("failed", "5.1.1")
    assert recipient["Diagnostic-Code"] == "smtp; 550 5.1.1 no b here"
    assert headers.get_content_type() == "text/rfc822-headers"
    assert "Subject: café" in headers.get_content()


@pytest.mark.parametrize(("sender", "rcpt"), [("", ""), ("ann@example.net", " NOTIFY=NEVER")])
def test_nobody_is_notified_who_must_not_be(salmon: Salmon, sender: str, rcpt: str) -> None:
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550))
    heard, _ = exchange(salmon, "a@example.org", "b@example.org", sender=sender, rcpt=rcpt)
    assert heard[0].startswith("250 ")
    assert salmon.relayed == []


def test_a_notification_that_the_relay_does_not_take_goes_out_later(salmon: Salmon) -> None:
    def down(message: object, To: str, From: str) -> None:
        raise ConnectionRefusedError("relay is down")

    working, salmon.relay = salmon.relay, SimpleNamespace(deliver=down)
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550))
    heard, _ = exchange(salmon, "a@example.org", "b@example.org")
    assert heard[0].startswith("250 ")
    unsent = queue.Queue("run/unsent")
    [key] = unsent.keys()
    assert unsent.mbox.get_bytes(key).startswith(
        b"Return-Path: <>\nDelivered-To: ann@example.net\n"
    )
    salmon.relay = working
    exchange(salmon, "a@example.org", data=MESSAGE + b"another\r\n")
    assert [(sender, to) for sender, to, _ in salmon.relayed] == [("<>", "ann@example.net")]
    assert unsent.keys() == []


def test_a_notification_that_cannot_be_kept_leaves_the_mail_with_the_provider(
    salmon: Salmon,
) -> None:
    (salmon.folder / "run/unsent").write_text("a file where the queue should be")
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550))
    heard, _ = exchange(salmon, "a@example.org", "b@example.org")
    assert heard[0].startswith("451 4.3.0 ")
    assert salmon.relayed == []
    (salmon.folder / "run/unsent").unlink()
    heard, _ = exchange(salmon, "a@example.org", "b@example.org")
    assert heard[0].startswith("250 ")
    assert [message.To for message in salmon.handled] == ["a@example.org", "b@example.org"]
    assert len(salmon.relayed) == 1


def test_a_notification_is_small_however_large_the_header(salmon: Salmon) -> None:
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550))
    header = b"Subject: hi\r\n" + b"X-Long: " + b"x" * 3000 + b"\r\n"
    exchange(salmon, "a@example.org", "b@example.org", data=header + header * 400)
    [(_, _, text)] = salmon.relayed
    assert "Undelivered mail" in text
    assert len(text) < 128 * 1024


def test_a_repeat_of_a_partial_success_is_not_notified_again(salmon: Salmon) -> None:
    """The 250 was lost on its way, and we have been restarted."""
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550))
    for _ in range(2):
        heard, _ = exchange(salmon, "a@example.org", "b@example.org", times=2)
        assert [line[:3] for line in heard] == ["250", "250"]
    assert len(salmon.handled) == 2
    assert len(salmon.relayed) == 1


def test_only_permanent_failures_are_the_reply(salmon: Salmon) -> None:
    salmon.handle(".*", fails(550, "no"))
    heard, _ = exchange(salmon, "a@example.org", "b@example.org")
    assert heard == ["550 5.0.0 no"]
    assert salmon.relayed == []


def test_a_message_that_runs_in_a_circle(salmon: Salmon, caplog: pytest.LogCaptureFixture) -> None:
    salmon.handle(".*")
    heard, _ = exchange(salmon, "b@example.org", data=b"Received: x\r\n" * 100 + MESSAGE)
    assert heard[0].startswith("554 5.4.6 ")
    assert "to=<b@example.org>" in caplog.text and "reply='554 5.4.6 " in caplog.text
    heard, _ = exchange(salmon, "b@example.org", data=b"Received: x\r\n" * 99 + MESSAGE)
    assert heard[0].startswith("250 ")


# -- hooks -------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    @hookimpl
    def collection_started(self, agent: Any) -> None:
        self.seen.append(("started", agent.name))

    @hookimpl
    def connection_reversed(self, agent: Any, session: Any) -> None:
        self.seen.append(("reversed", agent.name, session.peer[0]))

    @hookimpl
    def message_received(self, agent: Any, envelope: Any, message: bytes) -> Reply | None:
        self.seen.append(("received", envelope.recipients, message.split(b":")[0]))
        return Reply(550, "5.7.1 spam") if b"Subject: spam" in message else None

    @hookimpl
    def message_delivered(self, agent: Any, envelope: Any, recipient: str, reply: Any) -> None:
        self.seen.append(("delivered", recipient, reply.code))

    @hookimpl
    def collection_finished(self, agent: Any, report: Report) -> None:
        self.seen.append(("finished", report.outcome.value, report.messages))


class Broken:
    @hookimpl
    def collection_started(self, agent: Any) -> None:
        raise RuntimeError("plugin bug")

    @hookimpl
    def connection_reversed(self, agent: Any, session: Any) -> None:
        raise RuntimeError("plugin bug")

    @hookimpl
    def message_received(self, agent: Any, envelope: Any, message: bytes) -> Any:
        raise RuntimeError("plugin bug")

    @hookimpl
    def message_delivered(self, agent: Any, envelope: Any, recipient: str, reply: Any) -> None:
        raise RuntimeError("plugin bug")

    @hookimpl
    def collection_finished(self, agent: Any, report: Any) -> None:
        raise RuntimeError("plugin bug")


def test_hooks_are_called_when_they_should(salmon: Salmon) -> None:
    salmon.handle(".*")
    recorder, plugins = Recorder(), Plugins.load()
    plugins.register(recorder)
    exchange(salmon, "b@example.org", plugins=plugins)
    assert recorder.seen == [
        ("started", "isp"),
        ("reversed", "isp", "127.0.0.1"),
        ("received", ("b@example.org",), b"Received"),
        ("delivered", "b@example.org", 250),
        ("finished", "collected", 1),
    ]


def test_a_hook_may_refuse_a_message(salmon: Salmon) -> None:
    salmon.handle(".*")
    recorder, plugins = Recorder(), Plugins.load()
    plugins.register(recorder)
    spam = MESSAGE.replace(b"hi", b"spam")
    heard, _ = exchange(salmon, "b@example.org", data=spam, plugins=plugins)
    assert heard == ["550 5.7.1 spam"]
    assert salmon.handled == []
    assert ("delivered", "b@example.org", 550) in recorder.seen


def test_hooks_hear_of_the_client_that_an_agent_knows(salmon: Salmon) -> None:
    client = Client("192.0.2.25", 4711, helo="mx.example.net")
    seen: list[Client | None] = []

    class Archive(Agent):
        protocol = "archive"
        domains = ("example.org",)

        async def collect(self, collection: Collection) -> Outcome:
            for one in (client, None):
                data = MESSAGE + repr(one).encode()
                await collection.deliver(Envelope("", ("b@example.org",), client=one), data)
            return Outcome.COLLECTED

    class Plugin:
        @hookimpl
        def register_agent_types(self, register: Any) -> None:
            register(Archive)

        @hookimpl
        def message_received(self, envelope: Envelope) -> None:
            seen.append(envelope.client)

    salmon.handle(".*")
    plugins = Plugins.load()
    plugins.register(Plugin())
    agent = {"name": "old", "protocol": "archive"}
    [report] = asyncio.run(collect(salmon, agent, plugins=plugins, default=DEFAULT))
    assert (report.outcome, report.error) == (Outcome.COLLECTED, None)
    assert seen == [client, None]


class Marks:
    """A plugin that marks what it is asked about, and may refuse it."""

    def __init__(self, value: str, reply: Reply | None = None) -> None:
        self.value, self.reply = value, reply
        self.seen: list[bytes] = []

    @hookimpl
    def message_received(
        self, message: bytes, add_field: Callable[[str, str], None]
    ) -> Reply | None:
        self.seen.append(message)
        add_field("X-Filter", self.value)
        return self.reply


def header_of(stored: bytes) -> list[tuple[str, str]]:
    """Name and value of each field, folded lines as one, and of Received the name only."""
    fields = email.message_from_bytes(stored).items()
    return [(name, "" if name == "Received" else " ".join(one.split())) for name, one in fields]


@pytest.mark.parametrize("delivery", ["router", "queue"])
def test_what_hooks_add_is_beneath_our_received_line_and_above_what_came(
    salmon: Salmon, delivery: str
) -> None:
    salmon.handle(".*")
    long = "score=4.2 " + " ".join(f"RULE_{number}" for number in range(30))
    marks, plugins = [Marks(long), Marks("second")], Plugins.load()
    for one in reversed(marks):  # pluggy asks the last one first
        plugins.register(one)
    forged = b"X-Filter: forged\r\n" + MESSAGE
    heard, _ = exchange(
        salmon, "a@example.org", "b@example.org", data=forged, plugins=plugins, delivery=delivery
    )
    assert [line[:3] for line in heard] == ["250"]
    if delivery == "queue":
        QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    assert len(salmon.handled) == 2
    for message in salmon.handled:
        assert header_of(message.Data)[:5] == [
            ("Received", ""),
            ("X-Filter", long),
            ("X-Filter", "second"),
            ("X-Filter", "forged"),
            ("From", "Ann <ann@example.net>"),
        ]
        assert max(map(len, message.Data.splitlines())) <= 78
        assert message.Data.endswith(MESSAGE.replace(b"\r\n", b"\n").removesuffix(b"\n"))
    assert [one.count(b"X-Filter") for mark in marks for one in mark.seen] == [1] * 4


def test_a_hook_may_refuse_what_another_has_marked(salmon: Salmon) -> None:
    salmon.handle(".*")
    first, last = Marks("first"), Marks("not asked")
    refuses, plugins = Marks("refused", Reply(550, "5.7.1 spam")), Plugins.load()
    for one in (last, refuses, first):
        plugins.register(one)
    heard, _ = exchange(salmon, "b@example.org", plugins=plugins)
    assert heard == ["550 5.7.1 spam"]
    assert (len(first.seen), len(refuses.seen), len(last.seen)) == (1, 1, 0)
    assert salmon.handled == []


def test_a_redelivered_message_is_known_whatever_hooks_add_to_it(salmon: Salmon) -> None:
    salmon.handle(".*")
    marks, plugins = Marks("1"), Plugins.load()
    plugins.register(marks)
    exchange(salmon, "b@example.org", plugins=plugins)
    marks.value = "2"
    heard, _ = exchange(salmon, "b@example.org", plugins=plugins)
    assert heard == ["250 2.0.0 delivered"]
    [message] = salmon.handled
    assert ("X-Filter", "1") in header_of(message.Data)


def test_a_hook_that_adds_what_is_no_field_is_left_out(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*")
    plugins = Plugins.load()
    plugins.register(Marks("fine"))
    plugins.register(Marks("yes\nBcc: evil@elsewhere.example"), "careless")
    heard, _ = exchange(salmon, "b@example.org", plugins=plugins)
    assert heard == ["250 2.0.0 delivered"]
    assert "plugin=careless hook=message_received raised" in caplog.text
    assert "the value of X-Filter has '\\n'" in caplog.text
    [message] = salmon.handled
    assert header_of(message.Data)[:3] == [
        ("Received", ""),
        ("X-Filter", "fine"),
        ("From", "Ann <ann@example.net>"),
    ]


def test_hooks_that_raise_are_logged_and_cost_no_mail(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*")
    recorder, plugins = Recorder(), Plugins.load()
    plugins.register(recorder)
    plugins.register(Broken(), "broken-one")
    heard, report = exchange(salmon, "b@example.org", plugins=plugins)
    assert heard[0].startswith("250 ")
    assert report.messages == 1
    assert len(recorder.seen) == 5
    assert caplog.text.count("plugin=broken-one") == 5


def test_an_answer_that_cannot_be_given_ends_the_session(salmon: Salmon) -> None:
    """Our own bug, or a plugin's: the message has no 250, and the provider keeps it."""

    class Unsayable(Reply):
        def encode(self) -> bytes:
            raise RuntimeError("a bug")

    class Refuses:
        @hookimpl
        def message_received(self, message: bytes) -> Reply:
            return Unsayable(550, "no")

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>", "BDAT 1 LAST")
        await provider.replied(250)
        await provider.replied(250)
        provider.writer.write(b"x")
        await provider.replied(421)

    async def main() -> Report:
        async with scripted(script) as port:
            [report] = await collect(salmon, agent_keys(port), plugins=plugins)
        return report

    plugins = Plugins.load()
    plugins.register(Refuses())
    report = asyncio.run(main())
    assert report.outcome is Outcome.FAILED
    assert report.error is not None and "answering failed: RuntimeError: a bug" in report.error
