"""Sample mail of the kinds that mail really has: for the demo and for the tests.

Each is what a provider holds: an envelope and the octets of a message, CRLF line ends.  All of it
is made here, the same at every call.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["Sample", "samples"]

ATTACHMENT_OCTETS = 5 * 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """``kind`` is what is special about the message, in a few words."""

    kind: str
    envelope: Envelope
    data: bytes


def samples() -> list[Sample]:
    """All of them, in the order in which the provider took them."""
    return [
        _plain(),
        _attachment(),
        _utf8(),
        _encoded_headers(),
        _raw_header(),
        _dots(),
        _long_line(),
        _empty_body(),
        _bounce(),
        _three_recipients(),
        _rejected_by_parser(),
        _utf8_addresses(),
        _refused_by_handler(),
        _no_handler(),
    ]


def _sample(
    kind: str,
    headers: str,
    body: bytes = b"Hello.\r\n",
    sender: str = "sender@example.net",
    recipients: tuple[str, ...] = ("ada@example.org",),
    options: dict[str, str] | None = None,
) -> Sample:
    """A message whose headers are given one per line; From, To, Date and Message-ID are added
    where they are missing."""
    given = {line.partition(":")[0].lower() for line in headers.splitlines()}
    number = hashlib.sha256(kind.encode()).hexdigest()[:12]
    added = [
        f"{name}: {value}"
        for name, value in (
            ("From", f"Sender <{sender}>"),
            ("To", ", ".join(recipients)),
            ("Date", "Mon, 02 Nov 2026 09:30:00 +0100"),
            ("Message-ID", f"<{number}@example.net>"),
        )
        if name.lower() not in given
    ]
    lines = [*headers.splitlines(), *added]
    head = "".join(f"{line}\r\n" for line in lines).encode("utf-8", "surrogateescape")
    return Sample(kind, Envelope(sender, recipients, options or {}), head + b"\r\n" + body)


def _plain() -> Sample:
    return _sample("plain text", "Subject: plain text")


def _attachment() -> Sample:
    """Base64 of octets that no compressor gets smaller; 76 characters a line."""
    block = hashlib.sha512(b"attachment").digest() * 1024
    raw = (block * (ATTACHMENT_OCTETS // len(block) + 1))[:ATTACHMENT_OCTETS]
    encoded = base64.encodebytes(raw).replace(b"\n", b"\r\n")
    body = (
        b"--frontier\r\nContent-Type: text/plain\r\n\r\nThe file is attached.\r\n"
        b"--frontier\r\nContent-Type: application/octet-stream; name=data.bin\r\n"
        b"Content-Disposition: attachment; filename=data.bin\r\n"
        b"Content-Transfer-Encoding: base64\r\n\r\n" + encoded + b"--frontier--\r\n"
    )
    headers = (
        "Subject: 5 MB attached\nMIME-Version: 1.0\n"
        "Content-Type: multipart/mixed; boundary=frontier"
    )
    return _sample("multipart, 5 MB attached", headers, body)


def _utf8() -> Sample:
    headers = (
        "Subject: 8-bit text\nMIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\n"
        "Content-Transfer-Encoding: 8bit"
    )
    body = "Grüße aus Łódź — ¿qué tal? 你好\r\n".encode()
    return _sample("8-bit UTF-8 body", headers, body, options={"BODY": "8BITMIME"})


def _encoded_headers() -> Sample:
    headers = (
        "Subject: =?utf-8?B?R3LDvMOfZSBhdXM=?= =?iso-8859-2?Q?_=A3=F3d=BC?=\n"
        "From: =?utf-8?q?Ren=C3=A9?= <rene@example.net>"
    )
    return _sample("encoded headers", headers, sender="rene@example.net")


def _raw_header() -> Sample:
    """A header in Latin-1 that is not encoded, as old programs write it."""
    raw = b"Subject: caf\xe9 cr\xe8me".decode("utf-8", "surrogateescape")
    return _sample("raw 8-bit header", raw, options={"BODY": "8BITMIME"})


def _dots() -> Sample:
    body = b".\r\n..\r\n.dot\r\n...\r\nend.\r\n. \r\n.\r\n"
    return _sample("lines that begin with dots", "Subject: dots", body)


def _long_line() -> Sample:
    return _sample("a line of 998 octets", "Subject: long line", b"x" * 998 + b"\r\n")


def _empty_body() -> Sample:
    return _sample("empty body", "Subject: nothing to say", b"")


def _bounce() -> Sample:
    headers = "From: Mail Delivery System <MAILER-DAEMON@example.net>\nSubject: Undelivered mail"
    return _sample("a bounce from <>", headers, sender="", recipients=("bounces-17@example.org",))


def _three_recipients() -> Sample:
    recipients = ("ada@example.org", "grace@example.org", "alan@example.com")
    return _sample("three recipients", "Subject: to you all", recipients=recipients)


def _rejected_by_parser() -> Sample:
    """Salmon's parser decodes the From header where the reverse-path is null, and raises on this
    one: the message is undeliverable before any handler sees it."""
    return _sample("rejected by Salmon's parser", "From: =?x?b?/w?=\nSubject: broken", sender="")


def _utf8_addresses() -> Sample:
    headers = "From: <почта@example.net>\nTo: <δοκιμή@example.org>\nSubject: адреса"
    return _sample(
        "SMTPUTF8 addresses",
        headers,
        sender="почта@example.net",
        recipients=("δοκιμή@example.org",),
        options={"SMTPUTF8": "", "BODY": "8BITMIME"},
    )


def _refused_by_handler() -> Sample:
    recipients = ("order-anvil@example.com", "order-rope@example.com")
    return _sample("one of two refused by its handler", "Subject: order", recipients=recipients)


def _no_handler() -> Sample:
    recipients = ("nobody@example.org",)
    return _sample("no handler takes it", "Subject: anyone there?", recipients=recipients)
