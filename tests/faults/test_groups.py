"""Queue mode makes what waits together safe together: what goes wrong with one of a group, or with
their folder."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from support.collecting import collect
from support.configuration import agent_keys
from support.dialogue import Dialogue, no_more_mail, scripted
from support.disk import small_disk
from support.dying import die_at
from support.salmon import Salmon

from salmon_revsmtp.delivery import dispatcher, maildir
from salmon_revsmtp.delivery import queue as queue_mode
from salmon_revsmtp.delivery.dispatcher import Dispatcher
from salmon_revsmtp.delivery.maildir import Unsynced, keep_together, open_queue
from salmon_revsmtp.files import sync_folder
from salmon_revsmtp.threads import Threads

LONG = 20.0


def transaction(subject: str, *names: str, octets: int = 0) -> bytes:
    data = b"Subject: %s\r\n\r\n%s\r\n" % (subject.encode(), b"x" * octets)
    lines = ["MAIL FROM:<ann@example.net>", *(f"RCPT TO:<{one}@example.org>" for one in names)]
    commands = "".join(f"{line}\r\n" for line in lines).encode()
    return commands + b"BDAT %d LAST\r\n" % len(data) + data


class Groups:
    """The first message is held up until all have come, so that the others are a group.

    ``sizes``  how many were made safe together, each time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, messages: int) -> None:
        self.sizes: list[int] = []
        come, here, deliver = [0], threading.Event(), Dispatcher.deliver

        def delivered(this: Dispatcher, *arguments: Any) -> None:
            deliver(this, *arguments)
            come[0] += 1
            if come[0] == messages:
                here.set()

        def kept(group: Sequence[Unsynced], threads: Threads | None) -> list[str | BaseException]:
            assert here.wait(LONG)
            self.sizes.append(len(group))
            return keep_together(group, threads)

        monkeypatch.setattr(Dispatcher, "deliver", delivered)
        monkeypatch.setattr(queue_mode, "keep_together", kept)


def answers(salmon: Salmon, *transactions: bytes) -> list[str]:
    """Send these in one piece; the answers to their data, in their order."""
    heard: list[str] = []

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say(b"".join(transactions) + b"QUIT")
        while len(heard) < len(transactions):
            line = await provider.hear()
            if not line.startswith("250 2.1."):  # to MAIL or RCPT
                heard.append(line)
        await provider.replied(221)

    async def main() -> None:
        async with scripted(script, no_more_mail) as port:
            service = {"hostname": "mail.example.org", "delivery": "queue"}
            await collect(salmon, agent_keys(port), default=service)

    asyncio.run(main())
    return heard


def subjects(folder: str = "run/inbound") -> list[str]:
    """Of what is in a queue."""
    stored = [path.read_text() for path in Path(folder, "new").iterdir()]
    return sorted(text.partition("Subject: ")[2].partition("\n")[0] for text in stored)


def litter() -> list[Path]:
    return list(Path("run/inbound/tmp").iterdir())


def syncs(fails: Callable[[os.stat_result, int], bool]) -> Callable[[int], None]:
    """``os.fsync`` that fails for some: asked with what it is, and its number."""
    fsync, count = os.fsync, [0]
    lock = threading.Lock()

    def sync(descriptor: int) -> None:
        with lock:
            count[0] += 1
            number = count[0]
        if fails(os.fstat(descriptor), number):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    return sync


