"""Notifications on their way: what waits, what goes out, what is given up."""

from __future__ import annotations

import fcntl
import os
import smtplib
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Salmon
from salmon import queue

from salmon_revsmtp.delivery.unsent import GIVE_UP, Unsent

NOTICE = b"Subject: Undelivered mail\nTo: ann@example.net\n\nsorry\n"


class Relay:
    """Salmon's relay, which does as it is told."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str]] = []
        self.asked: list[str] = []
        self.fails: dict[str, Exception] = {}

    def deliver(self, message: Any, To: str, From: str) -> None:
        self.asked.append(To)
        if error := self.fails.get(To) or self.fails.get("*"):
            raise error
        self.sent.append((From, To, str(message)))


@pytest.fixture
def relay(salmon: Salmon) -> Relay:
    return Relay()


def keys() -> list[str]:
    return list(queue.Queue("run/unsent").keys())


def put(unsent: Unsent, *recipients: str) -> None:
    for recipient in recipients:
        unsent.put(recipient, NOTICE)


def test_what_is_put_in_goes_out_once_oldest_first(relay: Relay) -> None:
    woken: list[int] = []
    unsent = Unsent(lambda: relay, lambda: woken.append(1))
    assert not unsent.waiting
    unsent.send()
    put(unsent, "ann@example.net", "bob@example.net")
    assert unsent.waiting and len(woken) == 2
    unsent.send()
    assert relay.sent == [
        ("<>", "ann@example.net", NOTICE.decode()),
        ("<>", "bob@example.net", NOTICE.decode()),
    ]
    unsent.send()
    assert len(relay.sent) == 2 and keys() == []


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError("no relay"),
        smtplib.SMTPServerDisconnected("gone"),
        smtplib.SMTPAuthenticationError(535, b"who are you"),
        smtplib.SMTPDataError(451, b"later"),
        AttributeError("settings has no relay"),
    ],
)
def test_while_the_relay_is_down_all_wait(
    relay: Relay, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    unsent = Unsent(lambda: relay)
    put(unsent, "ann@example.net", "bob@example.net")
    relay.fails["*"] = error
    unsent.send()
    unsent.send()
    assert relay.asked == ["ann@example.net"] * 2, "one try, not one a notification"
    assert len(keys()) == 2
    assert caplog.text.count("was not sent") == 1
    relay.fails.clear()
    Unsent(lambda: relay).send()
    assert [to for _, to, _ in relay.sent] == ["ann@example.net", "bob@example.net"]


def test_one_recipient_that_must_wait_does_not_hold_up_the_others(relay: Relay) -> None:
    unsent = Unsent(lambda: relay)
    put(unsent, "ann@example.net", "bob@example.net")
    relay.fails["ann@example.net"] = smtplib.SMTPRecipientsRefused(
        {"ann@example.net": (450, b"greylisted")}
    )
    unsent.send()
    assert [to for _, to, _ in relay.sent] == ["bob@example.net"]
    assert len(keys()) == 1


@pytest.mark.parametrize(
    "error",
    [
        smtplib.SMTPRecipientsRefused({"ann@example.net": (550, b"no ann here")}),
        smtplib.SMTPDataError(554, b"no bounces here"),
        smtplib.SMTPSenderRefused(550, b"no null sender", "<>"),
    ],
)
def test_one_that_is_refused_is_given_up_and_kept_aside(
    salmon: Salmon, relay: Relay, error: Exception
) -> None:
    unsent = Unsent(lambda: relay)
    put(unsent, "ann@example.net")
    relay.fails["*"] = error
    unsent.send()
    assert keys() == [] and relay.asked == ["ann@example.net"]
    assert salmon.undeliverable() == [b"Return-Path: <>\nDelivered-To: ann@example.net\n" + NOTICE]


def test_one_that_has_waited_too_long_is_given_up(salmon: Salmon, relay: Relay) -> None:
    unsent = Unsent(lambda: relay)
    put(unsent, "ann@example.net", "bob@example.net")
    relay.fails["*"] = ConnectionRefusedError("no relay")
    old = Path("run/unsent/new", sorted(keys())[0])
    os.utime(old, (time.time() - GIVE_UP - 60,) * 2)
    unsent.send()
    assert len(keys()) == 1
    assert len(salmon.undeliverable()) == 1


def test_two_processes_never_send_at_once(relay: Relay) -> None:
    unsent = Unsent(lambda: relay)
    put(unsent, "ann@example.net")
    with Path("run/unsent.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        unsent.send()
        assert relay.asked == []
    unsent.send()
    assert len(relay.sent) == 1
