"""The record of deliveries: what it knows of a repeat, for how long, and without a disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from salmon_revsmtp.journal import clock as clock_module
from salmon_revsmtp.journal import connection as connection_module
from salmon_revsmtp.journal import deliveries as deliveries_module
from salmon_revsmtp.journal import file as file_module
from salmon_revsmtp.journal.attempts import Attempts
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.journal.deliveries import DeliveryJournal, DeliveryRecord, MessageKey
from salmon_revsmtp.journal.file import JournalFile
from salmon_revsmtp.smtp.replies import Reply

OK = Reply(250, "queued as 7", "2.6.0")
NO = Reply(550, "no such user\nnot here", None)
KEY = MessageKey.of("default", "ann@example.net", b"Subject: hi\r\n\r\nhello\r\n")
DAY = 86400.0
EVERYONE = ("b@example.org", "c@example.org", "d@example.org")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run/journal"


def journal(path: Path) -> DeliveryJournal:
    return DeliveryJournal(JournalConnection(path))


def replies(
    deliveries: DeliveryJournal, key: MessageKey = KEY, **window: float
) -> dict[str, Reply]:
    return {one: record.reply for one, record in deliveries.known(key, EVERYONE, **window).items()}


def test_a_delivery_is_known_with_its_reply_after_a_restart(path: Path) -> None:
    first = journal(path)
    assert first.known(KEY, EVERYONE) == {}
    first.record(KEY, "b@example.org", OK)
    first.record(KEY, "c@example.org", NO)
    assert replies(first) == {"b@example.org": OK, "c@example.org": NO}
    assert replies(journal(path)) == replies(first)


@pytest.mark.parametrize(
    "other",
    [
        KEY._replace(service="other"),
        KEY._replace(reverse_path=""),
        MessageKey.of("default", "ann@example.net", b"Subject: hi\r\n\r\nhello\r\n\r\n"),
    ],
)
def test_another_service_sender_or_octet_is_another_message(path: Path, other: MessageKey) -> None:
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    assert deliveries.known(other, EVERYONE) == {}


def test_what_was_deferred_is_no_delivery(path: Path) -> None:
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", Reply(451, "later"))
    assert deliveries.known(KEY, EVERYONE) == {}


def test_that_the_sender_was_notified_is_known(path: Path) -> None:
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    deliveries.record(KEY, "c@example.org", NO)
    deliveries.record_notified(KEY, deliveries.known(KEY, ["c@example.org"]))
    known = journal(path).known(KEY, EVERYONE)
    assert {one: record.notified for one, record in known.items()} == {
        "b@example.org": False,
        "c@example.org": True,
    }


class Time:
    """The machine's clocks, the wall clock and the seconds since boot; and which boot it is."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wall, self.up = time.time(), 1000.0
        patch.setattr(time, "time", lambda: self.wall)
        for module in (clock_module, deliveries_module):
            patch.setattr(module, "since_boot", lambda: self.up)
        self._patch = patch

    def passes(self, days: float) -> None:
        self.wall += days * DAY
        self.up += days * DAY

    def reboot(self, name: str) -> None:
        self.up = 10.0
        self._patch.setattr(clock_module, "_boot", lambda: name)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def test_outside_the_window_a_repeat_is_a_new_message(path: Path, now: Time) -> None:
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    now.passes(days=6.9)
    assert replies(deliveries) == {"b@example.org": OK}
    assert replies(deliveries, window=6 * DAY) == {}
    now.passes(days=0.2)
    assert replies(deliveries) == replies(journal(path)) == {}


@pytest.mark.parametrize("days", [-4000, -8, 8, 4000])
def test_a_wall_clock_that_is_set_makes_nothing_forgotten(
    path: Path, now: Time, days: float
) -> None:
    """In the running process, in the next one, and after a reboot at which it came up wrong."""
    running = journal(path)
    running.record(KEY, "b@example.org", OK)
    now.wall += days * DAY
    for other in (running, journal(path)):
        other._prune_at = 0.0
        other.record(KEY._replace(digest=b"after"), "b@example.org", OK)
        assert replies(other) == {"b@example.org": OK}
    now.reboot("another")
    now.wall += days * DAY
    rebooted = journal(path)
    rebooted.record(KEY._replace(digest=b"rebooted"), "b@example.org", OK)
    assert replies(rebooted) == {"b@example.org": OK}
    now.passes(days=7.1)
    assert replies(rebooted) == replies(journal(path)) == {}


