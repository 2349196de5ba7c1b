"""Queue mode: what the queue keeps, and what becomes of it when the process dies."""

from __future__ import annotations

import errno
import mailbox
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.collecting import exchange
from support.salmon import Salmon, explodes, fails

from salmon_revsmtp import QueueConsumer, hookimpl
from salmon_revsmtp.delivery import maildir
from salmon_revsmtp.delivery.maildir import open_queue, push_safely
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.threads import Threads


def test_queue_mode_keeps_the_envelope_and_the_consumer_routes_by_it(salmon: Salmon) -> None:
    salmon.handle(".*")
    heard, report = exchange(salmon, "b@example.org", "c@example.org", delivery="queue")
    assert heard[0].startswith("250 2.6.0 queued")
    assert (report.messages, report.recipients) == (1, 2)
    assert salmon.handled == []
    inbound = queue.Queue("run/inbound")
    stored = sorted(inbound.mbox.get_bytes(key) for key in inbound.keys())
    assert [one.splitlines()[:2] for one in stored] == [
        [b"Return-Path: <ann@example.net>", b"Delivered-To: b@example.org"],
        [b"Return-Path: <ann@example.net>", b"Delivered-To: c@example.org"],
    ]
    QueueConsumer("run/inbound").start(one_shot=True)
    assert sorted(message.To for message in salmon.handled) == ["b@example.org", "c@example.org"]
    assert {message.From for message in salmon.handled} == {"ann@example.net"}
    assert salmon.handled[0].Data.startswith(b"Received: ")
    assert salmon.handled[0].Data.endswith(b"\n\n.hello")
    assert len(inbound) == 0


def test_the_consumer_deletes_after_handling(salmon: Salmon) -> None:
    there: list[int] = []
    salmon.handle(".*", lambda message: there.append(len(queue.Queue("run/inbound"))))
    exchange(salmon, "b@example.org", delivery="queue")
    QueueConsumer("run/inbound").start(one_shot=True)
    assert there == [1]
    assert len(queue.Queue("run/inbound")) == 0


def test_the_consumer_puts_off_what_a_handler_puts_off(salmon: Salmon) -> None:
    salmon.handle(".*", fails(451))
    exchange(salmon, "b@example.org", delivery="queue")
    QueueConsumer("run/inbound").start(one_shot=True)
    assert len(queue.Queue("run/inbound")) == 1


def test_what_a_handler_refuses_later_is_notified(salmon: Salmon) -> None:
    salmon.handle(".*", fails(550, "no"))
    exchange(salmon, "b@example.org", delivery="queue")
    QueueConsumer("run/inbound", relay=lambda: salmon.relay).start(one_shot=True)
    assert [(sender, to) for sender, to, _ in salmon.relayed] == [("<>", "ann@example.net")]
    assert len(queue.Queue("run/inbound")) == 0


def test_a_queue_that_cannot_be_written_leaves_the_mail_with_the_provider(salmon: Salmon) -> None:
    (salmon.folder / "file").touch()
    heard, report = exchange(salmon, "b@example.org", delivery="queue", queue="file/inbound")
    assert heard[0].startswith("451 4.3.0 ")
    assert report.messages == 0


# -- crashes -----------------------------------------------------------------------------------

# Handles the queue once; "die" in a message kills the process in the middle of its handler.
CONSUMER = """
import os, signal, sys
from salmon.routing import route, stateless
from salmon_revsmtp import QueueConsumer, hookimpl

@route(".*")
@stateless
def HANDLE(message):
    with open("handled", "a") as file:
        file.write(message["Subject"] + "\\n")
    if message["Subject"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)

consumer = QueueConsumer("run/inbound", sleep=3600)
if sys.argv[1:] == ["dies before it deletes"]:
    consumer.queue.remove = lambda key: os.kill(os.getpid(), signal.SIGKILL)
consumer.start(one_shot=sys.argv[1:] != ["for ever"])
"""


