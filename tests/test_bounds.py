"""What the parser would take too long for is kept and not parsed; what mail has is parsed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from email.header import decode_header
from email.message import Message
from email.utils import getaddresses

import pytest
from salmon import encoding, queue
from salmon.mail import MailRequest
from support.collecting import exchange
from support.salmon import Salmon, fails

from salmon_revsmtp import QueueConsumer
from salmon_revsmtp.delivery import bounds

MIB = 1024 * 1024

# Generous, for a busy machine: unbounded, each of these took minutes or hours.
SECONDS = 20.0


def multipart(number: int) -> bytes:
    return b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (number, number)


def parts(count: int, part: bytes) -> bytes:
    return b"Content-Type: multipart/mixed; boundary=b\n\n" + (b"--b\n" + part) * count


def field(value: bytes) -> bytes:
    return b"Subject: " + value + b"\n\nhello\n"


# What is said of each, and the message.
TOO_MUCH = {
    "a parameter list of semicolons in a quote": (
        "octets in a field with parameters",
        b'Content-Type: multipart/mixed;"' + b";" * 100_000 + b"\n\nhello\n",
    ),
    "a short one": (
        "parameters in a field",
        b'Content-Type: multipart/mixed;"' + b";" * 8_000 + b"\n\nhello\n",
    ),
    "the same in Content-Disposition": (
        "parameters in a field",
        b'X: y\nContent-Disposition: attachment;"' + b";" * 8_000 + b"\n\nhello\n",
    ),
    "the same in a part": (
        "parameters in a field",
        parts(2, b'content-type: text/plain;"' + b";" * 8_000 + b"\n\nhello\n"),
    ),
    "the same after a bare CR": (
        "parameters in a field",
        b'Subject: x\rContent-Type: text/plain;"' + b";" * 8_000 + b"\n\nhello\n",
    ),
    "nested multiparts and empty lines": (
        "parts within one another",
        b"".join(map(multipart, range(300))) + b"\n" * MIB,
    ),
    "few multiparts and many lines": (
        "comparisons of lines with boundaries",
        b"".join(map(multipart, range(40))) + b"\n" * MIB,
    ),
    "messages in messages": (
        "parts within one another",
        b"Content-Type: message/rfc822\n\n" * 2_000,
    ),
    "digests in digests": (
        "parts within one another",
        b"".join(
            b"Content-Type: multipart/digest; boundary=b%d\n\n--b%d\n\n" % (number, number)
            for number in range(500)
        ),
    ),
    "many parts": ("parts", parts(100_000, b"\n\n")),
    "many blocks of a delivery report": (
        "parts",
        b"Content-Type: message/delivery-status\n\n" + b"a: b\n\n" * 100_000,
    ),
    "a long boundary": (
        "characters in a boundary",
        b"Content-Type: multipart/mixed; boundary=" + b"b" * 5_000 + b"\n\n",
    ),
    "many fields": ("header fields", b"a: b\n" * 20_000 + b"\nhello\n"),
    "many fields in many parts": ("pairs of header fields", parts(50, b"a: b\n" * 900 + b"\n")),
    "a long field": ("octets in a header field", field(b"x" * 500_000)),
    "long headers": ("octets of headers", parts(100, (b"a: " + b"b" * 100_000 + b"\n\n"))),
    "a field of many lines": ("a folded header field", field(b"x" + b"\n x" * 50_000)),
    "a line of many words": ("pairs of words in a header line", field(b"a " * 32_000)),
    "many lines of many words": (
        "pairs of words in a header line",
        b"".join(b"X%d: " % number + b"a\t" * 490 + b"\n" for number in range(900)),
    ),
    "a group of many members": (
        "pairs of <>@,:;()[] in a field",
        b"To: a:" + b"b," * 32_000 + b"\n\nhello\n",
    ),
    "many encoded words": ("encoded words", field(b"=?utf-8?q?=FF?= a\n " * 9_000)),
    "encoded words without an end": (
        "octets after encoded words that do not end",
        field(b"=?utf-8?q?a" * 4_000),
    ),
    "a codec that is no charset": ("the charset punycode", field(b"=?punycode?q?a-b?=")),
    "a codec for a body": (
        "the charset idna",
        b'Content-Type: text/plain; charset="IDNA"\n\n' + b"xn--" + b"a" * 500_000 + b"\n",
    ),
    "a codec in pieces": (
        "the charset punycode",
        b"Content-Type: text/plain; charset*0*=''p%75ny; charset*1=code\n\n"
        + b"a" * 500_000
        + b"\n",
    ),
    "a codec in a part": (
        "the charset punycode",
        parts(2, b"Content-Type: text/plain;\n charset=Punycode\n\n" + b"a" * 500_000 + b"\n"),
    ),
}


@pytest.mark.parametrize(("said", "message"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_takes_the_parser_too_long_is_kept_unparsed(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, said: str, message: bytes
) -> None:
    salmon.handle(".*")
    began = time.monotonic()
    heard, report = exchange(
        salmon, "b@example.org", data=message.replace(b"\n", b"\r\n"), handler_timeout=60
    )
    assert time.monotonic() - began < SECONDS
    assert heard[0].startswith("250 2.0.0 kept, not parsed: ") and said in heard[0]
    assert report.messages == 1
    assert salmon.handled == []
    [kept] = salmon.undeliverable()
    lines, _, content = kept.partition(b"Received: ")
    assert lines.startswith(
        b"Return-Path: <ann@example.net>\nDelivered-To: b@example.org\n"
        b"X-Undeliverable-Reason: not parsed: "
    )
    assert said in lines.decode() and lines.count(b"\n") == 3
    assert content.endswith(message.removesuffix(b"\n"))
    assert "not parsed: " in caplog.text and said in caplog.text


def test_the_consumer_keeps_it_too_and_goes_on(salmon: Salmon) -> None:
    salmon.handle(".*")
    _, bad = TOO_MUCH["a parameter list of semicolons in a quote"]
    envelope = b"Return-Path: <ann@example.net>\nDelivered-To: b@example.org\n"
    inbound = queue.Queue("run/inbound")
    inbound.push(envelope + bad)
    inbound.push(envelope + b"Subject: after\n\nhello\n")
    began = time.monotonic()
    QueueConsumer("run/inbound").start(one_shot=True)
    assert time.monotonic() - began < SECONDS
    assert [request["Subject"] for request in salmon.handled] == ["after"]
    [kept] = salmon.undeliverable()
    assert kept.startswith(envelope + b"X-Undeliverable-Reason: not parsed: ")
    assert kept.endswith(b"\n" + bad.removesuffix(b"\n"))
    assert len(inbound) == 0


def test_with_several_recipients_it_is_kept_for_each(salmon: Salmon) -> None:
    """And a notification about others does not parse it."""
    salmon.handle("a@.*", fails(550))
    _, bad = TOO_MUCH["a short one"]
    heard, _ = exchange(salmon, "a@example.org", "b@example.org", data=bad.replace(b"\n", b"\r\n"))
    assert heard[0].startswith("250 2.0.0 kept, not parsed")
    assert len(salmon.undeliverable()) == 2
    assert salmon.relayed == []


@pytest.mark.parametrize("long", ["recipient", "sender"])
def test_a_very_long_address_is_not_routed(salmon: Salmon, long: str) -> None:
    """A route may take the third power of its length."""
    salmon.handle("(.+)-(.+)-(.+)@(.+)-(.+)")
    address = "-" * 2_000 + "@example.org"
    recipient = address if long == "recipient" else "b@example.org"
    envelope = bounds.address_excess(address, "b@example.org")
    assert envelope == "an address of 2,012 characters (limit 512)"
    stored = f"Return-Path: <{address if long == 'sender' else ''}>\nDelivered-To: {recipient}\n"
    queue.Queue("run/inbound").push(stored.encode() + b"Subject: x\n\nhello\n")
    began = time.monotonic()
    QueueConsumer("run/inbound").start(one_shot=True)
    assert time.monotonic() - began < SECONDS
    assert salmon.handled == [] and len(salmon.undeliverable()) == 1


def test_a_first_line_of_blanks_takes_the_consumer_no_time(salmon: Salmon) -> None:
    """It looks for the envelope there, in a queue in which others put their mail, too."""
    salmon.handle(".*")
    queue.Queue("run/inbound").push(b"Return-Path:" + b" " * 200_000)
    began = time.monotonic()
    QueueConsumer("run/inbound").start(one_shot=True)
    assert time.monotonic() - began < SECONDS


# -- what mail has --------------------------------------------------------------------------------

RECIPIENTS = [f'"Example, Ann {number}" <ann.{number}@sales.example.net>' for number in range(1000)]
WORD = "=?utf-8?B?w4RubiBFeGFtcGxlIG1pdCBsYW5nZW0gTmFtZW4=?="
ENCODED = [f"{WORD}\n {WORD} <ann.{number}@sales.example.net>" for number in range(1000)]


def forwarded(times: int) -> bytes:
    if not times:
        return b"Subject: the first\n\nhello\n"
    boundary = b"b%d" % times
    inner = forwarded(times - 1)
    return (
        b"Subject: Fwd\nContent-Type: multipart/mixed; boundary=" + boundary + b"\n\n"
        b"--" + boundary + b"\n\nsee below\n--" + boundary + b"\n"
        b"Content-Type: message/rfc822\n\n" + inner + b"\n--" + boundary + b"--\n"
    )


def newsletter() -> bytes:
    """Alternatives, related images, and attachments: 6 MB of base64."""
    lines = (b"A" * 76 + b"\n") * 4_000
    image = b"Content-Type: image/png\nContent-Transfer-Encoding: base64\n\n" + lines
    html = b"Content-Type: text/html; charset=utf-8\n\n" + b"<p>hello</p>\n" * 10_000
    related = b"Content-Type: multipart/related; boundary=r\n\n--r\n" + html
    related += b"".join(b"\n--r\n" + image for _ in range(19)) + b"\n--r--\n"
    plain = b"Content-Type: text/plain; charset=utf-8\n\nhello\n"
    alternative = b"Content-Type: multipart/alternative; boundary=a\n\n--a\n" + plain
    alternative += b"--a\n" + related + b"--a--\n"
    return b"Content-Type: multipart/mixed; boundary=m\n\n--m\n" + alternative + b"--m--\n"


def digest() -> bytes:
    header = b"".join(b"X-Header-%d: what a list adds to its mail\n" % n for n in range(50))
    one = b"--b\n\n" + header + b"\n" + b"a line of the text\n" * 20
    return b"Content-Type: multipart/digest; boundary=b\n\n" + one * 500 + b"--b--\n"


def mail(*lines: str) -> bytes:
    return "\n".join([*lines, "", "hello", ""]).encode()


SIGNATURE = ";\n ".join(["v=1", "a=rsa-sha256", "d=example.net", "h=from:to", "b=" + "A" * 700])

EVERYDAY = {
    "1,000 recipients": mail("To: " + ",\n ".join(RECIPIENTS), "Cc: " + ",\n ".join(RECIPIENTS)),
    "1,000 recipients in a line": mail("To: " + ", ".join(RECIPIENTS)),
    "1,000 encoded": mail("To: " + ",\n ".join(ENCODED)),
    "1,000 encoded in a group": mail("To: all:" + ",\n ".join(ENCODED) + ";"),
    "References of 200": mail(
        "References: " + " ".join(f"<{number}.{'x' * 50}@example.net>" for number in range(200))
    ),
    "signatures": mail(*[f"{name}: {SIGNATURE}" for name in ("DKIM-Signature", "ARC-Seal")] * 20),
    "a long subject": mail("Subject: " + "\n ".join([WORD] * 50)),
    "a long file name": mail(
        "Content-Disposition: attachment;\n "
        + ";\n ".join(
            f"filename*{n}*={chr(39) * 2 if n == 0 else ''}%C3%84%C3%96" for n in range(99)
        )
    ),
    "a key in a header": mail("Autocrypt: keydata=" + "\n ".join(["A" * 76] * 200)),
    "S/MIME": mail(
        'Content-Type: multipart/signed; protocol="application/pkcs7-signature"; micalg=sha-256;',
        ' boundary="----=_Part"',
    ),
    "forwards of forwards": forwarded(24),
    "a newsletter": newsletter(),
    "a digest": digest(),
}


@pytest.mark.parametrize("message", EVERYDAY.values(), ids=EVERYDAY)
def test_what_mail_has_is_parsed(salmon: Salmon, message: bytes) -> None:
    salmon.handle(".*", lambda request: str(request))
    heard, _ = exchange(salmon, "b@example.org", data=message.replace(b"\n", b"\r\n"))
    assert heard[0].startswith("250 2.0.0 delivered")
    [handled] = salmon.handled
    assert handled.Data.endswith(message.removesuffix(b"\n"))


# -- at the limits --------------------------------------------------------------------------------

JUST_PARSED = {
    "parameters": b'Content-Type: text/plain;"' + b";" * 249 + b"a" * 7_900 + b"\n\n",
    "depth": b"".join(map(multipart, range(50))) + b"\n" * 190_000,
    "comparisons": b"".join(map(multipart, range(9))) + b"\n" * 1_000_000,
    "parts": parts(4_999, b"Content-Type: text/plain; charset=x\n\na\n"),
    "boundary": parts(0, b"")
    + b"".join(
        b"--b\nContent-Type: multipart/mixed; boundary=" + b"b" * 240 + b"%d\n\n" % number
        for number in range(4_000)
    ),
    "fields": b"".join(b"X-%d: a\n" % number for number in range(1_000)) + b"\n",
    "words": field(b"a " * 7_000),
    "members": b"To: a:" + b"b[" * 15_900 + b"\n\n",
    "encoded words": field(b"=?utf-8?q?=FF?= a\n " * 4_999),
    "no end": field(b"=?utf-8?q?a" * 1_300),
}


def everything(request: MailRequest) -> None:
    """What a handler may do with a message."""
    message: Message = request.base.mime_part
    values = [str(value) for part in message.walk() for _, value in part.items()]
    uses: list[Callable[[], object]] = [
        lambda: [(part.items(), part.body) for part in (request.base, *request.walk())],
        request.is_bounce,
        lambda: str(request),
        *(lambda value=value: getaddresses([value]) for value in values),
        *(lambda value=value: decode_header(value) for value in values),
    ]
    for use in uses:
        with contextlib.suppress(encoding.EncodingError, LookupError, ValueError):
            use()


@pytest.mark.skipif("COVERAGE_RUN" in os.environ, reason="it takes the time of the parser itself")
@pytest.mark.parametrize("message", JUST_PARSED.values(), ids=JUST_PARSED)
def test_what_is_just_within_a_limit_takes_seconds(salmon: Salmon, message: bytes) -> None:
    assert bounds.excess(message) is None
    began = time.thread_time()
    everything(MailRequest(("x", 0), "a@example.net", "b@example.org", message))
    assert time.thread_time() - began < SECONDS


@pytest.mark.parametrize(
    "text",
    [
        b"--\n",
        b"--b:x\na:b\n",
        b"a:\n",
        b"a:\n b\n",
        b"\r",
        b"--a:\n",
        b"x",
        b"=?x ",
        b"\n",
        b"--b\n",
    ],
)
@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"\n",
        b'Content-Type: multipart/mixed; boundary="b:x"\n\n--b:x\n',
        b"Content-Type: message/delivery-status\n\n",
        b"Content-Type: text/plain;",
    ],
)
def test_to_look_takes_a_time_that_grows_with_the_message(start: bytes, text: bytes) -> None:
    began = time.thread_time()
    bounds.excess(start + text * (MIB // len(text)))
    assert time.thread_time() - began < SECONDS
