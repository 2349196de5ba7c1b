"""What becomes of a message in Salmon, and what the provider hears of it."""

from __future__ import annotations

import asyncio
import email
import errno
import smtplib
import threading
from email import policy
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Dialogue, Salmon, agent_keys, collect, scripted
from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import Router
from salmon.server import SMTPError, SMTPReceiver

from salmon_revsmtp import QueueConsumer, Reply, hookimpl
from salmon_revsmtp.plugins import Plugins
from salmon_revsmtp.report import Report

MESSAGE = b"From: Ann <ann@example.net>\r\nTo: list@example.net\r\nSubject: hi\r\n\r\nhello\r\n"


def fails(code: int, text: str | None = None) -> Any:
    def action(message: MailRequest) -> None:
        raise SMTPError(code, text)

    return action


def explodes(message: MailRequest) -> None:
    raise RuntimeError("handler bug")


def exchange(
    salmon: Salmon,
    *recipients: str,
    data: bytes = MESSAGE,
    sender: str = "ann@example.net",
    mail: str = "",
    rcpt: str = "",
    times: int = 1,
    plugins: Plugins | None = None,
    **service: Any,
) -> tuple[list[str], Report]:
    """Send one message in one session, ``times`` over; the replies to its data, the report."""
    heard: list[str] = []

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        for _ in range(times):
            provider.say(f"MAIL FROM:<{sender}>{mail}")
            await provider.replied(250)
            for recipient in recipients:
                provider.say(f"RCPT TO:<{recipient}>{rcpt}")
                await provider.replied(250)
            provider.say(b"BDAT %d LAST\r\n%s" % (len(data), data[:-2]))
            heard.append(await provider.hear())
            if heard[-1].startswith("353"):
                heard.extend([await provider.hear() for _ in (*recipients, "all")])
        await provider.quit()

    async def done(provider: Dialogue) -> None:
        await provider.up_to_atrn()
        await provider.asks("ATRN", "453 no mail")

    async def main() -> Report:
        # A second session comes only if the first has taken anything.
        async with scripted(script, done) as port:
            [report] = await collect(
                salmon, agent_keys(port), plugins=plugins, default={**DEFAULT, **service}
            )
            if report.sessions == 1:
                reader, writer = await asyncio.open_connection("localhost", port)
                await finish(Dialogue(reader, writer))
        return report

    return heard, asyncio.run(main())


DEFAULT = {"hostname": "mail.example.org"}


async def finish(customer: Dialogue) -> None:
    """Play the customer of the script ``done``."""
    await customer.hear("220")
    customer.say("EHLO x")
    await customer.replied(250)
    for line in ("AUTH CRAM-MD5", "x", "EHLO x", "ATRN"):
        customer.say(line)
        await customer.hear()
        if line == "EHLO x":
            await customer.hear()
            await customer.hear()


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
        b"Return-Path: <ann@example.net>\nDelivered-To: b@example.org\nReceived: from "
    )
    assert kept.endswith(b"Subject: hi\n\nhello")


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


def test_a_repeat_is_answered_as_before_and_not_handled_again(salmon: Salmon) -> None:
    salmon.handle("a@.*")
    heard, report = exchange(salmon, "a@example.org", times=3)
    assert [line[:3] for line in heard] == ["250", "250", "250"]
    assert len(salmon.handled) == 1
    assert report.messages == 1


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
    _, recipient = status.get_payload()
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


def test_a_notification_that_the_relay_does_not_take_is_kept(salmon: Salmon) -> None:
    def down(message: object, To: str, From: str) -> None:
        raise ConnectionRefusedError("relay is down")

    salmon.relay = SimpleNamespace(deliver=down)
    salmon.handle("a@.*")
    salmon.handle("b@.*", fails(550))
    heard, _ = exchange(salmon, "a@example.org", "b@example.org")
    assert heard[0].startswith("250 ")
    unsent = queue.Queue("run/unsent")
    [key] = unsent.keys()
    assert unsent.mbox.get_bytes(key).startswith(
        b"Return-Path: <>\nDelivered-To: ann@example.net\n"
    )


def test_only_permanent_failures_are_the_reply(salmon: Salmon) -> None:
    salmon.handle(".*", fails(550, "no"))
    heard, _ = exchange(salmon, "a@example.org", "b@example.org")
    assert heard == ["550 5.0.0 no"]
    assert salmon.relayed == []


def test_a_message_that_runs_in_a_circle(salmon: Salmon) -> None:
    salmon.handle(".*")
    heard, _ = exchange(salmon, "b@example.org", data=b"Received: x\r\n" * 100 + MESSAGE)
    assert heard[0].startswith("554 5.4.6 ")
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


# -- queue mode --------------------------------------------------------------------------------


def test_queue_mode_keeps_the_envelope_and_the_consumer_routes_by_it(salmon: Salmon) -> None:
    salmon.handle(".*")
    heard, report = exchange(salmon, "b@example.org", "c@example.org", delivery="queue")
    assert heard[0].startswith("250 2.6.0 queued")
    assert (report.messages, report.recipients) == (1, 2)
    assert salmon.handled == []
    inbound = queue.Queue("run/inbound")
    stored = sorted(inbound.mbox.get_bytes(key) for key in inbound.keys())
    assert [one.splitlines()[:2] for one in stored] == [
        [b"Return-Path: <ann@example.net>", b"Delivered-To: b@example.org"],
        [b"Return-Path: <ann@example.net>", b"Delivered-To: c@example.org"],
    ]
    QueueConsumer("run/inbound").start(one_shot=True)
    assert sorted(message.To for message in salmon.handled) == ["b@example.org", "c@example.org"]
    assert {message.From for message in salmon.handled} == {"ann@example.net"}
    assert salmon.handled[0].Data.startswith(b"Received: ")
    assert salmon.handled[0].Data.endswith(b"\n\nhello")
    assert len(inbound) == 0


def test_the_consumer_deletes_after_handling(salmon: Salmon) -> None:
    there: list[int] = []
    salmon.handle(".*", lambda message: there.append(len(queue.Queue("run/inbound"))))
    exchange(salmon, "b@example.org", delivery="queue")
    QueueConsumer("run/inbound").start(one_shot=True)
    assert there == [1]
    assert len(queue.Queue("run/inbound")) == 0


def test_the_consumer_puts_off_what_a_handler_puts_off(salmon: Salmon) -> None:
    salmon.handle(".*", fails(451))
    exchange(salmon, "b@example.org", delivery="queue")
    QueueConsumer("run/inbound").start(one_shot=True)
    assert len(queue.Queue("run/inbound")) == 1


def test_what_a_handler_refuses_later_is_notified(salmon: Salmon) -> None:
    salmon.handle(".*", fails(550, "no"))
    exchange(salmon, "b@example.org", delivery="queue")
    QueueConsumer("run/inbound", relay=lambda: salmon.relay).start(one_shot=True)
    assert [(sender, to) for sender, to, _ in salmon.relayed] == [("<>", "ann@example.net")]
    assert len(queue.Queue("run/inbound")) == 0


def test_a_queue_that_cannot_be_written_leaves_the_mail_with_the_provider(salmon: Salmon) -> None:
    (salmon.folder / "file").touch()
    heard, report = exchange(salmon, "b@example.org", delivery="queue", queue="file/inbound")
    assert heard[0].startswith("451 4.3.0 ")
    assert report.messages == 0
