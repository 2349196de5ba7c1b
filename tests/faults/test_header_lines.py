"""Mailboxes and messages made to break out of a header line: none yields a line that nobody wrote,
none keeps the mail from being delivered."""

from __future__ import annotations

import email
from email import policy
from email.message import Message

import pytest
from conftest import Salmon
from salmon import queue
from salmon.mail import MailRequest
from salmon.server import SMTPError
from test_delivery import exchange

from salmon_revsmtp import QueueConsumer
from salmon_revsmtp.delivery.bounce import notification
from salmon_revsmtp.delivery.trace import split_envelope
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

MESSAGE = b"From: Ann <ann@example.net>\r\nSubject: hi\r\n\r\nhello\r\n"

# RFC 5321 4.1.2 and RFC 6531 3.3 allow them all.
LOCAL_PARTS = [
    "a\u0085b",
    "\u0085a",
    "a\u2028b",
    "\u2028a",
    "a\u2029Bcc",
    "\u00a0a",
    "\ufeffa",
    "a\u009bb",
    '"a\u2028Bcc: evil@elsewhere.example"',
    '"a\u0085\u0085Bcc: evil@elsewhere.example"',
    '"a\u2028 b\u2028\u2028body"',
    '"a\\"b\\\\"',
    '"a>, <b"',
    '" "',
    '"  a"',
    '"a:"',
    '""',
    '"Bcc:"',
    '"(comment"',
    "=?utf-8?q?a=0ABcc=3Aevil?=",
    "=?utf-8?b?CkJjYzogZXZpbA==?=",
    "a\u202eb",
    "\u03b4\u03bf\u03ba\u03b9\u03bc\u03ae",
    "\U0001f600",
    "a..b",
    ".a.",
    "x" * 3000,
    "\u2028" * 300,
]
POLICIES = [policy.compat32, policy.default, policy.SMTP, policy.SMTPUTF8]


def names(data: bytes) -> list[str]:
    """The header lines that Python finds, by every policy the same."""
    [found, *others] = [
        email.message_from_bytes(data, policy=one).keys()  # type: ignore[arg-type]
        for one in POLICIES
    ]
    assert all(other == found for other in others)
    return found


def domainless(mailbox: str) -> str:
    return mailbox.rpartition("@")[0]


@pytest.mark.parametrize("local", LOCAL_PARTS, ids=ascii)
def test_a_handler_finds_the_message_and_one_line_of_ours(salmon: Salmon, local: str) -> None:
    salmon.handle(".*")
    heard, report = exchange(
        salmon,
        f"{local}@example.org",
        sender=f"{local}@example.net",
        data=MESSAGE,
        mail=" SMTPUTF8",
    )
    assert [line[:3] for line in heard] == ["250"]
    assert (report.messages, report.recipients) == (1, 1)
    [message] = salmon.handled
    assert domainless(message.To) == local.lower()
    assert names(message.Data) == ["Received", "From", "Subject"]
    assert message.body() == "hello"


@pytest.mark.parametrize("local", LOCAL_PARTS, ids=ascii)
def test_the_queue_keeps_the_envelope_in_two_lines_and_gives_it_back(
    salmon: Salmon, local: str
) -> None:
    salmon.handle(".*")
    sender, recipient = f"{local}@example.net", f"{local}@example.org"
    heard, _ = exchange(
        salmon, recipient, sender=sender, data=MESSAGE, mail=" SMTPUTF8", delivery="queue"
    )
    assert [line[:3] for line in heard] == ["250"]
    inbound = queue.Queue("run/inbound")
    [key] = inbound.keys()
    stored = inbound.mbox.get_bytes(key)
    assert names(stored) == ["Return-Path", "Delivered-To", "Received", "From", "Subject"]
    assert split_envelope(stored)[:2] == (sender, recipient)
    assert salmon.handled == []
    QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    [message] = salmon.handled
    assert message.To == recipient.lower()
    assert list(inbound.keys()) == []


@pytest.mark.parametrize("local", LOCAL_PARTS, ids=ascii)
def test_what_no_handler_takes_is_kept_in_two_lines(salmon: Salmon, local: str) -> None:
    sender, recipient = f"{local}@example.net", f"{local}@example.org"
    exchange(salmon, recipient, sender=sender, data=MESSAGE, mail=" SMTPUTF8")
    [kept] = salmon.undeliverable()
    assert names(kept) == ["Return-Path", "Delivered-To", "Received", "From", "Subject"]
    assert split_envelope(kept)[:2] == (sender, recipient)