def test_from_one_boot_to_the_next_no_more_than_a_day_passes(path: Path, now: Time) -> None:
    now.reboot("first")
    journal(path).record(KEY, "b@example.org", OK)
    for number in range(1, 9):
        now.wall += 30 * DAY
        now.reboot(f"boot {number}")
        deliveries = journal(path)
        assert replies(deliveries) == ({"b@example.org": OK} if number < 7 else {})
        deliveries.record(KEY._replace(digest=b"x"), "b@example.org", OK)


def test_old_rows_go_and_the_file_does_not_grow_for_ever(
    path: Path, now: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries_module, "PRUNE_ROWS", 10)
    deliveries = journal(path)
    for number in range(35):
        deliveries.record(KEY._replace(digest=b"%d" % number), "b@example.org", OK)
    now.passes(days=8)
    later = journal(path)
    for number in range(5):
        later.record(KEY._replace(digest=b"new %d" % number), "b@example.org", OK)
    rows = JournalFile(path).open().execute("SELECT count(*) FROM deliveries").fetchone()
    assert rows == (5,)


def killed(path: Path, *numbers: int) -> None:
    """A process that records a delivery of each of these messages, and is killed."""
    program = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from salmon_revsmtp.journal.connection import JournalConnection\n"
        "from salmon_revsmtp.journal.deliveries import DeliveryJournal, MessageKey\n"
        "from salmon_revsmtp.smtp.replies import Reply\n"
        "journal = DeliveryJournal(JournalConnection(Path(sys.argv[1])))\n"
        "for number in sys.argv[2:]:\n"
        "    key = MessageKey('default', '', number.encode())\n"
        "    journal.record(key, 'b@example.org', Reply(250, 'ok'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = [str(path), *map(str, numbers)]
    assert subprocess.run([sys.executable, "-c", program, *arguments], timeout=60).returncode < 0


def known(deliveries: DeliveryJournal, *numbers: int) -> list[int]:
    """Which of these messages are known to have been delivered."""
    keys = {number: MessageKey("default", "", b"%d" % number) for number in numbers}
    found = deliveries.known_all(dict.fromkeys(keys.values(), EVERYONE))
    return [number for number, key in keys.items() if found[key]]


def test_it_survives_the_process_being_killed(path: Path) -> None:
    killed(path, *range(100))
    assert known(journal(path), *range(100)) == list(range(100))


def test_another_process_knows_a_delivery_at_once(path: Path) -> None:
    first, second = journal(path), journal(path)
    assert replies(second) == {}
    first.record(KEY, "b@example.org", OK)
    assert replies(second) == {"b@example.org": OK}
    second.record(KEY, "c@example.org", NO)
    assert replies(first) == {"b@example.org": OK, "c@example.org": NO}


def test_a_row_that_nobody_wrote_breaks_no_batch(path: Path) -> None:
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    database = JournalFile(path).open()
    database.execute("UPDATE deliveries SET code = 7")
    database.close()
    assert deliveries.known(KEY, EVERYONE) == {}


def test_a_child_of_a_handler_does_not_lock_the_file(path: Path) -> None:
    program = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from salmon_revsmtp.journal.connection import JournalConnection\n"
        "from salmon_revsmtp.journal.deliveries import DeliveryJournal, MessageKey\n"
        "from salmon_revsmtp.smtp.replies import Reply\n"
        "journal = DeliveryJournal(JournalConnection(Path(sys.argv[1])))\n"
        "journal.record(MessageKey('default', '', b'1'), 'b@example.org', Reply(250, 'ok'))\n"
        "ready = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(ready[1], b'x')\n"
        "    os.read(0, 1)\n"  # until the test closes it
        "    os._exit(0)\n"
        "os.read(ready[0], 1)\n"
        "journal.record(MessageKey('default', '', b'2'), 'b@example.org', Reply(250, 'ok'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.wait(60) < 0
        deliveries = journal(path)
        deliveries.record(MessageKey("default", "", b"3"), "b@example.org", OK)
        found = known(journal(path), 1, 2, 3)
        process.communicate()  # the child ends, too
    assert found == [1, 2, 3]


