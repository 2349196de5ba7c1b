"""The notification itself: what a program and a person read in it (RFC 3461, 3464, 6522, 6533)."""

from __future__ import annotations

import email
import io
import quopri
from email import policy
from email.message import EmailMessage, Message

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salmon_revsmtp import Envelope, Reply
from salmon_revsmtp.delivery.dsn import MAX_FULL, MAX_LISTED, RecipientStatus, notification

BOB = "b@example.org"
NO = RecipientStatus.failed(BOB, Reply(550, "5.1.1 no b here"))
HEADER = b"From: ann@example.net\r\nSubject: hi\r\n"
MESSAGE = HEADER + b"\r\nhello\r\n"


def envelope(
    mail: dict[str, str] | None = None, rcpt: dict[str, str] | None = None, recipient: str = BOB
) -> Envelope:
    return Envelope("ann@example.net", (recipient,), mail or {}, {recipient: rcpt or {}})


def parts_of(report: bytes) -> tuple[EmailMessage, EmailMessage, EmailMessage]:
    """The three parts, of a report in lines that every server takes."""
    assert max(map(len, report.split(b"\n"))) <= 998
    assert report.isascii() and b"\r" not in report and b"\x00" not in report
    whole = email.message_from_bytes(report, policy=policy.default)
    assert whole.get_content_type() == "multipart/report"
    assert whole.get_param("report-type") == "delivery-status"
    assert not whole.defects
    explanation, status, returned = whole.iter_parts()
    assert isinstance(explanation, EmailMessage) and explanation.get_content_type() == "text/plain"
    assert isinstance(status, EmailMessage) and isinstance(returned, EmailMessage)
    return explanation, status, returned


def blocks_of(status: EmailMessage) -> list[Message]:
    """The block of the message, and one per recipient."""
    if status.get_content_type() == "message/delivery-status":
        assert status["Content-Transfer-Encoding"] == "7bit"
        return list(status.iter_parts())
    assert status.get_content_type() == "message/global-delivery-status"
    text = decoded(status)
    return [email.message_from_bytes(one) for one in text.strip(b"\n").split(b"\n\n")]


def decoded(part: EmailMessage) -> bytes:
    """The octets of a part.  Of one whose type is a message, Python reads what is encoded."""
    if part.get_content_maintype() == "text":
        octets = part.get_payload(decode=True)
        assert isinstance(octets, bytes)
        return octets
    octets = part.as_bytes(policy=policy.compat32).partition(b"\n\n")[2]
    return (
        quopri.decodestring(octets)
        if part["Content-Transfer-Encoding"] == "quoted-printable"
        else octets
    )


def test_plain_ascii_goes_as_it_is() -> None:
    explanation, status, returned = parts_of(notification("h", envelope(), [NO], MESSAGE))
    for part in (explanation, status, returned):
        assert part["Content-Transfer-Encoding"] == "7bit"
    assert returned.get_content_type() == "text/rfc822-headers"
    assert decoded(returned) == HEADER.replace(b"\r\n", b"\n")


def test_what_the_sender_said_comes_back_decoded() -> None:
    """RFC 3461 4: xtext on the wire, the sender's own words in the report."""
    said = envelope({"ENVID": "QQ+2B1+3D+20x"}, {"ORCPT": "rfc822;Bob+2Btag@example.org"})
    whole, about = blocks_of(parts_of(notification("mx.example.org", said, [NO], MESSAGE))[1])
    assert whole["Original-Envelope-Id"] == "QQ+1= x"
    assert whole["Reporting-MTA"] == "dns; mx.example.org"
    assert about["Original-Recipient"] == "rfc822; Bob+tag@example.org"
    assert about["Final-Recipient"] == "rfc822; b@example.org"
    assert about["Action"] == "failed"
    assert about["Status"] == "5.1.1"
    assert about["Diagnostic-Code"] == "smtp; 550 5.1.1 no b here"


