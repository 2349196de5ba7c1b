"""Who is told of a failure."""

from __future__ import annotations

import email
from email.message import Message

import pytest
from support.collecting import exchange
from support.salmon import Salmon, fails

from salmon_revsmtp import Envelope, QueueConsumer
from salmon_revsmtp.delivery.trace import stored_envelope, unpack

GOOD, BAD = "good@example.org", "bad@example.org"


def good_and_bad(salmon: Salmon) -> None:
    salmon.handle("good@.*")
    salmon.handle("bad.*@.*", fails(550, "5.1.1 no such user"))


def consume(salmon: Salmon) -> None:
    QueueConsumer(relay=lambda: salmon.relay).start(one_shot=True)


def told_of(salmon: Salmon) -> list[Message]:
    """The recipients' blocks in all notifications."""
    blocks: list[Message] = []
    for _, _, text in salmon.relayed:
        [status] = [
            part
            for part in email.message_from_string(text).walk()
            if part.get_content_type() == "message/delivery-status"
        ]
        _, *about = status.walk()
        blocks += about[1:]
    return blocks


# -- what the sender said is carried through the disk ---------------------------------------------


@pytest.mark.parametrize(("notify", "told"), [("NEVER", 0), ("SUCCESS,DELAY", 0), ("FAILURE", 1)])
def test_the_queue_carries_what_the_sender_wants_to_be_told(
    salmon: Salmon, notify: str, told: int
) -> None:
    good_and_bad(salmon)
    exchange(salmon, BAD, rcpt=f" NOTIFY={notify}", delivery="queue")
    consume(salmon)
    assert len(salmon.relayed) == told
    assert salmon.undeliverable() == [], "the sender knows, or does not want to"


def test_the_queue_carries_all_that_a_notification_is_made_of(salmon: Salmon) -> None:
    good_and_bad(salmon)
    exchange(
        salmon,
        BAD,
        mail=" RET=FULL ENVID=QQ+2B1",
        rcpt=" ORCPT=rfc822;Bad+2Bx@example.org",
        delivery="queue",
    )
    consume(salmon)
    [about] = told_of(salmon)
    assert about["Original-Recipient"] == "rfc822; Bad+x@example.org"
    [(_, _, text)] = salmon.relayed
    assert "Original-Envelope-Id: QQ+1\n" in text
    assert "Content-Type: message/rfc822\n" in text
    assert "X-Envelope-Parameters" not in text


@pytest.mark.parametrize("mode", ["router", "queue"])
def test_the_undeliverable_queue_has_it_too(salmon: Salmon, mode: str) -> None:
    exchange(salmon, BAD, mail=" ENVID=7", rcpt=" NOTIFY=NEVER", delivery=mode)
    if mode == "queue":
        consume(salmon)
    [kept] = salmon.undeliverable()
    assert kept.startswith(
        b"Return-Path: <ann@example.net>\nDelivered-To: bad@example.org\n"
        b"X-Envelope-Parameters: MAIL ENVID=7 RCPT NOTIFY=NEVER\nReceived: "
    )
    envelope, _ = unpack(kept)
    assert envelope.envelope_id == "7"
    assert not envelope.wants(BAD, "failed")


def test_a_handler_sees_nothing_of_it(salmon: Salmon) -> None:
    salmon.handle(".*")
    exchange(salmon, GOOD, mail=" ENVID=7", rcpt=" NOTIFY=NEVER", delivery="queue")
    consume(salmon)
    [message] = salmon.handled
    assert message.Data.startswith(b"Received: ")


def test_parameters_that_would_break_the_line_are_left_out() -> None:
    odd = {"ENVID": "a\nBcc: x", "RET": "FULL x", "SMTPUTF8": "", "X": "y"}
    rcpt = {"NOTIFY": "NEVER", "ORCPT": "rfc822;a\u00a0\u2028b"}
    envelope = Envelope("a@example.net", (BAD,), odd, {BAD: rcpt})
    stored = stored_envelope(envelope, BAD)
    assert stored.count(b"\n") == 3
    found, message = unpack(stored + b"Subject: x\n\nbody")
    assert (found.mail_options, found.rcpt_options) == ({"SMTPUTF8": ""}, {BAD: rcpt})
    assert message == b"Subject: x\n\nbody"
