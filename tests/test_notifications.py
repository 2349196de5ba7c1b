"""Who is told of a failure, how often, and what becomes of the message if no one is."""

from __future__ import annotations

import email
import errno
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
from salmon.routing import Router
from support.collecting import collect_from, exchange
from support.dialogue import Dialogue, no_more_mail
from support.messages import MESSAGE
from support.salmon import Salmon, fails

from salmon_revsmtp import Envelope, QueueConsumer
from salmon_revsmtp.delivery.automatic import why_automatic
from salmon_revsmtp.delivery.dsn import RecipientStatus
from salmon_revsmtp.delivery.rates import ADDRESS, ALL, DOMAIN, Limit, RateLimit
from salmon_revsmtp.delivery.reporter import Reporter
from salmon_revsmtp.delivery.trace import (
    split_envelope,
    stored_envelope,
    unpack,
    unpack_undeliverable,
)
from salmon_revsmtp.journal.counts import Change, CountJournal, Window

GOOD, BAD = "good@example.org", "bad@example.org"


def good_and_bad(salmon: Salmon) -> None:
    salmon.handle("good@.*")
    salmon.handle("bad.*@.*", fails(550, "5.1.1 no such user"))


def consume(salmon: Salmon, notifications: bool = True) -> None:
    consumer = QueueConsumer(relay=lambda: salmon.relay, notifications=notifications)
    consumer.start(one_shot=True)


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


# -- how often ---------------------------------------------------------------------------------