NOTIFICATION = [
    "Content-Type",
    "MIME-Version",
    "From",
    "To",
    "Subject",
    "Date",
    "Message-ID",
    "Auto-Submitted",
]


def parts_of(report: bytes) -> list[Message]:
    """The parts of a notification, which has our header lines and no others."""
    assert names(report) == NOTIFICATION
    [_, status, _] = email.message_from_bytes(report).get_payload()  # type: ignore[misc]
    return list(status.get_payload())


@pytest.mark.parametrize("local", LOCAL_PARTS, ids=ascii)
def test_a_notification_has_our_header_lines_only(salmon: Salmon, local: str) -> None:
    def action(message: MailRequest) -> None:
        if message.To != "good@example.org":
            raise SMTPError(550, "no such user\r\nBcc: evil@elsewhere.example\r\n\r\nbody")

    salmon.handle(".*", action)
    heard, _ = exchange(
        salmon,
        f"{local}@example.org",
        "good@example.org",
        sender=f"{local}@example.net",
        data=MESSAGE,
        mail=" SMTPUTF8 ENVID=x+0D+0ABcc:+20evil",
        rcpt=" ORCPT=utf-8;a\u2028b+0Ac",
    )
    assert [line[:3] for line in heard] == ["250"]
    [(_, to, report)] = salmon.relayed
    assert to == f"{local}@example.net"
    whole, one = parts_of(report.encode())
    assert whole.keys() == ["Reporting-MTA", "Original-Envelope-Id"]
    assert one.keys() == [
        "Original-Recipient",
        "Final-Recipient",
        "Action",
        "Status",
        "Diagnostic-Code",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "no\r\n\r\nbody",
        "no\rBcc: x",
        "no\u2028Bcc: x",
        "no\u0085Bcc: x",
        "no\x0bBcc: x\x0c\x1c\x1d\x1e",
    ],
)
def test_a_notification_of_any_text(text: str) -> None:
    """As bytes, as text, and written anew by each policy."""
    envelope = Envelope("a@example.net", ("b@example.org",), {"ENVID": text})
    report = notification("h", envelope, {"b@example.org": Reply(550, text)}, MESSAGE)
    for written in (report.as_bytes(), report.as_string().encode(), *(
        report.as_bytes(policy=one) for one in POLICIES
    )):  # fmt: skip
        whole, one = parts_of(written)
        assert whole.keys() == ["Reporting-MTA", "Original-Envelope-Id"]
        assert one.keys() == ["Final-Recipient", "Action", "Status", "Diagnostic-Code"]


@pytest.mark.parametrize("delivery", ["router", "queue"])
@pytest.mark.parametrize(
    "beginning",
    [
        b" folded into our line\r\n",
        b"\tBcc: evil@elsewhere.example\r\n",
        b"\r\n",
        b"\n\n",
        b"\r\r",
        b"From evil@elsewhere.example Thu Jan  1 00:00:00 1970\r\n",
        b">From x\r\n",
        b"no header at all\r\n",
        b": no name\r\n",
        b"Return-Path: <evil@elsewhere.example>\r\nDelivered-To: evil@elsewhere.example\r\n",
        b"Received: from evil\r\n",
        b"\x00\r\n",
        b"X: a\rDelivered-To: evil@elsewhere.example\r\n",
        b"X: a\nDelivered-To: evil@elsewhere.example\r\n",
        b"X: \xc2\x85Delivered-To: evil\xe2\x80\xa8Delivered-To: evil\r\n",
        b"\xef\xbb\xbfX: a\r\n",
        b"--\r\n",
    ],
)
def test_a_message_that_begins_strangely(salmon: Salmon, beginning: bytes, delivery: str) -> None:
    """The envelope that we keep is the transaction's, and our lines are the first."""
    salmon.handle(".*")
    heard, _ = exchange(salmon, "b@example.org", data=beginning + MESSAGE, delivery=delivery)
    assert [line[:3] for line in heard] == ["250"]
    if delivery == "queue":
        inbound = queue.Queue("run/inbound")
        [key] = inbound.keys()
        stored = inbound.mbox.get_bytes(key)
        assert names(stored)[:3] == ["Return-Path", "Delivered-To", "Received"]
        assert split_envelope(stored)[:2] == ("ann@example.net", "b@example.org")
        QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    [message] = salmon.handled
    assert (message.From, message.To) == ("ann@example.net", "b@example.org")
    assert names(message.Data)[0] == "Received"
    assert salmon.undeliverable() == []