def test_what_waits_together_is_synced_together(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, folders = Groups(monkeypatch, 16), [0]

    def counted(folder: Path) -> None:
        folders[0] += 1
        sync_folder(folder)

    monkeypatch.setattr(maildir, "sync_folder", counted)
    heard = answers(salmon, *(transaction(f"m{number:02}", "b") for number in range(16)))
    assert [one[:3] for one in heard] == ["250"] * 16
    assert sum(groups.sizes) == 16
    assert max(groups.sizes) > 10
    assert folders[0] == len(groups.sizes)
    assert subjects() == [f"m{number:02}" for number in range(16)]
    # Each was answered with the name that it has.
    keys = {path.name for path in Path("run/inbound/new").iterdir()}
    assert {one.removeprefix("250 2.6.0 queued as ") for one in heard} == keys


def test_one_that_cannot_be_synced_is_not_there_and_the_others_are(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = Groups(monkeypatch, 12)
    bad = 700

    def fails(what: os.stat_result, number: int) -> bool:
        return stat.S_ISREG(what.st_mode) and what.st_size > bad

    monkeypatch.setattr(os, "fsync", syncs(fails))
    messages = [transaction(f"m{number:02}", "b") for number in range(12)]
    messages[6] = transaction("bad", "b", octets=bad)
    heard = answers(salmon, *messages)
    assert [one[:3] for one in heard] == ["250"] * 6 + ["451"] + ["250"] * 5
    assert max(groups.sizes) >= 10
    assert subjects() == [f"m{number:02}" for number in range(12) if number != 6]
    assert litter() == []


def test_without_the_folder_none_of_a_group_is_there(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    Groups(monkeypatch, 12)
    messages = [transaction(f"m{number:02}", "b") for number in range(12)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", syncs(lambda what, number: stat.S_ISDIR(what.st_mode)))
        # The provider's customer says that it got nothing, and comes no more.
        with pytest.raises(AssertionError, match="1 connections, 2 scripts"):
            answers(salmon, *messages)
    assert subjects() == [] and litter() == []
    heard = answers(salmon, *messages)
    assert [one[:3] for one in heard] == ["250"] * 12, "none was taken for a repeat"
    assert len(subjects()) == 12


def test_a_disk_that_gets_full_within_a_group(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk(salmon.folder / "run", 256 * 1024) as disk:
        queue.Queue("run/undeliverable")
        groups = Groups(monkeypatch, 16)
        heard = answers(
            salmon, *(transaction(f"m{number:02}", "b", octets=30_000) for number in range(16))
        )
        taken = [f"m{number:02}" for number, one in enumerate(heard) if one.startswith("250 ")]
        assert {one[:9] for one in heard} == {"250 2.6.0", "452 4.3.1"}
        assert subjects() == taken
        assert disk.litter() == []
        assert max(groups.sizes) > 1


def test_the_same_message_twice_in_a_group_is_stored_once(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    Groups(monkeypatch, 6)
    other, same = transaction("other", "b"), transaction("same", "b", "c", "b")
    heard = answers(salmon, other, same, same, transaction("last", "b"), same, same)
    assert [one[:3] for one in heard] == ["250"] * 6
    assert subjects() == ["last", "other", "same", "same"]


def test_a_bug_with_one_message_fails_no_other(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Groups(monkeypatch, 8)
    note = Dispatcher._note

    def noted(this: Dispatcher, pending: Any, *arguments: Any, **more: Any) -> None:
        if b"Subject: m3" in pending.data:
            raise RuntimeError("a bug")
        note(this, pending, *arguments, **more)

    monkeypatch.setattr(Dispatcher, "_note", noted)
    heard = answers(salmon, *(transaction(f"m{number}", "b") for number in range(8)))
    assert [one[:3] for one in heard] == ["250"] * 3 + ["451"] + ["250"] * 4
    assert "a bug" in caplog.text


def test_a_bug_with_a_group_is_answered(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = [False]

    def kept(*arguments: Any) -> list[str | BaseException]:
        if not failed[0]:
            failed[0] = True
            raise RuntimeError("a bug")
        return keep_together(*arguments)

    monkeypatch.setattr(queue_mode, "keep_together", kept)
    heard = answers(salmon, *(transaction(f"m{number}", "b") for number in range(30)))
    assert heard[0] == str(dispatcher.BUG)
    assert [one for one in heard if one[:3] == "250"] != []


def test_a_group_of_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose folder cannot be synced takes none of another with it."""
    queues = [open_queue(tmp_path / name) for name in "ab"]
    bad = (tmp_path / "a/new").stat().st_ino
    monkeypatch.setattr(os, "fsync", syncs(lambda what, number: what.st_ino == bad))
    kept = keep_together([Unsynced(queues[number % 2], b"%d\n" % number) for number in range(6)])
    assert [isinstance(one, OSError) for one in kept] == [True, False] * 3
    assert not list((tmp_path / "a").glob("*/*"))
    assert {path.name for path in (tmp_path / "b/new").iterdir()} == set(kept[1::2])


def test_threads_that_are_closed_sync_nothing_and_nothing_is_lost(tmp_path: Path) -> None:
    opened, threads = open_queue(tmp_path / "q"), Threads("sync", 3)
    threads.close()
    kept = keep_together([Unsynced(opened, b"x\n") for _ in range(8)], threads)
    assert {path.name for path in (tmp_path / "q/new").iterdir()} == set(kept)


def test_killed_at_each_line_a_group_is_whole_or_under_tmp(tmp_path: Path) -> None:
    """What has its name in ``new/`` has all its octets; the rest is no more than files under
    ``tmp/``; and what was answered is there."""
    open_queue(tmp_path / "q")
    data = [b"%d\n" % number * 1000 for number in range(6)]
    for line in range(1, 1000, 3):
        seen, told = os.pipe()
        pid = os.fork()
        if not pid:
            die_at(line, ("delivery/maildir.py",), "")
            opened, threads = open_queue(tmp_path / "q"), Threads("sync", 3)
            kept = keep_together([Unsynced(opened, one) for one in data], threads)
            os.write(told, b"%d" % len(set(kept)))
            os._exit(0)
        os.close(told)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(seen, "rb") as pipe:
            answered = int(pipe.read() or 0)
        stored = [path.read_bytes() for path in (tmp_path / "q/new").iterdir()]
        assert set(stored) <= set(data)
        assert len(stored) == len(set(stored)) >= answered
        if status == 0:
            assert answered == len(data)
            return
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        for path in (tmp_path / "q").glob("*/*"):
            path.unlink()
    raise AssertionError("it never came to its end")