@pytest.mark.parametrize(
    ("orcpt", "shown"),
    [
        ("rfc822;bob+tag@example.org", "rfc822; bob+tag@example.org"),
        ("rfc822;bob+2@example.org", "rfc822; bob+2@example.org"),
        ("rfc822;bob+2b@example.org", "rfc822; bob+2b@example.org"),
        ("rfc822;bob+", "rfc822; bob+"),
        ("rfc822;a+0D+0ABcc:+20b", "rfc822; a Bcc: b"),
        ("rfc822;a+00b", "rfc822; a b"),
        ("x400;/C+3Dno/S+3Dbob/", "x400; /C=no/S=bob/"),
        ("rfc822;caf+C3+A9@example.org", r"utf-8; caf\x{E9}@example.org"),
        ("rfc822;caf+E9@example.org", r"rfc822; caf\xe9@example.org"),
        (r"utf-8;caf\x{E9}@example.org", r"utf-8; caf\x{E9}@example.org"),
        (r"utf-8;a\x{2B}b\x{D800}", r"utf-8; a\x{2B}b\x{5C}x{D800}"),
    ],
)
def test_an_original_recipient_that_is_no_xtext_is_its_own_meaning(orcpt: str, shown: str) -> None:
    report = notification("h", envelope(rcpt={"ORCPT": orcpt}), [NO], MESSAGE)
    _, about = blocks_of(parts_of(report)[1])
    assert about["Original-Recipient"] == shown


def test_a_header_in_no_known_charset_comes_back_octet_for_octet() -> None:
    everything = bytes(one for one in range(1, 256) if one not in b"\n")
    message = b"Subject: caf\xe9 = \xff\xfe \r\nX: " + everything + b" \n\nbody\n"
    _, _, returned = parts_of(notification("h", envelope(), [NO], message))
    assert decoded(returned) == b"Subject: caf\xe9 = \xff\xfe \nX: " + everything + b" \n"
    assert "\ufffd" not in returned.get_content()


@given(st.binary(max_size=300), st.binary(max_size=300))
@settings(deadline=None)
def test_any_header_comes_back_octet_for_octet(one: bytes, other: bytes) -> None:
    message = b"A: " + one.replace(b"\n", b"") + b"\n\t" + other.replace(b"\n", b"") + b"\n"
    _, _, returned = parts_of(notification("h", envelope(), [NO], message + b"\nbody"))
    assert decoded(returned) == message.replace(b"\r\n", b"\n")


@given(st.text(max_size=600))
@settings(deadline=None)
def test_any_diagnostic_is_one_field(text: str) -> None:
    refused = RecipientStatus(BOB, "failed", text, text, text, text)
    said = envelope({"ENVID": text}, {"ORCPT": f"rfc822;{text}"})
    _, status, _ = parts_of(notification("h", said, [refused], MESSAGE))
    _, about = blocks_of(status)
    wanted = ["Original-Recipient", "Final-Recipient", "Action", "Status"]
    assert about.keys()[:4] == wanted
    assert set(about.keys()[4:]) <= {"Remote-MTA", "Diagnostic-Code"}


def test_utf8_mail_is_told_of_in_utf8() -> None:
    """RFC 6533 3 to 5; encoded, for the relay may take ASCII only."""
    mailbox = "δοκιμή@example.org"
    said = envelope({"SMTPUTF8": ""}, {"ORCPT": r"utf-8;\x{3B4}x@example.org"}, mailbox)
    refused = [RecipientStatus.failed(mailbox, Reply(550, "no"))]
    message = "Subject: καλημέρα\r\n\r\nbody\r\n".encode()
    explanation, status, returned = parts_of(notification("h", said, refused, message))
    assert mailbox in explanation.get_content()
    assert status.get_content_type() == "message/global-delivery-status"
    assert "Final-Recipient: utf-8; δοκιμή@example.org\n".encode() in decoded(status)
    assert "Original-Recipient: utf-8; δx@example.org\n".encode() in decoded(status)
    assert returned.get_content_type() == "message/global-headers"
    assert decoded(returned).strip() == "Subject: καλημέρα".encode()
    full = envelope({"SMTPUTF8": "", "RET": "FULL"}, {}, mailbox)
    _, _, returned = parts_of(notification("h", full, refused, message))
    assert returned.get_content_type() == "message/global"
    assert decoded(returned) == message.replace(b"\r\n", b"\n")


