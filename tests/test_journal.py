"""The journal: what is kept, by whom it may be written, and what happens when it cannot be."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from salmon_revsmtp.journal import collections as collections_module
from salmon_revsmtp.journal import file as journal_module
from salmon_revsmtp.journal.collections import AgentState, Entry, Journal
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.journal.deliveries import DeliveryJournal, MessageKey
from salmon_revsmtp.smtp.replies import Reply

NOW = time.time()


def entry(
    started: float, agent: str = "isp", outcome: str = "collected", messages: int = 0
) -> Entry:
    counts = (messages, 0, 0, 0, 0)
    return Entry(agent, "odmr", started, started + 1.5, outcome, *counts, "TLSv1.3", None, None)


def test_collections_are_kept_newest_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run/journal")
    assert journal.history() == []
    journal.record(entry(NOW - 20, messages=3), True)
    journal.record(entry(NOW - 10, "other", "failed"), False)
    first, second = journal.history()
    assert (first.agent, first.outcome, first.started) == ("other", "failed", NOW - 10)
    assert (second.messages, second.tls, second.ended) == (3, "TLSv1.3", NOW - 18.5)
    assert [entry.agent for entry in journal.history("isp")] == ["isp"]
    assert len(journal.history(limit=1)) == 1


def test_failing_since_is_kept_until_it_recovers(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.record(entry(NOW - 20, outcome="failed"), False)
    journal.record(entry(NOW - 10, outcome="failed"), False)
    assert journal.state("isp") == AgentState(None, NOW - 18.5)
    journal.record(entry(NOW), True)
    assert journal.state("isp") == AgentState(None, None)


def test_enabled_is_kept_beside_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert journal.state("isp") == AgentState()
    assert journal.set_enabled("isp", False)
    journal.record(entry(NOW, outcome="failed"), False)
    assert journal.state("isp") == AgentState(False, NOW + 1.5)
    assert journal.set_enabled("isp", True)
    assert Journal(tmp_path / "journal").state("isp").enabled is True


def test_old_collections_are_forgotten_but_not_the_last_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock may have been set forward."""
    monkeypatch.setattr(collections_module, "KEEP_AT_LEAST", 3)
    journal = Journal(tmp_path / "journal")
    for age in (93, 92, 91):
        journal.record(entry(NOW - age * 86400), True)
    assert len(journal.history()) == 3
    journal.record(entry(NOW), True)
    assert [round((NOW - one.started) / 86400) for one in journal.history()] == [0, 91, 92]


def test_several_processes_may_write_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from salmon_revsmtp.journal.collections import Entry, Journal\n"
        "now = time.time()\n"
        "for number in range(25):\n"
        "    Journal(Path(sys.argv[1])).record(Entry('isp', 'odmr', now, now,\n"
        "        'collected', 1, 1, 1, 0, 1, None, None, None), True)\n"
    )
    path = str(tmp_path / "journal")
    writers = [subprocess.Popen([sys.executable, "-c", program, path]) for _ in range(4)]
    assert [writer.wait(60) for writer in writers] == [0] * 4
    assert len(Journal(Path(path)).history(limit=1000)) == 100


def test_an_older_schema_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    Journal(path).record(entry(NOW), True)
    later = "ALTER TABLE agents ADD COLUMN colour TEXT"
    monkeypatch.setattr(journal_module, "MIGRATIONS", (*journal_module.MIGRATIONS, later))
    assert len(Journal(path).history()) == 1
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (
            len(journal_module.MIGRATIONS),
        )
        database.execute("SELECT colour FROM agents")


def test_a_journal_of_the_first_release_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with sqlite3.connect(path) as database:
        database.executescript(journal_module.MIGRATIONS[0] + "PRAGMA user_version = 1")
        database.execute("INSERT INTO agents VALUES ('isp', 0, NULL)")
    assert Journal(path).state("isp").enabled is False
    deliveries = DeliveryJournal(JournalConnection(path))
    key = MessageKey("default", "a@example.net", b"digest")
    deliveries.record(key, "b@example.org", Reply(250, "ok"))
    [known] = DeliveryJournal(JournalConnection(path)).known(key, ["b@example.org"]).values()
    assert known.reply == Reply(250, "ok")


def test_the_schema_of_a_later_version_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    assert Journal(path).history() == []
    assert "of a later salmon-revsmtp" in caplog.text
    caplog.clear()
    deliveries = DeliveryJournal(JournalConnection(path))
    key = MessageKey("default", "a@example.net", b"digest")
    deliveries.record(key, "b@example.org", Reply(250, "ok"))
    assert list(deliveries.known(key, ["b@example.org"])) == ["b@example.org"], "in memory"
    assert "of a later salmon-revsmtp" in caplog.text
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,)
        assert database.execute("SELECT * FROM sqlite_master").fetchall() == []


@pytest.mark.parametrize("damage", ["a folder", "no database"])
def test_a_journal_that_cannot_be_used_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "journal"
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"not a database at all" * 100)
    journal = Journal(path)
    journal.record(entry(NOW), True)
    journal.record(entry(NOW), True)
    assert journal.state("isp") == AgentState()
    assert not journal.set_enabled("isp", True)
    assert caplog.text.count("mail is not affected") == 1