def test_without_a_disk_it_remembers_and_writes_when_it_can(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "RETRY", 0.0)
    path.parent.write_text("a file where the folder should be")
    deliveries = journal(path)
    for name in ("b", "c"):
        deliveries.record(KEY, f"{name}@example.org", OK)
        assert replies(deliveries)[f"{name}@example.org"] == OK
    assert caplog.text.count("cannot be used") == 1
    assert "a restart may handle a message twice" in caplog.text
    path.parent.unlink()
    deliveries.record(KEY, "d@example.org", OK)
    assert caplog.text.count("can be used again") == 1
    assert set(journal(path).known(KEY, EVERYONE)) == set(EVERYONE)


def test_what_is_only_in_memory_is_written_at_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "RETRY", 0.0)
    path.mkdir(parents=True)
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    deliveries.record_notified(KEY, {"c@example.org": DeliveryRecord(time.time(), 2**33, NO)})
    path.rmdir()
    deliveries.close()
    assert replies(journal(path)) == {"b@example.org": OK, "c@example.org": NO}


def test_a_broken_disk_is_left_alone_for_a_while(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir(parents=True)
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    path.rmdir()
    deliveries.record(KEY, "c@example.org", OK)
    assert not path.exists()
    assert set(deliveries.known(KEY, EVERYONE)) == {"b@example.org", "c@example.org"}


def test_memory_is_bounded_while_there_is_no_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries_module, "REMEMBERED", 10 * 600)
    monkeypatch.setattr(deliveries_module, "ROW_COST", 600 - len("ann@example.netb@example.org"))
    path.mkdir(parents=True)
    deliveries = journal(path)
    keys = [KEY._replace(digest=b"%d" % number) for number in range(30)]
    for key in keys:
        deliveries.record(key, "b@example.org", OK)
    assert [bool(deliveries.known(key, EVERYONE)) for key in keys] == [False] * 20 + [True] * 10


def test_a_file_that_somebody_deletes_is_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "CHECK_EVERY", 0.0)
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    for one in path.parent.iterdir():
        one.unlink()
    assert deliveries.known(KEY, EVERYONE) == {}
    deliveries.record(KEY, "c@example.org", OK)
    assert set(journal(path).known(KEY, EVERYONE)) == {"c@example.org"}


def test_a_file_that_is_no_database_costs_no_mail(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(os.urandom(10_000))
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    assert replies(deliveries) == {"b@example.org": OK}
    assert "not a database" in caplog.text


def attempts(path: Path, queue: str = "run/inbound") -> Attempts:
    return Attempts(JournalConnection(path), queue)


def test_attempts_are_counted_over_restarts_until_they_end(path: Path) -> None:
    assert [attempts(path).begin("1.M2") for _ in range(3)] == [1, 2, 3]
    assert attempts(path).begin("other") == 1
    assert attempts(path, "run/other").begin("1.M2") == 1
    attempts(path).end("1.M2")
    assert attempts(path).begin("1.M2") == 1
    assert attempts(path, "run/other").begin("1.M2") == 2


def test_attempts_are_counted_without_a_disk(path: Path) -> None:
    path.mkdir(parents=True)
    counts = attempts(path)
    assert [counts.begin("1.M2") for _ in range(3)] == [1, 2, 3]
    counts.end("1.M2")
    assert counts.begin("1.M2") == 1


def test_two_records_in_one_file_warn_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir(parents=True)
    connection = JournalConnection(path)
    Attempts(connection, "run/inbound").begin("1.M2")
    DeliveryJournal(connection).record(KEY, "b@example.org", OK)
    assert caplog.text.count("cannot be used") == 1


def test_while_another_process_is_writing_the_file_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "BUSY_TIMEOUT", 0.05)
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", OK)
    other = JournalFile(path).open()
    other.execute("BEGIN IMMEDIATE")
    deliveries.record(KEY, "c@example.org", OK)
    assert set(deliveries.known(KEY, EVERYONE)) == {"b@example.org", "c@example.org"}
    other.close()