def consume(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-c", CONSUMER, *arguments], timeout=60).returncode


def handled() -> list[str]:
    return Path("handled").read_text().split()


def inbound() -> list[str]:
    return list(queue.Queue("run/inbound").keys())


def message(subject: str) -> bytes:
    return f"From: a@example.net\r\nSubject: {subject}\r\n\r\nhello\r\n".encode()


def test_a_crash_between_handled_and_deleted_is_no_second_handling(salmon: Salmon) -> None:
    exchange(salmon, "b@example.org", data=message("once"), delivery="queue")
    assert consume("dies before it deletes") == -signal.SIGKILL
    assert len(inbound()) == 1
    assert consume() == 0
    assert handled() == ["once"]
    assert inbound() == []


def test_a_message_that_kills_the_process_three_times_is_set_aside(salmon: Salmon) -> None:
    for subject in ("die", "after"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")
    for _ in range(3):
        assert consume() == -signal.SIGKILL
        assert len(inbound()) == 2
    assert consume() == 0
    assert handled() == ["die", "die", "die", "after"]
    assert inbound() == []
    [kept] = salmon.undeliverable()
    assert kept.startswith(b"Return-Path: <ann@example.net>\nDelivered-To: b@example.org\n")
    assert kept.endswith(b"Subject: die\n\nhello\n")


def test_a_message_that_cannot_be_set_aside_stays(salmon: Salmon, monkeypatch: Any) -> None:
    exchange(salmon, "b@example.org", data=message("die"), delivery="queue")
    for _ in range(3):
        consume()
    consumer = QueueConsumer("run/inbound")
    [key] = inbound()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = consumer.handle(key)
    assert reply is not None and reply.code == 452
    assert inbound() == [key]
    # When there is room it is set aside, and not tried a fourth time.
    assert consume() == 0
    assert handled() == ["die"] * 3
    assert len(salmon.undeliverable()) == 1


def test_a_queue_in_the_making_of_which_a_process_died(salmon: Salmon) -> None:
    Path("run/inbound/tmp").mkdir(parents=True)
    heard, _ = exchange(salmon, "b@example.org", delivery="queue")
    assert heard[0].startswith("250 ")


def other_names(folder: Path) -> list[str]:
    """The queue ``run/inbound`` by other names."""
    (folder / "link").symlink_to("run/inbound")
    (folder / "elsewhere").symlink_to(folder)
    absolute = str(folder / "run/inbound")
    relative = ["run/inbound", "run/inbound/", "./run//inbound", "run/../run/inbound"]
    return [absolute, *relative, "link", "elsewhere/run/inbound"]


def test_two_consumers_never_work_on_one_queue_whatever_they_call_it(salmon: Salmon) -> None:
    exchange(salmon, "b@example.org", data=message("once"), delivery="queue")
    names = other_names(salmon.folder)
    refused = []

    def others(request: MailRequest) -> None:
        for file in Path("run").glob("*.lock"):  # as somebody may who tidies up
            file.unlink()
        for name in names:
            with pytest.raises(RuntimeError, match="another consumer works on") as error:
                QueueConsumer(name).start(one_shot=True)
            refused.append(str(error.value))

    salmon.handle(".*", others)
    QueueConsumer("run/inbound").start(one_shot=True)
    assert len(refused) == len(names)
    assert len(salmon.handled) == 1
    assert salmon.undeliverable() == []


def test_a_queue_by_another_name_is_the_same_in_the_journal(salmon: Salmon) -> None:
    """Handled, not deleted, and the consumer starts again with another spelling."""
    names = other_names(salmon.folder)
    exchange(salmon, "b@example.org", data=message("once"), delivery="queue")
    assert consume("dies before it deletes") == -signal.SIGKILL
    for name in names:
        consumer = QueueConsumer(name)
        consumer.queue.remove = lambda key: None
        consumer.start(one_shot=True)
    assert handled() == ["once"]
    assert salmon.handled == [] and salmon.undeliverable() == []


def test_a_consumer_whose_queue_is_replaced_ends(salmon: Salmon) -> None:
    for subject in ("first", "second"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")

    def replace(request: MailRequest) -> None:
        Path("run/inbound").rename("run/aside")
        shutil.copytree("run/aside", "run/inbound")

    salmon.handle(".*", replace)
    with pytest.raises(RuntimeError, match="was deleted or replaced"):
        QueueConsumer("run/inbound").start(one_shot=True)
    assert len(salmon.handled) == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_behind_the_message_in_hand(
    salmon: Salmon, number: signal.Signals
) -> None:
    for subject in ("first", "second"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")

    def stop(request: MailRequest) -> None:
        os.kill(os.getpid(), number)

    salmon.handle(".*", stop)
    before = signal.getsignal(number)
    QueueConsumer("run/inbound", sleep=3600).start()
    assert len(salmon.handled) == 1
    assert len(inbound()) == 1
    assert signal.getsignal(number) is before


def test_it_may_be_stopped_from_another_thread(salmon: Salmon) -> None:
    exchange(salmon, "b@example.org", data=message("once"), delivery="queue")
    consumer = QueueConsumer("run/inbound", sleep=3600)
    salmon.handle(".*", lambda request: consumer.stop())
    thread = threading.Thread(target=consumer.start)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert inbound() == []


def test_two_files_with_the_same_octets_are_two_messages(salmon: Salmon) -> None:
    """As when somebody puts back what he has taken out."""
    salmon.handle(".*")
    target = queue.Queue("run/inbound")
    for _ in range(3):
        target.push(
            b"Return-Path: <a@example.net>\nDelivered-To: b@example.org\nSubject: hi\n\nx\n"
        )
        QueueConsumer("run/inbound").start(one_shot=True)
    assert len(salmon.handled) == 3
    assert inbound() == []


def test_a_message_that_is_taken_away_while_it_is_handled(salmon: Salmon) -> None:
    for subject in ("first", "second"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")
    salmon.handle(".*", lambda request: queue.Queue("run/inbound").clear())
    QueueConsumer("run/inbound").start(one_shot=True)
    assert len(salmon.handled) == 1


def test_a_file_that_cannot_be_read_does_not_keep_the_others(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    for subject in ("first", "second"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")
    salmon.handle(".*")
    consumer = QueueConsumer("run/inbound")
    bad, read = sorted(inbound())[0], consumer.queue.mbox.get_bytes

    def reads(key: str) -> bytes:
        if key == bad:
            raise OSError(5, "Input/output error")
        return bytes(read(key))

    monkeypatch.setattr(consumer.queue.mbox, "get_bytes", reads)
    consumer.start(one_shot=True)
    assert len(salmon.handled) == 1
    assert inbound() == [bad]


def test_a_relay_that_says_nothing_does_not_hold_the_consumer(salmon: Salmon) -> None:
    asked, go = threading.Event(), threading.Event()

    def silent(message: object, To: str, From: str) -> None:
        asked.set()
        assert go.wait(60)

    exchange(salmon, "b@example.org", data=message("no"), delivery="queue")
    salmon.handle(".*", fails(550, "no"))
    relay = SimpleNamespace(deliver=silent)
    consumer = QueueConsumer("run/inbound", sleep=3600, relay=lambda: relay)
    thread = threading.Thread(target=consumer.start)
    thread.start()
    try:
        assert asked.wait(60)
        consumer.stop()
        thread.join(60)
        assert not thread.is_alive()
        assert inbound() == []
    finally:
        go.set()


def unwritable(part: str) -> Callable[..., None]:
    """``os.rename`` and ``os.unlink`` where a folder of the queue is read-only.  The tests may be
    root's, whom modes do not stop."""
    denied = {"new": ("new",), "cur": ("cur",), "both": ("new", "cur")}[part]

    def refuse(*paths: Any, **keys: Any) -> None:
        for path in paths:
            if isinstance(path, str | Path) and Path(path).parent.name in denied:
                raise OSError(errno.EROFS, "Read-only file system", str(path))

    return refuse


@pytest.mark.parametrize("part", ["new", "cur", "both"])
def test_what_cannot_be_deleted_is_not_handled(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    for subject in ("first", "second"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")
    salmon.handle(".*")
    refuse = unwritable(part)
    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "remove"):
            # Python 3.10's pathlib has os's own from the beginning.
            for place in (os, Path) if hasattr(Path, name) else (os,):
                real = getattr(place, name)
                patch.setattr(
                    place, name, lambda *a, real=real, **k: (refuse(*a), real(*a, **k))[1]
                )
        for _ in range(2):
            QueueConsumer("run/inbound").start(one_shot=True)
    assert salmon.handled == [] and salmon.undeliverable() == []
    assert caplog.text.count("is not handled") == 2, "one line each time"
    assert len(inbound()) == 2
    QueueConsumer("run/inbound").start(one_shot=True)
    assert [one["Subject"] for one in salmon.handled] == ["first", "second"]
    assert inbound() == []


def test_one_that_cannot_be_deleted_does_not_keep_the_others(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be moved, and was handled; later it is not handled again."""
    for subject in ("first", "second"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")
    salmon.handle(".*")
    consumer = QueueConsumer("run/inbound")
    bad, remove = sorted(inbound())[0], consumer.queue.remove

    def removes(key: str) -> None:
        if key == bad:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        remove(key)

    monkeypatch.setattr(consumer.queue, "remove", removes)
    for _ in range(3):
        consumer.start(one_shot=True)
    assert [one["Subject"] for one in salmon.handled] == ["first", "second"]
    assert inbound() == [bad]
    QueueConsumer("run/inbound").start(one_shot=True)
    assert len(salmon.handled) == 2
    assert inbound() == []


def test_a_deferred_message_is_found_again_wherever_it_lies(salmon: Salmon) -> None:
    trouble = [1, 2, 3]

    def sometimes(request: MailRequest) -> None:
        if trouble:
            trouble.pop()
            raise SMTPError(451, "later")

    exchange(salmon, "b@example.org", data=message("once"), delivery="queue")
    salmon.handle(".*", sometimes)
    for _ in range(5):
        QueueConsumer("run/inbound").start(one_shot=True)
    assert len(salmon.handled) == 4
    assert inbound() == []


def test_two_files_of_one_name_do_not_overwrite_each_other(salmon: Salmon) -> None:
    exchange(salmon, "b@example.org", data=message("new"), delivery="queue")
    [key] = inbound()
    stored = Path("run/inbound/new", key).read_bytes()
    Path("run/inbound/cur", key).write_bytes(stored.replace(b"Subject: new", b"Subject: cur"))
    salmon.handle(".*")
    for _ in range(2):
        QueueConsumer("run/inbound").start(one_shot=True)
    assert sorted(one["Subject"] for one in salmon.handled) == ["cur", "new"]
    assert inbound() == []


@pytest.mark.parametrize("hours", [-4000, -1, 1, 4000])
def test_a_message_is_seen_whatever_the_clock_says(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    """The folders' times, too, go by a clock that is set."""
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    salmon.handle(".*")
    consumer = QueueConsumer("run/inbound")

    def arrive(subject: str) -> None:
        stored = b"Return-Path: <>\nDelivered-To: b@example.org\n" + message(subject)
        queue.Queue("run/inbound").push(stored.replace(b"\r\n", b"\n"))
        for part in ("new", "cur", "tmp"):
            os.utime(Path("run/inbound", part), (clock[0], clock[0]))

    def rounds(count: int) -> None:
        for _ in range(count):
            clock[0] += 10
            consumer.start(one_shot=True)

    arrive("first")
    rounds(2)
    clock[0] += hours * 3600
    rounds(1)
    arrive("second")
    rounds(1)
    assert [one["Subject"] for one in salmon.handled] == ["first", "second"]
    assert inbound() == []


def test_a_folder_below_home(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(salmon.folder))
    heard, _ = exchange(salmon, "b@example.org", delivery="queue", queue="~/mail/inbound")
    assert heard[0].startswith("250 ")
    assert len(queue.Queue(str(salmon.folder / "mail/inbound"))) == 1
    assert not Path("~").exists()


# -- handlers that hang -------------------------------------------------------------------------


class Hanging:
    """A handler that hangs in messages with the subject "hang" until it is let go."""

    def __init__(
        self, salmon: Salmon, after: Callable[[MailRequest], object] = lambda request: None
    ) -> None:
        self._go = threading.Event()
        self._after = after
        salmon.handle(".*", self._handle)

    def _handle(self, request: MailRequest) -> None:
        if request["Subject"] == "hang":
            assert self._go.wait(60)
            self._after(request)

    def let_go(self) -> None:
        """Returns when the threads of handlers have ended."""
        self._go.set()
        for thread in threading.enumerate():
            if thread.name == "handlers":
                thread.join(60)
                assert not thread.is_alive()


def handled_in(salmon: Salmon) -> list[str]:
    return [request["Subject"] for request in salmon.handled]


def test_a_handler_that_hangs_holds_up_its_own_message_only(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    """And what Salmon's lock around handlers holds up is freed."""
    for subject in ("hang", "after"):
        exchange(salmon, "b@example.org", data=message(subject), delivery="queue")
    handler = Hanging(salmon)
    QueueConsumer("run/inbound", handler_timeout=3).start(one_shot=True)
    assert handled_in(salmon) == ["hang", "after"]
    assert inbound() == []
    [kept] = salmon.undeliverable()
    assert kept.startswith(b"Return-Path: <ann@example.net>\nDelivered-To: b@example.org\n")
    assert kept.endswith(b"\nSubject: hang\n\nhello")
    assert "not handled in 3 seconds; the handler still runs" in caplog.text
    handler.let_go()
    QueueConsumer("run/inbound").start(one_shot=True)
    assert handled_in(salmon) == ["hang", "after"], "it is not handled a second time"


@pytest.mark.parametrize("end", [explodes, fails(550, "no"), fails(451, "later")])
def test_a_handler_that_fails_too_late_makes_no_second_copy(
    salmon: Salmon, end: Callable[[MailRequest], object]
) -> None:
    exchange(salmon, "b@example.org", data=message("hang"), delivery="queue")
    handler = Hanging(salmon, end)
    consumer = QueueConsumer("run/inbound", handler_timeout=0.2, relay=lambda: salmon.relay)
    consumer.start(one_shot=True)
    assert len(salmon.undeliverable()) == 1
    handler.let_go()
    assert len(salmon.undeliverable()) == 1
    assert salmon.relayed == [], "no one is told of a refusal that came too late"


def test_what_cannot_be_kept_stays_and_is_not_handled_while_its_handler_runs(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange(salmon, "b@example.org", data=message("hang"), delivery="queue")
    handler = Hanging(salmon)
    consumer = QueueConsumer("run/inbound", handler_timeout=1)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for _ in range(3):
            consumer.start(one_shot=True)
    [key] = inbound()
    handler.let_go()
    reply = consumer.handle(key)
    assert reply is not None and str(reply).startswith("250 2.0.0 delivered")
    assert handled_in(salmon) == ["hang"]
    assert inbound() == [] and salmon.undeliverable() == []


def test_a_consumer_whose_handlers_all_hang_ends(salmon: Salmon) -> None:
    for number in range(12):
        stored = b"Return-Path: <>\nDelivered-To: b@example.org\nSubject: hang\n\n%d\n" % number
        queue.Queue("run/inbound").push(stored)
    handler = Hanging(salmon)
    try:
        with pytest.raises(
            RuntimeError, match=r"10 handlers have not returned in 0\.1 seconds each"
        ):
            QueueConsumer("run/inbound", handler_timeout=0.1).start()
        assert len(salmon.handled) == 10
        assert len(salmon.undeliverable()) == 10
        assert len(inbound()) == 2
    finally:
        handler.let_go()


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_handler_timeout_is_seconds_above_0(salmon: Salmon, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"handler_timeout: found .*, allowed: seconds above 0"):
        QueueConsumer("run/inbound", handler_timeout=seconds)


@pytest.mark.parametrize("safe", [False, True])
def test_threads_that_store_in_the_same_microsecond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool
) -> None:
    """None takes the name that another has taken, and overwrites its message; and all are named as
    Salmon's are."""
    at = SimpleNamespace(time=lambda: 1.5)
    for module in (maildir, mailbox, queue):
        monkeypatch.setattr(module, "time", at)
    opened = queue.Queue(str(tmp_path / "q"), safe=safe)

    def push(number: int) -> str:
        return push_safely(opened, b"%d\n" % number)

    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(push, range(300)))
    stored = [(tmp_path / "q/new" / key).read_bytes() for key in keys]
    assert stored == [b"%d\n" % number for number in range(300)]
    salmons = str(opened.push(b"x\n"))
    assert {re.sub("Q[0-9]+", "", key) for key in keys} == {re.sub("Q[0-9]+", "", salmons)}


def test_threads_that_make_a_queue_at_the_same_time(tmp_path: Path) -> None:
    ready = threading.Barrier(8)

    def make(number: int) -> None:
        ready.wait(60)
        for one in range(20):
            open_queue(tmp_path / str(one))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make, range(8)))


@pytest.mark.parametrize("octets", [0, 1, 1024**2 - 1, 1024**2, 3 * 1024**2 + 5])
@pytest.mark.parametrize("taken", [None, 7_000])
def test_what_is_stored_is_what_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, octets: int, taken: int | None
) -> None:
    """However large it is, and however little the system takes at a time."""
    if taken is not None:
        monkeypatch.setattr(os, "writev", lambda file, data: os.write(file, data[0][:taken]))
    content = (b"%d\n" % octets * (octets // 2 + 1))[:octets]
    key = push_safely(open_queue(tmp_path / "q"), b"A: b\n", b"", memoryview(content), b"\n")
    assert (tmp_path / "q/new" / key).read_bytes() == b"A: b\n" + content + b"\n"


def test_what_a_closed_thread_was_to_sync_is_synced_all_the_same(tmp_path: Path) -> None:
    inbound = open_queue(tmp_path / "inbound")
    threads, held, let_go = Threads("sync", 1), threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        let_go.wait(60)

    threads.submit(hold)
    assert held.wait(60)
    messages = [maildir.Unsynced(inbound, b"Subject: x\n\n%d\n" % number) for number in range(4)]
    threading.Timer(0.2, threads.close).start()  # the shares of the others have not begun
    kept = maildir.keep_together(messages, threads)
    let_go.set()
    assert kept == [one.key for one in messages]
    assert {*kept} == {path.name for path in (tmp_path / "inbound/new").iterdir()}
    assert list((tmp_path / "inbound/tmp").iterdir()) == []


def test_a_hook_that_tries_to_end_the_process_leaves_nothing_open(salmon: Salmon) -> None:
    class Ends:
        asked = 0

        @hookimpl
        def message_received(self) -> None:
            Ends.asked += 1
            if Ends.asked == 2:
                raise SystemExit(1)

    plugins = Plugins.load()
    plugins.register(Ends())
    heard, _ = exchange(
        salmon, "b@example.org", "c@example.org", times=2, plugins=plugins, delivery="queue"
    )
    assert [one[:3] for one in heard] == ["451", "250"]
    inbound = queue.Queue("run/inbound")
    stored = sorted(inbound.mbox.get_bytes(key).split(b"\n")[1] for key in inbound.keys())
    assert len(stored) == 2 and len(set(stored)) == 2, "each once"
    assert list(Path("run/inbound/tmp").iterdir()) == []
