"""Notifications on their way: what waits, what goes out, what is given up."""

from __future__ import annotations

import contextlib
import os
import smtplib
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from salmon.server import Relay as SalmonRelay
from support.salmon import Salmon

from salmon_revsmtp.delivery.maildir import by_age
from salmon_revsmtp.delivery.outbox import GIVE_UP, GIVEN_UP, Outbox
from salmon_revsmtp.delivery.trace import unpack_undeliverable
from salmon_revsmtp.files import FolderLock

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


def put(outbox: Outbox, *recipients: str) -> None:
    for recipient in recipients:
        outbox.put(recipient, NOTICE)


def test_what_is_put_in_goes_out_once_oldest_first(relay: Relay) -> None:
    outbox = Outbox(lambda: relay)
    outbox.send()
    put(outbox, "ann@example.net", "bob@example.net")
    outbox.send()
    assert relay.sent == [
        ("<>", "ann@example.net", NOTICE.decode()),
        ("<>", "bob@example.net", NOTICE.decode()),
    ]
    outbox.send()
    assert len(relay.sent) == 2 and keys() == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(111, "x"), "Connection refused; is it running, is the port right?"),
        (smtplib.SMTPServerDisconnected("gone"), "it broke the connection off (gone)"),
        (smtplib.SMTPAuthenticationError(535, b"who?"), "logging in, it said 535 who?; check user"),
        (AttributeError("settings has no relay"), "asking the relay Relay: settings has no relay"),
    ],
)
def test_while_the_relay_is_down_all_wait(
    relay: Relay, error: Exception, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net", "bob@example.net")
    relay.fails["*"] = error
    outbox.send()
    outbox.send()
    assert relay.asked == ["ann@example.net"] * 2, "one try, not one a notification"
    assert len(keys()) == 2
    assert caplog.text.count("was not sent") == 1 and words in caplog.text
    relay.fails.clear()
    Outbox(lambda: relay).send()
    assert [to for _, to, _ in relay.sent] == ["ann@example.net", "bob@example.net"]


@pytest.mark.parametrize(
    "error",
    [
        smtplib.SMTPRecipientsRefused({"ann@example.net": (450, b"greylisted")}),
        smtplib.SMTPDataError(451, b"later"),
        smtplib.SMTPSenderRefused(451, b"later", "<>"),
    ],
)
def test_one_that_must_wait_does_not_hold_up_the_others(relay: Relay, error: Exception) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net", "bob@example.net")
    relay.fails["ann@example.net"] = error
    outbox.send()
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
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net")
    relay.fails["*"] = error
    outbox.send()
    assert keys() == [] and relay.asked == ["ann@example.net"]
    [kept] = salmon.undeliverable()
    envelope, reason, message = unpack_undeliverable(kept)
    assert (envelope.reverse_path, envelope.recipients) == ("", ("ann@example.net",))
    assert reason.startswith(f"{GIVEN_UP}: ") and "no " in reason
    assert message == NOTICE


@pytest.mark.parametrize("error", [None, smtplib.SMTPDataError(554, b"no bounces here")])
def test_one_that_is_deleted_meanwhile_does_not_end_the_round(
    salmon: Salmon, relay: Relay, error: Exception | None
) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net", "bob@example.net", "cat@example.net")
    first, second, _ = by_age(keys())

    class Deletes(Relay):
        def deliver(self, message: Any, To: str, From: str) -> None:
            for key in (first, second):
                Path("run/unsent/new", key).unlink(missing_ok=True)
            super().deliver(message, To, From)

    deletes = Deletes()
    if error is not None:
        deletes.fails["ann@example.net"] = error
    outbox._relay = lambda: deletes
    outbox.send()
    assert deletes.asked == ["ann@example.net", "cat@example.net"] and keys() == []


def test_one_that_has_waited_too_long_is_given_up(salmon: Salmon, relay: Relay) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net", "bob@example.net")
    relay.fails["*"] = ConnectionRefusedError("no relay")
    old = Path("run/unsent/new", by_age(keys())[0])
    os.utime(old, (time.time() - GIVE_UP - 60,) * 2)
    outbox.send()
    assert len(keys()) == 1
    assert len(salmon.undeliverable()) == 1


@pytest.mark.parametrize("days", [-4000, -8, 8, 4000])
def test_a_wall_clock_that_is_set_makes_no_notification_expire(
    salmon: Salmon, relay: Relay, monkeypatch: pytest.MonkeyPatch, days: float
) -> None:
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    relay.fails["*"] = ConnectionRefusedError("no relay")

    def round_() -> None:
        for file in Path("run/unsent/new").iterdir():
            if file.name not in known:  # put by the wall clock of the moment
                os.utime(file, (clock[0], clock[0]))
                known.add(file.name)
        Outbox(lambda: relay).send()

    known: set[str] = set()
    outbox = Outbox(lambda: relay)
    put(outbox, "before@example.net")
    round_()
    clock[0] += days * 86400
    put(outbox, "after@example.net")
    for _ in range(3):
        round_()
        clock[0] += 3600
    assert len(keys()) == 2 and salmon.undeliverable() == []
    # And in the end both do.
    for _ in range(24 * 6):
        round_()
        clock[0] += 3600
    assert keys() == [] and len(salmon.undeliverable()) == 2


def test_two_processes_never_send_at_once(relay: Relay) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net")
    with FolderLock(Path("run/unsent").resolve()).hold() as other:
        assert other.had
        outbox.send()
        assert relay.asked == []
    outbox.send()
    assert len(relay.sent) == 1


def test_an_address_that_the_relay_cannot_be_told_of_is_given_up(salmon: Salmon) -> None:
    """Salmon's own relay, which knows no SMTPUTF8."""
    with listening() as (port, taken):
        relay = SalmonRelay(host="127.0.0.1", port=port)
        outbox = Outbox(lambda: relay)
        put(outbox, "δοκιμή@example.net", "bob@example.net")
        outbox.send()
        assert taken == ["RCPT TO:<BOB@EXAMPLE.NET>"]
    assert keys() == []
    assert len(salmon.undeliverable()) == 1


def test_a_relay_that_breaks_off_behind_the_notification_has_it(salmon: Salmon) -> None:
    with listening(quits=False) as (port, taken):
        relay = SalmonRelay(host="127.0.0.1", port=port)
        outbox = Outbox(lambda: relay)
        put(outbox, "ann@example.net", "bob@example.net")
        for _ in range(3):
            outbox.send()
        assert taken == ["RCPT TO:<ANN@EXAMPLE.NET>", "RCPT TO:<BOB@EXAMPLE.NET>"]
    assert keys() == []


def test_one_that_was_sent_and_cannot_be_deleted_is_not_sent_again(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net")

    def stuck(self: object, key: str) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(queue.Queue, "remove", stuck)
        outbox.send()
        outbox.send()
    assert len(keys()) == 1
    outbox.send()
    assert len(relay.sent) == 1
    assert keys() == []


def test_after_a_thread_that_could_not_be_started_notifications_go_out_again(
    relay: Relay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net")

    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        outbox.send_soon()
    assert "can't start new thread" in caplog.text
    outbox.wait(1)
    outbox.send_soon()
    outbox.wait(60)
    assert [to for _, to, _ in relay.sent] == ["ann@example.net"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_thread_that_died_notifications_go_out_again(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net")

    def dies(self: Outbox) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "send", dies)
        outbox.send_soon()
        outbox.wait(60)
    outbox.send_soon()
    outbox.wait(60)
    assert [to for _, to, _ in relay.sent] == ["ann@example.net"]


@contextlib.contextmanager
def listening(quits: bool = True) -> Iterator[tuple[int, list[str]]]:
    """A relay that takes everything and, unless it ``quits``, has no answer to QUIT."""
    taken: list[str] = []

    class Taking(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 relay\r\n")
            for line in self.rfile:
                command = line.decode().strip()
                if command.upper().startswith("QUIT"):
                    self.wfile.write(b"221 bye\r\n" if quits else b"")
                    return
                if command.upper().startswith("RCPT"):
                    taken.append(command.upper())
                if command.upper() == "DATA":
                    self.wfile.write(b"354 go on\r\n")
                    while self.rfile.readline() != b".\r\n":
                        pass
                self.wfile.write(b"250 ok\r\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False  # Salmon's relay leaves a connection open when it raises

    with Server(("127.0.0.1", 0), Taking) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1], taken
        finally:
            server.shutdown()
            thread.join()


# -- because a person says so ----------------------------------------------------------------------


def test_chosen_ones_go_now_and_each_has_its_own_answer(salmon: Salmon, relay: Relay) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net", "bob@example.net", "cid@example.net", "dan@example.net")
    ann, bob, cid, dan = by_age(keys())
    relay.fails = {
        "bob@example.net": smtplib.SMTPDataError(451, b"later"),
        "cid@example.net": smtplib.SMTPDataError(554, b"never"),
    }
    answers = list(outbox.send_now([ann, bob, cid, "17"]))
    assert [(key, done) for key, done, _ in answers] == [
        (ann, True),
        (bob, False),
        (cid, False),
        ("17", False),
    ]
    assert "later" in answers[1][2] and "undeliverable now" in answers[2][2]
    assert by_age(keys()) == [bob, dan] and len(salmon.undeliverable()) == 1
    assert "later" in outbox.reasons()[bob]
    assert [to for _, to, _ in relay.sent] == ["ann@example.net"]


def test_what_is_said_while_the_relay_is_down_is_kept_for_all_that_wait(relay: Relay) -> None:
    outbox = Outbox(lambda: relay)
    put(outbox, "ann@example.net", "bob@example.net")
    relay.fails["*"] = ConnectionRefusedError("no relay")
    outbox.send()
    assert set(outbox.reasons()) == set(keys())
    assert all("no relay" in one for one in Outbox(lambda: relay).reasons().values())
    before = Path("run/unsent/tried").stat()
    list(outbox.send_now(keys()))
    after = Path("run/unsent/tried").stat()
    assert after.st_mtime_ns == before.st_mtime_ns, "the time of the last round is as before"
    assert after.st_mode & 0o777 == 0o600
