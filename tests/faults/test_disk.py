"""The disk below ``run/`` is full, read-only or slow: the provider keeps what we cannot."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import Router
from support.collecting import collect
from support.configuration import agent_keys
from support.dialogue import Dialogue, no_more_mail, scripted
from support.disk import ROOM, Disk, small_disk
from support.holding import Holding, NoHooks
from support.messages import MESSAGE
from support.salmon import Salmon, explodes, fails

from salmon_revsmtp import QueueConsumer
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.journal import connection
from salmon_revsmtp.journal.deliveries import DeliveryJournal, MessageKey
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.provider import settling
from salmon_revsmtp.provider.hold.store import Settled
from salmon_revsmtp.provider.settling import Answered, Settler
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply


@pytest.fixture
def disk(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with small_disk(salmon.folder / "run") as mounted:
        # Salmon's own undeliverable queue was on what is below now.
        queue.Queue("run/undeliverable")
        monkeypatch.setattr(connection, "RETRY", 0.0)
        yield mounted


class Held:
    """A provider that holds one message, from which is collected again and again."""

    def __init__(self, salmon: Salmon, mail: Holding | None = None, **service: Any) -> None:
        self._salmon = salmon
        self._service = {"hostname": "mail.example.org", **service}
        self.queue = Holding(salmon.folder / "provider") if mail is None else mail

    def put(self, *recipients: str, data: bytes = MESSAGE) -> None:
        self.queue.put(Envelope("ann@example.net", recipients), data)

    def collect(self) -> Report:
        async def main() -> Report:
            async with self.queue.provider() as provider:
                keys = agent_keys(provider.port)
                [report] = await collect(self._salmon, keys, default=self._service)
            return report

        return asyncio.run(main())


def inbound() -> list[bytes]:
    found = queue.Queue("run/inbound")
    return [found.mbox.get_bytes(key) for key in found.keys()]


def test_queue_mode_on_a_full_disk(salmon: Salmon, disk: Disk) -> None:
    held = Held(salmon, delivery="queue")
    held.put("b@example.org")
    disk.fill()
    for _ in range(3):
        report = held.collect()
        assert report.outcome is Outcome.FAILED
        assert report.error is not None and "452 4.3.1" in report.error
        assert len(held.queue) == 1
        assert disk.litter() == []
    disk.empty()
    assert held.collect().outcome is Outcome.COLLECTED
    assert len(held.queue) == 0
    assert len(inbound()) == 1


def test_a_message_that_does_not_fit_does_not_keep_out_one_that_does(
    salmon: Salmon, disk: Disk
) -> None:
    held = Held(salmon, delivery="queue")
    held.put("b@example.org", data=MESSAGE + b"x" * 70 + b"\r\n" + b"y" * ROOM)
    held.put("c@example.org")
    report = held.collect()
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)
    assert len(held.queue) == 1
    assert disk.litter() == []
    [stored] = inbound()
    assert b"Delivered-To: c@example.org" in stored


def test_handled_mail_needs_no_disk(
    salmon: Salmon, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """The journal is full: what it should have stays in memory, with a warning."""
    salmon.handle(".*")
    disk.fill()

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        for _ in range(2):
            assert (await provider.send(MESSAGE)).startswith("250 ")
        disk.empty()
        assert (await provider.send(MESSAGE + b"another\r\n")).startswith("250 ")
        await provider.quit()

    async def main() -> Report:
        async with scripted(script, no_more_mail) as port:
            [report] = await collect(salmon, agent_keys(port))
        return report

    assert asyncio.run(main()).messages == 2
    assert len(salmon.handled) == 2, "the repeat was known"
    assert caplog.text.count("kept in memory") == 1
    assert caplog.text.count("can be used again") == 1
    # And after a restart it still is.
    key = MessageKey.of("default", "a@example.net", MESSAGE)
    assert "b@example.org" in DeliveryJournal().known(key, ["b@example.org"])


@pytest.mark.parametrize("handler", ["raises", "writes", "is missing"])
def test_undeliverable_mail_on_a_full_disk(salmon: Salmon, disk: Disk, handler: str) -> None:
    def writes(message: MailRequest) -> None:
        (disk.folder / "mail").write_bytes(message.Data * 100)

    if handler != "is missing":
        salmon.handle(".*", explodes if handler == "raises" else writes)
    held = Held(salmon)
    held.put("b@example.org")
    disk.fill()
    report = held.collect()
    assert report.error is not None and "452 4.3.1" in report.error
    assert len(held.queue) == 1
    assert disk.litter() == []
    disk.empty()
    assert held.collect().outcome is Outcome.COLLECTED
    assert len(held.queue) == 0
    assert len(salmon.undeliverable()) == (handler != "writes")


def test_a_notification_on_a_full_disk(salmon: Salmon, disk: Disk) -> None:
    salmon.handle("b@.*")
    salmon.handle("c@.*", fails(550))

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        everyone = ("b@example.org", "c@example.org")
        assert (await provider.send(MESSAGE, *everyone)).startswith("452 4.3.1 ")
        assert salmon.relayed == []
        disk.empty()
        assert (await provider.send(MESSAGE, *everyone)).startswith("250 ")
        await provider.quit()

    async def main() -> None:
        async with scripted(script, no_more_mail) as port:
            await collect(salmon, agent_keys(port))

    disk.fill()
    asyncio.run(main())
    assert len(salmon.handled) == 2, "each once"
    assert len(salmon.relayed) == 1


def test_a_notification_on_a_read_only_disk_is_not_sent_again_and_again(
    salmon: Salmon, disk: Disk
) -> None:
    unsent = Outbox(lambda: salmon.relay)
    unsent.put("ann@example.net", b"Subject: Undelivered mail\n\nsorry\n")
    disk.read_only()
    unsent.send()
    assert salmon.relayed == [], "it could not be deleted"
    disk.writable()
    unsent.send()
    unsent.send()
    assert len(salmon.relayed) == 1


def test_a_read_only_disk(salmon: Salmon, disk: Disk) -> None:
    salmon.handle(".*")
    queued = Held(salmon, delivery="queue")
    routed = Held(salmon, queued.queue)
    queued.put("b@example.org")
    disk.read_only()
    report = queued.collect()
    assert report.error is not None and "451 4.3.0 could not be written" in report.error
    assert len(queued.queue) == 1
    assert routed.collect().outcome is Outcome.COLLECTED, "handlers may need no disk"
    assert len(salmon.handled) == 1
    disk.writable()
    queued.put("c@example.org")
    assert queued.collect().outcome is Outcome.COLLECTED
    assert len(inbound()) == 1


def test_no_undeliverable_queue_can_be_made(
    salmon: Salmon, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salmon.routing import Router

    monkeypatch.setattr(Router, "UNDELIVERABLE_QUEUE", None)
    (disk.folder / "undeliverable/new").rmdir()
    (disk.folder / "undeliverable/cur").rmdir()
    (disk.folder / "undeliverable/tmp").rmdir()
    (disk.folder / "undeliverable").rmdir()
    salmon.handle(".*")
    held = Held(salmon)
    held.put("b@example.org")
    disk.read_only()
    report = held.collect()
    assert report.error is not None and "451 4.3.0" in report.error
    assert salmon.handled == [], "what a handler raised on could be kept nowhere"
    assert len(held.queue) == 1


def test_a_slow_disk_is_deferred_and_not_stored_twice(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    fsync = os.fsync

    def slowly(descriptor: int) -> None:
        assert synced.wait(60)
        fsync(descriptor)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("451 4.3.0 not done in ")
        synced.set()
        assert (await provider.send(MESSAGE)).startswith("250 2.6.0 queued")
        await provider.quit()

    async def main() -> None:
        async with scripted(script, no_more_mail) as port:
            service = {"hostname": "x", "delivery": "queue", "handler_timeout": 1.5}
            await collect(salmon, agent_keys(port), default=service)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", slowly)
        asyncio.run(main())
    assert len(inbound()) == 1


class OwnQueue:
    """A queue that is not Salmon's, and writes in its own way."""

    def __init__(self, folder: str) -> None:
        self.dir, self._queue = folder, queue.Queue(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


@pytest.mark.parametrize("kind", [queue.Queue, OwnQueue])
@pytest.mark.parametrize("mode", ["queue", "undeliverable"])
def test_what_cannot_be_synced_after_it_was_stored_is_taken_back(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, mode: str, kind: Any
) -> None:
    """Otherwise it is there, the provider hears 451, and it is there twice in the end."""
    if mode == "undeliverable":
        Router.UNDELIVERABLE_QUEUE = kind("run/undeliverable")
    held = Held(salmon, delivery="router" if mode == "undeliverable" else "queue")
    held.put("b@example.org")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", folders_cannot_be_synced(os.fsync))
        report = held.collect()
        assert report.error is not None and "451 4.3.0" in report.error
    assert len(held.queue) == 1
    assert inbound() == [] and salmon.undeliverable() == []
    held.collect()
    assert len(held.queue) == 0
    assert len(inbound()) + len(salmon.undeliverable()) == 1


def test_a_notification_that_cannot_be_synced_is_taken_back(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(lambda: salmon.relay)
    monkeypatch.setattr(os, "fsync", folders_cannot_be_synced(os.fsync))
    with pytest.raises(OSError, match="Input/output error"):
        outbox.put("ann@example.net", b"Subject: x\n\n")
    assert len(queue.Queue("run/unsent")) == 0


def folders_cannot_be_synced(fsync: Callable[[int], None]) -> Callable[[int], None]:
    def broken(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    return broken


def test_the_consumer_on_a_full_disk_keeps_what_it_cannot_set_aside(
    salmon: Salmon, disk: Disk
) -> None:
    salmon.handle(".*", explodes)
    held = Held(salmon, delivery="queue")
    held.put("b@example.org")
    held.collect()
    disk.fill()
    consumer = QueueConsumer("run/inbound")
    consumer.start(one_shot=True)
    assert len(inbound()) == 1
    disk.empty()
    consumer.start(one_shot=True)
    assert inbound() == []
    assert len(salmon.undeliverable()) == 1


def test_the_consumer_of_a_queue_on_a_read_only_disk_handles_nothing(
    salmon: Salmon, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*")
    held = Held(salmon, delivery="queue")
    held.put("b@example.org")
    held.collect()
    disk.read_only()
    for _ in range(3):  # as if it were started again and again
        QueueConsumer("run/inbound").start(one_shot=True)
    assert salmon.handled == []
    assert "cannot be deleted, and what cannot be deleted is not handled" in caplog.text
    disk.writable()
    QueueConsumer("run/inbound").start(one_shot=True)
    assert len(salmon.handled) == 1
    assert inbound() == []


@pytest.mark.parametrize("octets", [0, 200_000])
def test_the_providers_own_disk_is_full(disk: Disk, octets: int) -> None:
    """What comes is refused and leaves nothing; what was held is still there, and what its customer
    answers is settled when there is room."""
    disk.grow(1024 * 1024)
    held = Holding(disk.folder / "provider")
    key = held.put(Envelope("", ("b@example.org",)), MESSAGE)
    disk.fill()
    with pytest.raises(OSError, match=r"No space left|full"):
        for _ in range(100):  # there may be room in what the database has already
            held.put(Envelope("", ("c@example.org",)), MESSAGE + b"x" * octets)
    assert held.waiting()[0].key == key
    assert len(held) == len(held.waiting())
    assert disk.litter() == []
    disk.empty()
    held.store.settle([Settled(one.key, one.envelope.recipients) for one in held.waiting()])
    assert len(held) == 0


def test_an_answer_that_is_heard_on_a_full_disk_is_settled_when_there_is_room(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "RETRY", 0.05)
    disk.grow(1024 * 1024)
    held = Holding(disk.folder / "provider")
    key = held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
    [one] = held.waiting()
    broken = threading.Event()
    settle = held.store.settle

    def full(done: Sequence[Settled]) -> None:
        if not broken.is_set():
            broken.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(done)

    monkeypatch.setattr(held.store, "settle", full)

    async def main() -> None:
        settler = Settler(held.store, held.notify, NoHooks())
        settler.settle(Answered(one, [Reply(550, "no")]))
        await asyncio.to_thread(broken.wait)
        assert [one.key for one in held.waiting()] == [key]
        await settler.finish(20)

    asyncio.run(main())
    assert len(held) == 0
    assert len(held.told) == 1, "its sender is told once"
