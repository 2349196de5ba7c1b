"""Mailboxes and messages made to break out of a header line: none yields a line that no one wrote,
none keeps the mail from being delivered."""

from __future__ import annotations

import email
import quopri
import re
import time
from collections.abc import Callable
from email import policy
from email.message import Message

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from salmon import queue
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.collecting import exchange
from support.messages import MESSAGE
from support.salmon import Salmon, fails

from salmon_revsmtp import QueueConsumer, hookimpl
from salmon_revsmtp.delivery.dsn import MAX_HEADERS, RecipientStatus, notification
from salmon_revsmtp.delivery.trace import (
    MAX_ADDED,
    AddedFields,
    Origin,
    envelope_lines,
    header_end,
    hops,
    separator,
    split_envelope,
    unpack_undeliverable,
    with_reason,
)
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.receiver import Receiver
from salmon_revsmtp.smtp.replies import Reply

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
    "x" * 480,
    "\u2028" * 300,
]
POLICIES = [policy.compat32, policy.default, policy.SMTP, policy.SMTPUTF8]


def names(data: bytes) -> list[str]:
    """The header lines that Python finds, by every policy the same."""
    [found, *others] = [email.message_from_bytes(data, policy=one).keys() for one in POLICIES]
    assert all(other == found for other in others)
    return found


RECIPIENTS = [f"{local}@example.org" for local in LOCAL_PARTS]
KEPT = ["Return-Path", "Delivered-To", "Received", "From", "To", "Subject"]
UNDELIVERABLE = [*KEPT[:2], "X-Undeliverable-Reason", *KEPT[2:]]
ODD_SENDER = "a\u2028Bcc\u0085@example.net"


def test_handlers_find_the_message_and_one_line_of_ours(salmon: Salmon) -> None:
    salmon.handle(".*")
    heard, report = exchange(salmon, *RECIPIENTS, sender=ODD_SENDER, data=MESSAGE, mail=" SMTPUTF8")
    assert [line[:3] for line in heard] == ["250"]
    assert (report.messages, report.recipients) == (1, len(RECIPIENTS))
    assert [message.To for message in salmon.handled] == [one.lower() for one in RECIPIENTS]
    for message in salmon.handled:
        assert message.From == ODD_SENDER.lower()
        assert names(message.Data) == ["Received", "From", "To", "Subject"]
        assert message.body() == ".hello"


def test_the_queue_keeps_the_envelope_in_two_lines_and_gives_it_back(salmon: Salmon) -> None:
    salmon.handle(".*")
    heard, _ = exchange(
        salmon, *RECIPIENTS, sender=ODD_SENDER, data=MESSAGE, mail=" SMTPUTF8", delivery="queue"
    )
    assert [line[:3] for line in heard] == ["250"]
    inbound = queue.Queue("run/inbound")
    envelopes = []
    for key in inbound.keys():
        stored = inbound.mbox.get_bytes(key)
        assert names(stored) == KEPT
        envelopes.append(split_envelope(stored)[:2])
    assert sorted(envelopes) == sorted((ODD_SENDER, one) for one in RECIPIENTS)
    assert salmon.handled == []
    QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    assert sorted(one.To for one in salmon.handled) == sorted(one.lower() for one in RECIPIENTS)
    assert list(inbound.keys()) == []


def test_what_no_handler_takes_is_kept_below_its_envelope_and_the_reason(salmon: Salmon) -> None:
    exchange(salmon, *RECIPIENTS, sender=ODD_SENDER, data=MESSAGE, mail=" SMTPUTF8")
    kept = salmon.undeliverable()
    for one in kept:
        assert names(one) == UNDELIVERABLE
    assert sorted(split_envelope(one)[:2] for one in kept) == sorted(
        (ODD_SENDER, one) for one in RECIPIENTS
    )


def is_mailbox(text: str) -> bool:
    """It may come as a sender or recipient, in a command of one line."""
    line = f"MAIL FROM:<{text}> SMTPUTF8\r\n"
    receiver = Receiver("h")
    receiver.receive_bytes(b"EHLO p\r\n" + line.encode("utf-8", "replace"))
    return receiver.data_to_send().endswith(b"250 2.1.0 sender ok\r\n")


