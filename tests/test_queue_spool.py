"""Queue mode: a large message goes into the queue as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from salmon import queue
from support.collecting import collect, exchange
from support.configuration import DEFAULT, agent_keys
from support.dialogue import Dialogue, Script, no_more_mail, scripted
from support.disk import small_disk
from support.dying import die_at
from support.salmon import Salmon
from support.tls import CERTIFICATE, server_tls

from salmon_revsmtp import Reply, hookimpl
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.maildir import Unsynced, keep_together
from salmon_revsmtp.delivery.queue import QueueDelivery, QueueSpool
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.smtp.envelope import Envelope

# Many pieces, and every kind of line.
LARGE = (
    b"Subject: large\r\n\r\n"
    + b".a line that begins with a dot\r\nand one\r\r\n\n" * 15_000
    + b"\r\n"
)
LINES = LARGE.replace(b"\r\n", b"\n")

# Few letters, so that line ends meet the ends of pieces in every way.
CONTENT = st.lists(st.sampled_from([b"\r\n", b"\r", b"\n", b"x", b"A: b", b"y" * 7]))
SIZES = st.lists(st.integers(1, 30), max_size=20)

TO_B = Envelope("ann@example.net", ("b@example.org",))


@pytest.fixture
def spools(monkeypatch: pytest.MonkeyPatch) -> list[QueueSpool]:
    """Those that are made."""
    made: list[QueueSpool] = []
    make = QueueSpool.__init__

    def noted(this: QueueSpool, *arguments: Any) -> None:
        make(this, *arguments)
        made.append(this)

    monkeypatch.setattr(QueueSpool, "__init__", noted)
    return made


def queued(salmon: Salmon, *scripts: Script, **keys: Any) -> Report:
    """A collection into a queue from a provider with these scripts."""

    async def main() -> Report:
        async with scripted(*scripts, tls=server_tls() if keys else None) as port:
            service = {**DEFAULT, "delivery": "queue"}
            [report] = await collect(salmon, agent_keys(port, **keys), default=service)
        return report

    return asyncio.run(main())


def stored(folder: str = "run/inbound") -> dict[str, bytes]:
    """What is in a queue, by recipient: the message without the envelope and our Received."""
    found = {}
    for path in Path(folder, "new").iterdir():
        path_line, to, came, by, whose, rest = path.read_bytes().split(b"\n", 5)
        assert path_line == b"Return-Path: <ann@example.net>"
        assert came.startswith(b"Received: ") and by.startswith(b"\tby ")
        recipient = to.removeprefix(b"Delivered-To: ").decode()
        assert whose.startswith(b"\twith ")
        date, _, found[recipient] = rest.partition(b"\n")
        assert date.startswith(f"\tfor <{recipient}>; ".encode())
    return found


def left() -> list[str]:
    """What is there of messages that are not in a queue, with a name or without."""
    found = [str(path) for path in Path("run/inbound/tmp").iterdir()]
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this very iteration
            found.append(str(one.readlink()))
    return [name for name in found if "inbound/tmp" in name]


@pytest.mark.parametrize("names", [("b",), ("b", "c", "d")])
def test_it_is_the_same_in_the_queue(
    salmon: Salmon, spools: list[QueueSpool], names: tuple[str, ...]
) -> None:
    recipients = [f"{one}@example.org" for one in names]
    heard, report = exchange(salmon, *recipients, data=LARGE, delivery="queue")
    assert heard[0].startswith("250 2.6.0 queued as ")
    assert (report.messages, report.recipients, report.bytes) == (1, len(names), len(LARGE))
    assert [one.size for one in spools] == [len(LARGE)]
    assert stored() == dict.fromkeys(recipients, LINES)
    assert left() == []


def test_it_is_the_same_by_data(salmon: Salmon, spools: list[QueueSpool]) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<ann@example.net>", "RCPT TO:<b@example.org>", "DATA")
        for code in (250, 250, 354):
            await provider.replied(code)
        provider.say(LARGE.replace(b"\r\n.", b"\r\n..") + b".")
        assert (await provider.hear()).startswith("250 2.6.0 queued as ")
        await provider.quit()

    report = queued(salmon, script, no_more_mail)
    assert (report.messages, report.bytes, len(spools)) == (1, len(LARGE), 1)
    assert stored() == {"b@example.org": LINES}


def test_a_repeat_is_known(salmon: Salmon, spools: list[QueueSpool]) -> None:
    heard, report = exchange(salmon, "b@example.org", data=LARGE, delivery="queue", times=3)
    assert [one[:3] for one in heard] == ["250"] * 3
    assert (report.messages, len(spools)) == (1, 3)
    # And with one more recipient, whose file is not the one that it goes into.
    exchange(salmon, "b@example.org", "c@example.org", data=LARGE, delivery="queue")
    assert stored() == {"b@example.org": LINES, "c@example.org": LINES}
    assert len(list(Path("run/inbound/new").iterdir())) == 2
    assert left() == []


@given(content=CONTENT.map(b"".join), sizes=SIZES)
def test_it_is_the_same_as_from_memory(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, sizes: list[int]
) -> None:
    place = tmp_path_factory.mktemp("spool")
    delivery = QueueDelivery("q", place)
    lines = content.replace(b"\r\n", b"\n").removesuffix(b"\n")
    spool = delivery.spool(TO_B, "b@example.org", lambda begun: b"A: b\n")
    for size in sizes:
        spool.write(content[:size])
        content = content[size:]
    spool.write(content)
    for made in (
        delivery.write(TO_B, "b@example.org", b"A: b\n", lines),
        delivery.write_spooled(TO_B, "b@example.org", b"A: b\n", spool),
        delivery.finish(spool),
    ):
        assert isinstance(made, Unsynced)
        keep_together([made])
    assert len({path.read_bytes() for path in (place / "q/new").iterdir()}) == 1


def test_a_client_that_is_gone_leaves_nothing(salmon: Salmon, spools: list[QueueSpool]) -> None:
    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<ann@example.net>", "RCPT TO:<b@example.org>")
        await provider.replied(250)
        await provider.replied(250)
        provider.say(b"BDAT %d LAST" % (len(LARGE) + 1), LARGE[:-2])
        await provider.writer.drain()
        while not spools or spools[0].size < len(LARGE) // 2:
            await asyncio.sleep(0.01)
        assert len(left()) == 1
        provider.abort()

    report = queued(salmon, script)
    assert (report.outcome, report.messages) == (Outcome.FAILED, 0)
    assert stored() == {}
    assert left() == []


def test_a_disk_that_is_full(salmon: Salmon, spools: list[QueueSpool]) -> None:
    (salmon.folder / "run/inbound").mkdir(parents=True)
    with small_disk(salmon.folder / "run/inbound", len(LARGE) // 2) as disk:
        for _ in range(2):
            heard, report = exchange(salmon, "b@example.org", data=LARGE, delivery="queue")
            assert heard[0].startswith("452 4.3.1 no room on the disk")
            assert report.messages == 0
            assert (stored(), left()) == ({}, [])
        disk.grow(2 * len(LARGE))
        heard, _ = exchange(salmon, "b@example.org", data=LARGE, delivery="queue")
        assert heard[0].startswith("250")
        assert stored() == {"b@example.org": LINES}
        # There is no room for the copy of another recipient: it comes again for that one.
        recipients = ("b@example.org", "c@example.org", "d@example.org")
        heard, _ = exchange(salmon, *recipients, data=LARGE, delivery="queue")
        assert heard[0].startswith("452 4.3.1 ")
        assert left() == []
        disk.grow(5 * len(LARGE))
        heard, _ = exchange(salmon, *recipients, data=LARGE, delivery="queue")
        assert heard[0].startswith("250")
        assert stored() == dict.fromkeys(recipients, LINES)
    assert len(spools) == 5


def test_where_a_file_gets_no_name_afterwards_it_is_copied(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*arguments: Any, **keys: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    recipients = ("b@example.org", "c@example.org")
    heard, _ = exchange(salmon, *recipients, data=LARGE, delivery="queue")
    assert heard[0].startswith("250 2.6.0")
    assert stored() == dict.fromkeys(recipients, LINES)
    assert left() == []


@pytest.mark.parametrize(("names", "named"), [(("b", "c"), True), (("b",), False)])
def test_what_the_disk_has_lost_is_in_no_copy_and_in_no_queue(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], named: bool
) -> None:
    """The system says so once: who asks again hears that all is well."""
    sync, failed = os.fsync, list[int]()

    def fails_once(descriptor: int) -> None:
        if not failed and "inbound/tmp" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            failed.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    def no_link(*arguments: Any, **keys: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fails_once)
    if not named:
        monkeypatch.setattr(os, "link", no_link)
    recipients = [f"{one}@example.org" for one in names]
    heard, _ = exchange(salmon, *recipients, data=LARGE, delivery="queue")
    assert heard[0].startswith("451 4.3.0 could not be written")
    assert (stored(), left(), len(failed)) == ({}, [], 1)


def test_a_folder_that_is_deleted_meanwhile(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = QueueSpool.finish

    def deleted(this: QueueSpool) -> Unsynced:
        Path("run/inbound/tmp").rmdir()
        return finish(this)

    monkeypatch.setattr(QueueSpool, "finish", deleted)
    heard, _ = exchange(salmon, "b@example.org", data=LARGE, delivery="queue")
    assert heard[0].startswith("250 2.6.0")
    assert stored() == {"b@example.org": LINES}


class Looks:
    """Looks at messages, and refuses some recipients."""

    def __init__(self, **refusals: Reply) -> None:
        self.seen: list[bytes] = []
        self._refusals = refusals

    @hookimpl
    def message_received(self, message: bytes) -> Reply | None:
        self.seen.append(message)
        for name, reply in self._refusals.items():
            if f"for <{name}@".encode() in message:
                return reply
        return None


def test_a_plugin_gets_the_whole_message(salmon: Salmon, spools: list[QueueSpool]) -> None:
    plugins, looks = Plugins.load(), Looks()
    plugins.register(looks)
    exchange(salmon, "b@example.org", data=LARGE, delivery="queue", plugins=plugins)
    [message] = looks.seen
    assert message.endswith(b"\n" + LINES.removesuffix(b"\n"))
    assert spools == []


def test_a_plugin_that_comes_late_gets_it_too(salmon: Salmon, spools: list[QueueSpool]) -> None:
    plugins, looks = Plugins.load(), Looks(c=Reply(550, "no"))

    class Late:
        @hookimpl
        def connection_reversed(self) -> None:
            plugins.register(looks)

    plugins.register(Late())
    recipients = ("b@example.org", "c@example.org")
    exchange(salmon, *recipients, data=LARGE, delivery="queue", plugins=plugins)
    assert len(spools) == 1
    assert [one.endswith(b"\n" + LINES.removesuffix(b"\n")) for one in looks.seen] == [True] * 2
    assert stored() == {"b@example.org": LINES}
    assert left() == []


@pytest.mark.parametrize("field", [b"", b"Precedence: bulk\r\n"])
def test_what_was_refused_before_is_told_of_when_the_rest_is_taken(
    salmon: Salmon, spools: list[QueueSpool], field: bytes
) -> None:
    """Or, where its sender is a program, kept: all of it."""
    plugins, recipients = Plugins.load(), ("b@example.org", "c@example.org")
    plugins.register(Looks(b=Reply(451, "later"), c=Reply(550, "no")))
    data, lines = field + LARGE, field.replace(b"\r", b"") + LINES
    heard, _ = exchange(salmon, *recipients, data=data, delivery="queue", plugins=plugins)
    assert heard[0].startswith("451 ")
    heard, _ = exchange(salmon, *recipients, data=data, delivery="queue")
    assert heard[0].startswith("250 ")
    assert len(spools) == 1
    assert stored() == {"b@example.org": lines}
    if field:
        [kept] = salmon.undeliverable()
        assert b"c@example.org" in kept and kept.rstrip(b"\n").endswith(lines.rstrip(b"\n"))
    else:
        [(sender, to, notice)] = salmon.relayed
        assert (sender, to) == ("<>", "ann@example.net")
        assert "c@example.org" in notice and "Subject: large" in notice


def test_a_loop_is_seen_however_long_its_header(salmon: Salmon, spools: list[QueueSpool]) -> None:
    hop = b"Received: from a by b\r\n\t(" + b"x" * 900 + b")\r\n\twith SMTP; a date\r\n"
    heard, _ = exchange(salmon, "b@example.org", data=hop * 100 + LARGE, delivery="queue")
    assert heard[0].startswith("554 5.4.6 ")
    assert len(spools) == 1
    assert (stored(), left()) == ({}, [])


def test_a_large_message_that_was_encrypted_twice_is_left_with_the_provider(
    salmon: Salmon, spools: list[QueueSpool]
) -> None:
    """Exim 4.100.1 does that to every message of a session but the first."""
    record = b"\x17\x03\x03\x40\x00" + bytes(range(256)) * 64

    async def first(provider: Dialogue) -> None:
        await provider.reverse()
        provider.say("MAIL FROM:<ann@example.net>", "RCPT TO:<b@example.org>")
        await provider.replied(250)
        await provider.replied(250)
        provider.say(b"BDAT %d LAST" % (len(record) * 20), record * 20)
        with pytest.raises(ConnectionResetError):
            await provider.silence()

    report = queued(salmon, first, tls="implicit", ca_file=str(CERTIFICATE))
    assert (report.outcome, report.messages, len(spools)) == (Outcome.FAILED, 0, 1)
    assert (stored(), left()) == ({}, [])


def test_killed_at_each_line_it_is_whole_or_not_there(tmp_path: Path) -> None:
    """What has its name in ``new/`` has all its octets, and what was answered is there."""
    queue.Queue(str(tmp_path / "q"))
    for line in range(1, 500):
        seen, told = os.pipe()
        pid = os.fork()
        if not pid:
            die_at(line, ("delivery/maildir.py", "delivery/queue.py"), "")
            delivery = QueueDelivery("q", tmp_path)
            spool = delivery.spool(TO_B, "b@example.org", lambda begun: b"A: b\n")
            for start in range(0, len(LARGE), 100_000):
                spool.write(LARGE[start : start + 100_000])
            [kept] = delivery.keep([("b@example.org", delivery.finish(spool))])
            os.write(told, b"%d" % kept.code)
            os._exit(0)
        os.close(told)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(seen, "rb") as pipe:
            answered = pipe.read()
        there = [path.read_bytes() for path in (tmp_path / "q/new").iterdir()]
        assert all(one.endswith(b"A: b\n" + LINES) for one in there)
        assert len(there) <= 1
        if status == 0:
            assert (answered, len(there)) == (b"250", 1)
            return
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        assert there or not answered
        for path in (tmp_path / "q").glob("*/*"):
            path.unlink()
    raise AssertionError("it never came to its end")


def test_a_process_that_dies_over_it_leaves_nothing(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        spool = QueueDelivery("q", tmp_path).spool(TO_B, "b@example.org", lambda begun: b"")
        spool.write(LARGE)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert list((tmp_path / "q/tmp").iterdir()) == []