def test_text_that_no_database_takes(path: Path) -> None:
    """A handler's error with the name of a file that is no UTF-8."""
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", Reply(550, "no file caf\udce9"))
    deliveries.record(KEY, "c@example.org", OK)
    assert replies(journal(path)) == {
        "b@example.org": Reply(550, "no file caf?"),
        "c@example.org": OK,
    }
    history = JournalFile(path).open()
    history.execute("BEGIN IMMEDIATE")
    history.close()


def test_a_row_is_kept_as_long_as_its_own_service_wants(path: Path, now: Time) -> None:
    journal(path).record(KEY, "b@example.org", OK, 30 * DAY)
    now.passes(days=10)
    journal(path).record(KEY._replace(service="other"), "b@example.org", OK)
    assert replies(journal(path), window=30 * DAY) == {"b@example.org": OK}


def steps(deliveries: DeliveryJournal, key: MessageKey, recipients: list[str]) -> int:
    """What a look costs: instructions of SQLite's machine, in hundreds."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    database = deliveries._connection._database
    assert database is not None
    database.set_progress_handler(count, 100)
    assert len(deliveries.known(key, recipients)) == len(recipients)
    database.set_progress_handler(None, 0)
    return counted


def test_a_look_costs_the_same_whatever_else_was_delivered(path: Path) -> None:
    """The same octets from many senders, and from one sender to many others."""
    deliveries = journal(path)
    wanted = [f"r{number}@example.org" for number in range(300)]
    for recipient in wanted:
        deliveries.record(KEY, recipient, OK)
    before = steps(deliveries, KEY, wanted), steps(deliveries, KEY, wanted[:1])
    database = JournalFile(path).open()
    database.execute("BEGIN")
    rows = [
        (KEY.digest, "default", sender, f"x{number}@example.org", 1e9, 2e10, 250, "ok", None, 0)
        for sender in (KEY.reverse_path, *(f"s{one}@example.net" for one in range(20)))
        for number in range(1000)
    ]
    database.executemany("INSERT INTO deliveries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    database.execute("COMMIT")
    database.close()
    after = steps(deliveries, KEY, wanted), steps(deliveries, KEY, wanted[:1])
    assert after[0] <= 2 * before[0] + 10
    assert after[1] <= 2 * before[1] + 10


def test_the_file_is_bounded_and_the_last_deliveries_stay(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries_module, "LARGEST", 512 * 1024)
    monkeypatch.setattr(deliveries_module, "PRUNE_AFTER", 50)
    monkeypatch.setattr(deliveries_module, "PRUNE_ROWS", 100)
    deliveries = journal(path)
    keys = [MessageKey.of("default", "s" * 140, b"%d" % number) for number in range(3000)]
    for key in keys:
        deliveries.record(key, "b@example.org", OK)
    assert path.stat().st_size < 2 * 512 * 1024
    assert all(deliveries.known(key, EVERYONE) for key in keys[-50:])
    assert not any(deliveries.known(key, EVERYONE) for key in keys[:500])


def test_of_a_long_reply_its_beginning_and_end_are_kept(path: Path) -> None:
    deliveries = journal(path)
    deliveries.record(KEY, "b@example.org", Reply(250, "begin " + "x" * 60_000 + " end"))
    [reply] = replies(journal(path)).values()
    assert len(reply.text) <= 2000
    assert reply.text.startswith("begin x") and reply.text.endswith("x end")


def test_long_addresses_are_told_apart_and_do_not_fill_the_file(path: Path) -> None:
    deliveries = journal(path)
    recipients = ["x" * 3900 + f"{number}@example.org" for number in range(500)]
    key = MessageKey.of("default", "s" * 3900 + "@example.net", b"")
    for recipient in recipients[::2]:
        deliveries.record(key, recipient, OK)
    assert list(journal(path).known(key, recipients)) == recipients[::2]
    other = MessageKey.of("default", "s" * 3901 + "@example.net", b"")
    assert deliveries.known(other, recipients) == {}
    deliveries.close()
    assert path.stat().st_size < 500_000
