"""A message is for handlers what Salmon's own receivers would have made of it."""

from __future__ import annotations

import email
import random
from email.message import Message
from typing import Any

import pytest
from salmon import encoding
from salmon.mail import MailRequest

from salmon_revsmtp.delivery.request import mail_request

HEADER = b"From: Ann <a@example.net>\nTo: b@example.org\nSubject: x\n"
TEXT = b"hello\n\nFrom here on\n--x\nContent-Type: text/html\n\nbye"

# What headers and texts are made of, so that it stands where it means something else, too.
PIECES = [
    *(
        b"\n",
        b"\n\n",
        b"\r",
        b"\r\n",
        b"\n\r\n",
        b" ",
        b"\t",
        b"\n folded",
        b":",
        b"--x\n",
        b"--x--\n",
    ),
    *(b"From: a@example.net\n", b"To: b@example.org\n", b"From x\n", b"no field\n", b"Subject: x"),
    *(b"Content-Type: text/plain; charset=utf-8\n", b"Content-Type: multipart/mixed; boundary=x\n"),
    *(b"Content-Type: message/rfc822\n", b"Content-Type: message/delivery-status\n"),
    *(b"Content-Type: nonsense\n", b"Content-Transfer-Encoding: base64\n", b"aGVsbG8=\n"),
    *("\u00e9\n".encode(), b"\xff\x00\x0c\x85\n", b"\x1c\n", b"=?utf-8?q?x?=\n"),
]


def _seen(part: encoding.MailBase) -> Any:
    """All that there is to be seen of a message."""
    parsed = vars(part.mime_part).copy()
    parsed["defects"] = [type(one) for one in parsed["defects"]]
    if part.parts:
        parsed["_payload"] = [_seen(one) for one in part.parts]
    elif isinstance(parsed["_payload"], list):
        parsed["_payload"] = [str(one) for one in parsed["_payload"]]
    return parsed


def same(message: bytes) -> None:
    peer, sender, recipient = ("192.0.2.1", 1), "a@example.net", "b@example.org"
    try:
        theirs = MailRequest(peer, sender, recipient, message)
    except Exception as error:
        with pytest.raises(type(error)):
            mail_request(peer, sender, recipient, message)
        return
    ours = mail_request(peer, sender, recipient, message)
    assert type(ours) is MailRequest
    for name in vars(theirs):
        if name != "base":
            assert getattr(ours, name) == getattr(theirs, name), name
    assert _seen(ours.base) == _seen(theirs.base)


@pytest.mark.parametrize(
    "message",
    [
        HEADER + b"\n" + TEXT,
        HEADER,
        HEADER[:-1],
        HEADER + b"\n",
        b"",
        b"\n",
        b"\n\n",
        b"\n\nFrom: x\n\n",
        b"no header\n\nat all",
        HEADER + b"no field\n\n" + TEXT,
        HEADER + b"\r\n" + TEXT,
        b"\xff\xfe\n\n\xff",
        HEADER + b"Content-Type: multipart/mixed; boundary=x\n\n" + TEXT,
        HEADER + b"Content-Type: multipart/mixed\n\n" + TEXT,
        HEADER + b"Content-Type: message/rfc822\n\n" + HEADER + b"\n" + TEXT,
        HEADER + b"Content-Type: text/plain; charset=utf-8\n\n" + "\u00e9\n\u2028x".encode(),
        HEADER + b"Content-Transfer-Encoding: base64\n\naGVsbG8=\n",
    ],
)
def test_a_message(message: bytes) -> None:
    same(message)


def test_messages_of_chance() -> None:
    chance = random.Random(15)
    for _ in range(3000):
        same(b"".join(chance.choices(PIECES, k=chance.randrange(1, 9))))


def test_the_text_of_a_message_without_parts_is_not_gone_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = []
    parser = email.message_from_string

    def parse(text: str) -> Message:
        read.append(text)
        return parser(text)

    monkeypatch.setattr(email, "message_from_string", parse)
    message = HEADER + b"\n" + b"line\n" * 100_000
    request = mail_request(("192.0.2.1", 1), "a@example.net", "b@example.org", message)
    assert sum(map(len, read)) == len(HEADER) + 1
    assert request.body() == "line\n" * 100_000