ODD = "\u0085\u2028\u2029\u00a0\ufeff\u009b\u202e=?_-%!ab"
LOCALS = st.one_of(
    st.text(st.sampled_from(ODD + "."), min_size=1, max_size=12),
    st.text(st.characters(min_codepoint=0x80, exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.text(st.sampled_from(ODD + ' \\",;:<>()@[]'), max_size=12).map(
        lambda text: '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    ),
)


@given(LOCALS, LOCALS)
@settings(deadline=None)
def test_any_mailbox_that_is_taken_makes_two_lines(one: str, other: str) -> None:
    sender, recipient = f"{one}@example.net", f"{other}@example.org"
    assert is_mailbox(sender) and is_mailbox(recipient)
    content = MESSAGE.replace(b"\r\n", b"\n")
    origin = Origin("default", "mail.example.org", peer=("192.0.2.1", 25), tls=True)
    received = origin.received(Envelope(sender, (recipient,), helo=one), recipient)
    kept = envelope_lines(sender, recipient) + received + content
    assert names(kept) == KEPT
    assert split_envelope(kept) == (sender, recipient, received + content)
    envelope = Envelope(sender, (recipient,))
    refused = [RecipientStatus.failed(recipient, Reply(550, other))]
    _, about = parts_of(notification("h", envelope, refused, content))
    assert about.keys() == ["Final-Recipient", "Action", "Status", "Diagnostic-Code"]


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
    whole = email.message_from_bytes(report)
    [_, status, _] = parts(whole)
    if status.get_content_type() == "message/delivery-status":
        return parts(status)
    # Python reads it as one message, and not what its encoding stands for.
    assert status.get_content_type() == "message/global-delivery-status"
    assert status["Content-Transfer-Encoding"] == "quoted-printable"
    text = quopri.decodestring(parts(status)[0].as_bytes())
    return [email.message_from_bytes(block) for block in text.strip(b"\n").split(b"\n\n")]


def parts(message: Message) -> list[Message]:
    payload = message.get_payload()
    assert isinstance(payload, list)
    return [part for part in payload if isinstance(part, Message)]


def test_a_notification_has_our_header_lines_only(salmon: Salmon) -> None:
    def action(message: MailRequest) -> None:
        if message.To != "good@example.org":
            raise SMTPError(550, "no such user\r\nBcc: evil@elsewhere.example\r\n\r\nbody")

    salmon.handle(".*", action)
    heard, _ = exchange(
        salmon,
        *RECIPIENTS,
        "good@example.org",
        sender=ODD_SENDER,
        data=MESSAGE,
        mail=" SMTPUTF8 ENVID=x+0D+0ABcc:+20evil",
        rcpt=" ORCPT=utf-8;a\u2028b+0Ac",
    )
    assert [line[:3] for line in heard] == ["250"]
    [(_, to, report)] = salmon.relayed
    assert to == ODD_SENDER
    whole, *each = parts_of(report.encode())
    assert whole.keys() == ["Original-Envelope-Id", "Reporting-MTA"]
    assert len(each) == len(RECIPIENTS)
    for one in each:
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
    refused = [RecipientStatus.failed("b@example.org", Reply(550, text))]
    octets = notification("h", envelope, refused, MESSAGE)
    report = email.message_from_bytes(octets)
    for written in (octets, report.as_bytes(), report.as_string().encode(), *(
        report.as_bytes(policy=one) for one in POLICIES
    )):  # fmt: skip
        whole, one = parts_of(written)
        assert whole.keys() == ["Original-Envelope-Id", "Reporting-MTA"]
        assert one.keys() == ["Final-Recipient", "Action", "Status", "Diagnostic-Code"]


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
def test_a_message_that_begins_strangely(salmon: Salmon, beginning: bytes) -> None:
    """The envelope that we keep is the transaction's, and our lines are the first."""
    salmon.handle(".*")
    heard, _ = exchange(salmon, "b@example.org", data=beginning + MESSAGE, delivery="queue")
    assert [line[:3] for line in heard] == ["250"]
    inbound = queue.Queue("run/inbound")
    [key] = inbound.keys()
    stored = inbound.mbox.get_bytes(key)
    assert names(stored)[:3] == KEPT[:3]
    assert split_envelope(stored)[:2] == ("ann@example.net", "b@example.org")
    QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    [message] = salmon.handled
    assert (message.From, message.To) == ("ann@example.net", "b@example.org")
    assert names(message.Data)[0] == "Received"
    assert salmon.undeliverable() == []


# -- where the header ends ------------------------------------------------------------------------

# Messages without a header: nothing of them belongs to a header line of ours.
BODIES = [
    b"\tDear all\n",
    b" (forged by mx.evil.example)\n",
    b" \n",
    b"Dear all, note this: Received: counts\n\nReceived: a\n",
    b"From evil@elsewhere.example Thu Jan  1 00:00:00 1970\nSubject: x\n",
    b": no name\nBcc: evil@elsewhere.example\n",
    b"\rBcc: evil@elsewhere.example\n",
    b"\xef\xbb\xbfSubject: x\n",
    b"\nReceived: in the body\n",
    b"no line end",
    b"",
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("mode", ["router", "queue", "undeliverable", "put into the queue"])
def test_our_header_lines_end_before_a_message_without_a_header_begins(
    salmon: Salmon, body: bytes, mode: str
) -> None:
    if mode != "undeliverable":
        salmon.handle(".*")
    if mode == "put into the queue":
        stored = envelope_lines("ann@example.net", "b@example.org") + b"\n" + body
        queue.Queue("run/inbound", safe=True).push(stored)
    else:
        data = body.replace(b"\n", b"\r\n") + b"\r\n"
        delivery = "queue" if mode == "queue" else "router"
        heard, _ = exchange(salmon, "b@example.org", data=data, delivery=delivery)
        assert [line[:3] for line in heard] == ["250"]
    if "queue" in mode:
        QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    data, ours = (
        (salmon.undeliverable()[0], UNDELIVERABLE[:4])
        if mode == "undeliverable"
        else (salmon.handled[0].Data, [] if mode == "put into the queue" else ["Received"])
    )
    header, _, rest = data.partition(b"\n\n") if ours else (b"", b"", data.removeprefix(b"\n"))
    assert names(header + b"\n\n") == ours
    assert rest.strip(b"\n") == body.strip(b"\n")


def test_what_lies_in_the_queue_without_a_header_is_kept_below_the_envelope(
    salmon: Salmon,
) -> None:
    """As somebody else may put it there: without an envelope, and without a Received line."""
    queue.Queue("run/inbound").push(b"\tDear all\n")
    QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    [kept] = salmon.undeliverable()
    assert names(kept.partition(b"\n\n")[0] + b"\n\n") == UNDELIVERABLE[:3]
    assert kept.startswith(b"Return-Path: <>\nDelivered-To: \n") and kept.endswith(
        b"\n\n\tDear all"
    )


@pytest.mark.parametrize("body", BODIES)
def test_a_notification_sends_no_body_back_as_headers(salmon: Salmon, body: bytes) -> None:
    salmon.handle("good@example.org")
    envelope = Envelope("a@example.net", ("b@example.org",))
    refused = [RecipientStatus.failed("b@example.org", Reply(550, "no"))]
    report = email.message_from_bytes(notification("h", envelope, refused, body))
    headers = parts(report)[2].get_payload(decode=True)
    assert headers == b"\n"


def test_a_header_ends_at_the_first_line_that_is_none() -> None:
    for line in (b"", b"plain text", b"From evil", b": x", b"--", b"\r", b"\xc3\xa4: x"):
        header = b"Received: a\n\tb\nX-Obsolete : c\n \n"
        content = header + line + b"\nReceived: in the body\n"
        assert content[: header_end(content)] == header
        assert hops(content) == 1
        assert separator(content) == b""
    assert header_end(b"Subject: x") == 10
    assert hops(b"Received: a\nreceived : b\nX: Received:\n Received: c\n") == 2


def test_the_end_of_a_header_is_found_in_linear_time() -> None:
    """A quadratic search would take hours; this takes milliseconds."""
    size = 4 * 2**20
    for piece in (b"a", b"a: b\n", b" ", b"\n ", b"a \t", b":", b"a:\n\t\n", b"received:\n"):
        for first in (b"", b"X: y\n"):
            content = first + piece * (size // len(piece))
            began = time.process_time()
            header_end(content)
            separator(content)
            hops(content)
            notification("h", Envelope("a@b.example", ()), [], content[: 2 * MAX_HEADERS])
            assert time.process_time() - began < 5, piece


# -- what plugins add -----------------------------------------------------------------------------

NO_NAMES = ["", " ", "X Spam", "X-Spam:", "X\nBcc", "X\r", "\tX", "X-Sp\u00e4m", "X\u2028", "X\0"]
NO_VALUES = [
    "yes\nBcc: evil@elsewhere.example",
    "yes\r\nBcc: evil@elsewhere.example",
    "yes\rBcc: x",
    "yes\n\nbody",
    "yes\n folded",
    "yes\n",
    "yes\x0bBcc: x",
    "yes\x0cBcc: x",
    "yes\x1cBcc: x",
    "yes\x85Bcc: x",
    "yes\u2028Bcc: x",
    "Gr\u00fc\u00dfe",
    "a\0",
    "\x7f",
    "\udcff",
    "x" * 998,
    "x y " * MAX_ADDED,
]


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, "yes") for name in NO_NAMES), *(("X-Spam", value) for value in NO_VALUES)],
)
def test_what_would_be_no_field_is_not_added(name: str, value: str) -> None:
    added = AddedFields()
    added.add("X-First", "1")
    with pytest.raises(ValueError):
        added.add(name, value)
    assert added.lines == b"X-First: 1\n"


FIELD_NAMES = st.text(st.sampled_from("Xx-_1!~: \n\u00e4"), max_size=6)
FIELD_VALUES = st.text(st.sampled_from('ab:;=?<>" \t\n\r\x0b\x1c\x85\u2028\u00e4'), max_size=200)


@given(FIELD_NAMES, FIELD_VALUES, st.sampled_from([*BODIES, MESSAGE.replace(b"\r\n", b"\n")]))
@settings(deadline=None)
def test_any_field_that_is_added_is_one_field(name: str, value: str, content: bytes) -> None:
    added = AddedFields()
    try:
        added.add(name, value)
    except ValueError:
        assert added.lines == b""
        return
    received = Origin("default", "mail.example.org").received(Envelope("", ("b@x",)), "b@x")
    data = received + added.lines + separator(content) + content
    message = email.message_from_bytes(data)
    assert list(message.keys())[:2] == ["Received", name]
    ours = received + added.lines
    assert header_end(data) == len(ours) + header_end(content)
    assert header_end(ours) == len(ours)
    assert message.values()[1].split() == value.split()
    assert data.endswith(content)
    assert max(map(len, data.splitlines())) <= 998


class Marks:
    @hookimpl
    def message_received(self, add_field: Callable[[str, str], None]) -> None:
        # Names that mean something at the beginning of what is stored.
        add_field("X-Envelope-Parameters", "MAIL RCPT NOTIFY=NEVER")
        add_field("Delivered-To", "evil@elsewhere.example")


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("mode", ["router", "queue", "undeliverable"])
def test_what_a_plugin_adds_stands_between_our_line_and_the_message(
    salmon: Salmon, body: bytes, mode: str
) -> None:
    if mode != "undeliverable":
        salmon.handle(".*")
    plugins = Plugins.load()
    plugins.register(Marks())
    delivery = "queue" if mode == "queue" else "router"
    data = body.replace(b"\n", b"\r\n") + b"\r\n"
    exchange(salmon, "b@example.org", data=data, delivery=delivery, plugins=plugins)
    if mode == "queue":
        QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)
    added = ["X-Envelope-Parameters", "Delivered-To"]
    kept, ours = (
        (salmon.undeliverable()[0], [*UNDELIVERABLE[:4], *added])
        if mode == "undeliverable"
        else (salmon.handled[0].Data, ["Received", *added])
    )
    header, _, rest = kept.partition(b"\n\n")
    assert names(header + b"\n\n") == ours
    assert rest.strip(b"\n") == body.strip(b"\n")


FORGED = (
    b"X-Failed-Recipients: good@example.org,\n evil@elsewhere.example\n",
    b"X-Undeliverable-Reason: none\n",
    b"Delivered-To: evil@elsewhere.example\n",
    b"X-Failed-Recipients: evil@elsewhere.example\nX-Undeliverable-Reason: none\n",
)


@pytest.mark.parametrize("lines", FORGED)
def test_what_a_sender_writes_is_no_line_of_ours_when_it_is_tried_again(
    salmon: Salmon, lines: bytes
) -> None:
    """No one is told of what is refused of an automatic message, and it is kept as it came."""
    salmon.handle("bad@.*", fails(550))
    salmon.handle("good@.*")
    data = lines.replace(b"\n", b"\r\n") + b"Precedence: bulk\r\n" + MESSAGE
    exchange(salmon, "good@example.org", "bad@example.org", data=data)
    [kept] = salmon.undeliverable()
    envelope, reason, message = unpack_undeliverable(kept)
    assert envelope.recipients == ("bad@example.org",)
    assert reason.startswith("refused with 550") and message.startswith(lines)
    again = with_reason(kept, "another")
    assert unpack_undeliverable(again) == (envelope, "another", message)