def test_a_forged_sender_hears_little_of_a_flood(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    """200 messages for one that is there and one that is not: ten notifications, one line in the
    log, and each message that is not told of is kept."""
    good_and_bad(salmon)
    sent = 0

    async def flood(provider: Dialogue) -> None:
        nonlocal sent
        await provider.reverse()
        for number in range(200):
            data = MESSAGE + b"%d\r\n" % number
            heard = await provider.send(data, GOOD, BAD, sender="victim@example.net")
            assert heard.startswith("250 ")
            sent += len(data) + 100
        await provider.quit()

    collect_from(salmon, flood, no_more_mail)
    assert [one.To for one in salmon.handled].count(GOOD) == 200
    assert len(salmon.relayed) == ADDRESS.messages
    assert sum(len(text) for _, _, text in salmon.relayed) < sent
    kept = [split_envelope(one)[:2] for one in salmon.undeliverable()]
    assert kept == [("victim@example.net", BAD)] * (200 - ADDRESS.messages)
    assert caplog.text.count("no notifications for the next") == 1
    # And after a restart.
    exchange(salmon, GOOD, BAD, sender="victim@example.net", data=MESSAGE + b"after\r\n")
    assert len(salmon.relayed) == ADDRESS.messages
    assert caplog.text.count("no notifications for the next") == 1
    # Others do hear.
    exchange(salmon, GOOD, BAD, sender="other@example.com")
    assert [to for _, to, _ in salmon.relayed][ADDRESS.messages :] == ["other@example.com"]


def test_999_recipients_that_fail_are_one_notification_and_one_message_kept(
    salmon: Salmon,
) -> None:
    good_and_bad(salmon)
    everyone = [f"bad{number}@example.org" for number in range(999)]
    exchange(salmon, GOOD, *everyone)
    [(_, _, text)] = salmon.relayed
    assert len(text) < sum(map(len, everyone))
    exchange(salmon, GOOD, *everyone, data=b"Precedence: bulk\r\n" + MESSAGE)
    [kept] = salmon.undeliverable()
    assert split_envelope(kept)[1] == "bad0@example.org"
    assert b"X-Failed-Recipients: bad0@example.org,\n bad1@example.org,\n" in kept
    failed, reason, message = unpack_undeliverable(kept)
    assert failed.recipients == tuple(everyone), "whoever tries it again tries it for all of them"
    assert reason.startswith("refused with 5") and "its sender is not told: " in reason
    assert message.startswith(b"Precedence: bulk\n")
    assert len(salmon.relayed) == 1


class Counts:
    """In memory, on a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1e9
        self.windows: dict[str, Window] = {}

    def update(self, names: Iterable[str], change: Change) -> None:
        known = {name: self.windows[name] for name in names if name in self.windows}
        self.windows.update(change(known, self.now))


def test_each_address_each_domain_and_all_together_have_a_limit() -> None:
    counts = Counts()
    rates = RateLimit(
        counts, address=Limit(2, 1000), domain=Limit(4, 1000), everyone=Limit(6, 1000)
    )

    def admitted(*mailboxes: str) -> list[bool]:
        return [rates.admit(one, 1) is None for one in mailboxes]

    same = ("ann@example.net", "ANN@Example.NET.", '"ann"@example.net', "ann+7@example.net")
    assert admitted(*same) == [True, True, False, False]
    assert admitted(*(f"{n}@example.net" for n in range(4))) == [True, True, False, False]
    assert admitted("a@example.com", "a@example.org", "a@example.edu") == [True, True, False]
    rows = len(counts.windows)
    assert not any(admitted(*(f"{n}@{n}.example.net" for n in range(100))))
    assert len(counts.windows) == rows, "what a flood of forged names costs"
    for moved in (3600, -86400):  # a clock that was set back, too
        counts.now += moved
        assert admitted(*same[:3]) == [True, True, False]


def test_octets_are_limited_too_and_the_first_that_is_held_back_is_told_apart() -> None:
    rates = RateLimit(Counts(), address=Limit(10, 1000))
    assert rates.admit("ann@example.net", 900) is None
    first, second = rates.admit("ann@example.net", 101), rates.admit("ann@example.net", 101)
    assert first is not None and first.first and first.whose == "ann@example.net"
    assert 3599 < first.seconds <= 3600
    assert second is not None and not second.first
    assert rates.admit("ann@example.net", 100) is None


def test_one_that_came_to_nothing_does_not_count() -> None:
    rates = RateLimit(Counts(), address=Limit(2, 1000))
    for _ in range(10):
        assert rates.admit("ann@example.net", 400) is None
        rates.take_back("ann@example.net", 400)
    assert [rates.admit("ann@example.net", 400) is None for _ in range(3)] == [True, True, False]


def test_the_limits_go_from_narrow_to_wide() -> None:
    assert ADDRESS < DOMAIN < ALL


def test_counts_are_shared_by_processes_and_kept_in_memory_without_a_journal(
    salmon: Salmon,
) -> None:
    one, other = RateLimit(CountJournal()), RateLimit(CountJournal())
    for _ in range(ADDRESS.messages // 2):
        assert one.admit("ann@example.net", 1) is None
        assert other.admit("ann@example.net", 1) is None
    assert one.admit("ann@example.net", 1) is not None
    assert RateLimit(CountJournal()).admit("ann@example.net", 1) is not None
    database = sqlite3.connect("run/revsmtp.sqlite3")
    database.execute("DROP TABLE counts")
    database.close()
    assert [one.admit("bob@example.net", 1) is None for _ in range(12)] == [True] * 10 + [False] * 2
    assert one.admit("ann@example.net", 1) is not None, "what it has counted, it knows"


def test_windows_that_are_over_are_deleted(salmon: Salmon) -> None:
    counts = CountJournal()

    def old(known: Mapping[str, Window], now: float) -> Mapping[str, Window]:
        return {f"n{number}": Window(now - 10 * 86400) for number in range(50)}

    counts.update([], old)
    RateLimit(counts).admit("ann@example.net", 1)
    database = sqlite3.connect("run/revsmtp.sqlite3")
    assert database.execute("SELECT count(*) FROM counts").fetchone() == (3,)
    database.close()


# -- who ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["router", "queue"])
def test_with_notifications_off_the_message_is_kept(
    salmon: Salmon, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    good_and_bad(salmon)
    caplog.set_level(logging.INFO)
    heard, _ = exchange(salmon, GOOD, BAD, delivery=mode, notifications=False)
    assert heard[0].startswith("250 ")
    if mode == "queue":
        consume(salmon, notifications=False)
    assert salmon.relayed == []
    [kept] = salmon.undeliverable()
    reverse_path, recipient, message = split_envelope(kept)
    assert (reverse_path, recipient) == ("ann@example.net", BAD)
    assert message.rstrip(b"\n").endswith(b"\n\n.hello")
    assert "is not told of 1 failed recipients (notifications are off); the message is kept" in (
        caplog.text
    )


AUTOMATIC = [
    "Auto-Submitted: auto-generated",
    "Auto-Submitted: auto-replied (vacation)",
    "AUTO-SUBMITTED:auto-notified; owner-email=x",
    "Precedence: bulk",
    "precedence: List",
    "Precedence: junk",
    "List-Id: <news.example.net>",
    "List-Unsubscribe:\r\n <mailto:leave@example.net>",
    "List-Post: NO",
    "X-Auto-Response-Suppress: All",
    "X-Auto-Response-Suppress: OOF, AutoReply",
    "X-Autoreply: yes",
    "Content-Type: multipart/report; report-type=delivery-status; boundary=x",
    "Content-Type:\r\n\tMultipart/Report;\r\n boundary=x",
    "Return-Path: <>",
    'From: "Mail Delivery" <MAILER-DAEMON@mx.example.net>',
    "From: mailer-daemon@mx.example.net",
]
BY_HAND = [
    "Auto-Submitted: no",
    "Auto-Submitted: No (really)",
    "Precedence: first-class",
    "X-Auto-Response-Suppress: None",
    "X-Autoreply: no",
    "Content-Type: multipart/mixed; boundary=report",
    "Return-Path: <ann@example.net>",
    "From: Not a mailer-daemon <ann@example.net>",
    "Subject: Precedence: bulk",
    "Subject: x\r\n Precedence: bulk",
    "X-List-Id: x",
]


@pytest.mark.parametrize("line", AUTOMATIC)
def test_what_says_that_it_is_automatic_is_told_nothing(salmon: Salmon, line: str) -> None:
    """RFC 3834 2."""
    good_and_bad(salmon)
    heard, _ = exchange(salmon, GOOD, BAD, data=line.encode() + b"\r\n" + MESSAGE)
    assert heard[0].startswith("250 ")
    assert salmon.relayed == []
    assert len(salmon.undeliverable()) == 1


@pytest.mark.parametrize("line", BY_HAND)
def test_what_a_person_sends_is_told(salmon: Salmon, line: str) -> None:
    good_and_bad(salmon)
    exchange(salmon, GOOD, BAD, data=line.encode() + b"\r\n" + MESSAGE)
    assert len(salmon.relayed) == 1 and salmon.undeliverable() == []


def test_what_a_body_says_makes_nothing_automatic() -> None:
    assert why_automatic("ann@example.net", b"Subject: x\n\nPrecedence: bulk\n") == ""
    assert why_automatic("ann@example.net", b"Subject: x\r\n\r\nPrecedence: bulk\r\n") == ""


@pytest.mark.parametrize(
    "sender",
    [
        "",
        "MAILER-DAEMON@example.net",
        "owner-news@example.net",
        "news-owner@example.net",
        "News-Request@example.net",
        "news-bounces@example.net",
        "news-bounces+bob=example.org@example.net",
        "bounce-1234@example.net",
        "bounces+77-ab@example.net",
        "bounce@example.net",
        "news-return-12-bob=example.org@example.net",
    ],
)
def test_a_sender_that_is_no_person_is_told_nothing(sender: str) -> None:
    assert why_automatic(sender, b"Subject: x\n\n")


@pytest.mark.parametrize(
    "sender",
    ["ann@example.net", "owner@example.net", "bouncer@example.net", "request@example.net"],
)
def test_a_sender_that_may_be_a_person_is(sender: str) -> None:
    assert why_automatic(sender, b"Subject: x\n\n") == ""


def test_what_is_automatic_is_found_in_linear_time() -> None:
    """A quadratic search would take hours."""
    for piece in (b"List-", b"From: (", b"\n ", b"Auto-Submitted: (((\n", b"From: <<<\n", b" \t"):
        why_automatic("a" * 3000 + "-bounce" * 300, b"From: x\n" + piece * (2**22 // len(piece)))
        why_automatic("ann@example.net", b"From: x\n" + piece * (2**22 // len(piece)))


def test_a_message_that_cannot_be_kept_either_stays_with_the_provider(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    good_and_bad(salmon)

    def full(stored: bytes) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Router, "UNDELIVERABLE_QUEUE", SimpleNamespace(push=full))
        heard, _ = exchange(salmon, GOOD, BAD, notifications=False)
    assert heard[0].startswith("452 4.3.1 ")
    heard, _ = exchange(salmon, GOOD, BAD, notifications=False)
    assert heard[0].startswith("250 ")
    assert len(salmon.undeliverable()) == 1
    assert [one.To for one in salmon.handled] == [GOOD, BAD], "each once"


def test_whoever_holds_mail_can_tell_of_it_too(tmp_path: Path) -> None:
    """A message in a file, which no one collected: late first, and failed then."""
    reporter = Reporter(lambda: "mx.example.net", RateLimit(Counts()))
    late = RecipientStatus(BAD, "delayed", "4.4.7", "held for 1 day", "x-hold", retry_until=2e9)
    over = RecipientStatus(BAD, "failed", "5.4.7", "held for 30 days", "x-hold")
    held = tmp_path / "held"
    for sender, header, options, told in (
        ("ann@example.net", b"", {}, [True, True]),
        ("ann@example.net", b"", {"NOTIFY": "FAILURE"}, [False, True]),
        ("ann@example.net", b"", {"NOTIFY": "NEVER"}, [False, False]),
        ("ann@example.net", b"Precedence: bulk\r\n", {}, [False, False]),
        ("", b"", {}, [False, False]),
    ):
        held.write_bytes(header + MESSAGE + b"x" * 3_000_000)
        made = []
        for status in (late, over):
            with held.open("rb") as file:
                envelope = Envelope(sender, (BAD,), {}, {BAD: options})
                notice = reporter.report(envelope, [status], file, arrived=1e9)
            made.append(notice.message is not None)
            assert bool(notice.why_not) == (notice.message is None and bool(notice.about))
        assert made == told


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
        b"X-Envelope-Parameters: MAIL ENVID=7 RCPT NOTIFY=NEVER\n"
        b"X-Undeliverable-Reason: no route takes it\nReceived: "
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