def test_a_utf8_recipient_of_a_sender_who_knows_no_utf8_is_told_of_in_ascii() -> None:
    mailbox = "δ@example.org"
    refused = [RecipientStatus.failed(mailbox, Reply(550, "no"))]
    report = notification("h", envelope(recipient=mailbox), refused, MESSAGE)
    _, about = blocks_of(parts_of(report)[1])
    assert about["Final-Recipient"] == r"utf-8; \x{3B4}@example.org"


def test_smtputf8_mail_that_is_ascii_is_told_of_as_any_other() -> None:
    report = notification("h", envelope({"SMTPUTF8": ""}), [NO], MESSAGE)
    _, status, returned = parts_of(report)
    assert status.get_content_type() == "message/delivery-status"
    assert returned.get_content_type() == "text/rfc822-headers"


def test_the_whole_message_comes_back_if_its_sender_asks_and_it_is_small() -> None:
    full = envelope({"RET": "FULL"})
    _, _, returned = parts_of(notification("h", full, [NO], MESSAGE))
    assert returned.get_content_type() == "message/rfc822"
    assert decoded(returned) == MESSAGE.replace(b"\r\n", b"\n")
    body = b"x" * 70 + b"\r\n"
    large = MESSAGE + body * (MAX_FULL // len(body))
    delayed = RecipientStatus(BOB, "delayed", "4.4.7")
    for said, status, message in (
        (envelope({"RET": "HDRS"}), NO, MESSAGE),
        (envelope(), NO, MESSAGE),
        (full, NO, large),
        (full, delayed, MESSAGE),  # RFC 3461 4.3
        (full, NO, MESSAGE + b"caf\xe9\r\n"),  # could only go altered
        (full, NO, MESSAGE + b"a\rb\x00\r\n"),
        (full, NO, MESSAGE + b"x" * 999 + b"\r\n"),
    ):
        report = notification("h", said, [status], message)
        _, _, returned = parts_of(report)
        assert returned.get_content_type() == "text/rfc822-headers"
        assert decoded(returned) == HEADER.replace(b"\r\n", b"\n")
        assert len(report) < 2000


def test_a_peer_that_takes_eight_bits_gets_them() -> None:
    full = envelope({"RET": "FULL"})
    message = MESSAGE + b"caf\xe9\r\n"
    report = notification("h", full, [NO], message, eight_bit=True)
    assert b"Content-Type: message/rfc822\nContent-Transfer-Encoding: 8bit\n\n" in report
    assert message.replace(b"\r\n", b"\n") in report


def test_of_a_file_no_more_is_read_than_comes_back() -> None:
    file = io.BytesIO(MESSAGE + b"x" * 10_000_000)
    _, _, returned = parts_of(notification("h", envelope(), [NO], file))
    assert decoded(returned) == HEADER.replace(b"\r\n", b"\n")
    assert file.tell() < 100_000


def test_many_recipients_are_one_short_list() -> None:
    everyone = [f"b{number}@example.org" for number in range(999)]
    refused = [RecipientStatus.failed(one, Reply(550, "5.1.1 no such user")) for one in everyone]
    report = notification("h", Envelope("ann@example.net", tuple(everyone)), refused, MESSAGE)
    explanation, status, _ = parts_of(report)
    assert len(blocks_of(status)) == 1 + MAX_LISTED
    text = explanation.get_content()
    assert text.count("no such user") == 1
    assert f"and to {999 - MAX_LISTED} others" in text
    commands = sum(len(f"RCPT TO:<{one}>\r\n") for one in everyone)
    assert len(report) < commands / 3


def test_no_list_of_long_addresses_or_answers_is_long() -> None:
    everyone = [f"{number}{'x' * 3000}@example.org" for number in range(999)]
    refused = [RecipientStatus.failed(one, Reply(550, "no " * 9000)) for one in everyone]
    report = notification("h", Envelope("ann@example.net", tuple(everyone)), refused, MESSAGE)
    explanation, status, _ = parts_of(report)
    assert 1 < len(blocks_of(status)) < MAX_LISTED
    assert "others" in explanation.get_content()
    assert len(report) < 64 * 1024


def test_a_long_diagnostic_is_folded_and_unfolds_to_itself() -> None:
    refused = RecipientStatus.failed(BOB, Reply(550, "5.7.1 we  do not like this " * 9))
    report = notification("h", envelope(), [refused], MESSAGE)
    assert max(map(len, report.split(b"\n"))) < 90
    _, about = blocks_of(parts_of(report)[1])
    assert about["Diagnostic-Code"].replace("\n", "") == f"smtp; {refused.diagnostic}"


def test_delays_and_successes_are_told_as_such() -> None:
    late = RecipientStatus(
        BOB, "delayed", "4.4.1", "nothing answers", "x-net", "mail.example.org", retry_until=1.8e9
    )
    report = notification("h", envelope(), [late], MESSAGE, arrived=1.7e9)
    explanation, status, _ = parts_of(report)
    assert b"Subject: Delayed mail\n" in report
    assert "has not been delivered yet" in explanation.get_content()
    whole, about = blocks_of(status)
    assert whole["Arrival-Date"] is not None
    assert about["Action"] == "delayed" and about["Status"] == "4.4.1"
    assert about["Remote-MTA"] == "dns; mail.example.org"
    assert about["Diagnostic-Code"] == "x-net; nothing answers"
    assert about["Will-Retry-Until"] is not None
    done = RecipientStatus("c@example.org", "delivered", "2.0.0")
    expired = RecipientStatus(BOB, "failed", "4.4.7", "held for 30 days", "x-hold")
    report = notification("h", envelope(), [done, expired], MESSAGE)
    assert b"Subject: Undelivered mail\n" in report
    _, *each = blocks_of(parts_of(report)[1])
    assert [(one["Action"], one["Status"]) for one in each] == [
        ("delivered", "2.0.0"),
        ("failed", "4.4.7"),
    ]


@pytest.mark.parametrize(
    ("notify", "failed", "delayed", "delivered"),
    [
        (None, True, True, False),
        ("NEVER", False, False, False),
        ("FAILURE", True, False, False),
        ("delay", False, True, False),
        ("SUCCESS", False, False, True),
        ("SUCCESS,FAILURE,DELAY", True, True, True),
    ],
)
def test_the_sender_says_of_what_to_be_told(
    notify: str | None, failed: bool, delayed: bool, delivered: bool
) -> None:
    said = envelope(rcpt={} if notify is None else {"NOTIFY": notify})
    assert said.wants(BOB, "failed") is failed
    assert said.wants(BOB, "delayed") is delayed
    assert said.wants(BOB, "delivered") is delivered


@pytest.mark.parametrize("name", ["mail.example.org", "[192.0.2.1]", "[IPv6:2001:db8::1]"])
def test_it_comes_from_our_name(name: str) -> None:
    report = email.message_from_bytes(notification(name, envelope(), [NO], MESSAGE))
    assert report["From"] == f"Mail Delivery System <MAILER-DAEMON@{name}>"
    assert report["Message-ID"].endswith(f"@{name}>")


@pytest.mark.parametrize(
    "sender", ["ann@example.net", '"ann lee"@example.net', "δ@example.net", "a\u2028b@example.net"]
)
def test_it_goes_to_the_sender(sender: str) -> None:
    report = notification("h", Envelope(sender, (BOB,)), [NO], MESSAGE)
    whole = email.message_from_bytes(report, policy=policy.default)
    assert sender.isprintable() == (len(whole["To"].addresses) == 1)
    if sender.isascii():
        assert whole["To"].addresses[0].addr_spec == sender
