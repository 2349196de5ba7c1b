"""The disk of the hold store is full, read-only or slow: what heard 250 is held, nothing else is,
and an answer that a customer gave is not forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
from support.collecting import collect
from support.configuration import agent_keys
from support.disk import Disk, small_disk
from support.holding import Holding, NoHooks
from support.messages import MESSAGE
from support.salmon import Salmon, fails
from support.world import World, in_the_world

from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.rates import ADDRESS, RateLimit
from salmon_revsmtp.delivery.reporter import Reporter
from salmon_revsmtp.journal.counts import CountJournal
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.provider import settling
from salmon_revsmtp.provider.hold.embedded import EmbeddedStore
from salmon_revsmtp.provider.hold.store import Arrival
from salmon_revsmtp.provider.notices import Notices
from salmon_revsmtp.provider.settling import Answered, Settler
from salmon_revsmtp.smtp.content import whole
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

MIB = 1024 * 1024
# What is waited for here takes moments; this is for a machine that does much else.
PATIENCE = 60


@pytest.fixture
def disk(salmon: Salmon) -> Iterator[Disk]:
    """Where the provider holds its mail; the customer's journal and all else is elsewhere."""
    (salmon.folder / "held").mkdir()
    with small_disk(salmon.folder / "held", 2 * MIB) as mounted:
        yield mounted


PROVIDER = {"hold": "held/hold"}


async def answer(here: World, subject: str, octets: int = 0) -> int:
    """Send a message; returns the code of its last reply."""
    line = b"x" * 70 + b"\r\n"
    data = f"Subject: {subject}\r\n\r\n".encode() + line * (octets // len(line))
    try:
        await here.send("b@example.org", data=data)
    except aiosmtplib.SMTPResponseException as error:
        return error.code
    return 250


def subjects(here: World) -> list[str]:
    """Of what is held for acme, and can be read."""
    found = [here.data(one) for one in here.held()]
    return [one.partition(b"Subject: ")[2].split()[0].decode() for one in found]


def no_litter(folder: Path, files: int) -> bool:
    return (
        not list((folder / "tmp").iterdir()) and len(list((folder / "bodies").iterdir())) == files
    )


def without_a_log(folder: Path) -> None:
    """Whatever is written needs room of its own from now on."""
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite3")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.mark.parametrize("octets", [0, 300_000])
def test_mail_that_comes_on_a_full_disk(salmon: Salmon, disk: Disk, octets: int) -> None:
    async def work(here: World) -> None:
        assert await answer(here, "first", octets) == 250
        without_a_log(disk.folder / "hold")
        disk.fill()
        for number in range(5):
            assert await answer(here, f"no{number}", octets) == 452
        assert subjects(here) == ["first"]
        assert no_litter(disk.folder / "hold", bool(octets))
        assert here.store.usage("acme").messages == 1
        disk.empty()
        assert await answer(here, "second", octets) == 250
        assert subjects(here) == ["first", "second"]

    in_the_world(salmon, work, provider=PROVIDER)


def test_what_comes_together_is_held_together_or_not_at_all(salmon: Salmon, disk: Disk) -> None:
    """Many senders while the room runs out: each 250 is held, and nothing else."""

    async def work(here: World) -> None:
        names = [f"m{number}" for number in range(60)]
        at_once = asyncio.Semaphore(20)  # as many as one address may have

        async def one_of_many(number: int, name: str) -> int:
            async with at_once:
                return await answer(here, name, 200_000 if number % 3 else 0)

        codes = await asyncio.gather(*(one_of_many(*one) for one in enumerate(names)))
        assert set(codes) == {250, 452}
        taken = sorted(one for one, code in zip(names, codes, strict=True) if code == 250)
        assert sorted(subjects(here)) == taken
        large = [one for one in taken if int(one[1:]) % 3]
        assert no_litter(disk.folder / "hold", len(large))

    in_the_world(salmon, work, provider=PROVIDER)


@pytest.mark.parametrize("octets", [0, 300_000])
def test_mail_that_comes_on_a_read_only_disk(salmon: Salmon, octets: int) -> None:
    async def work(here: World) -> None:
        assert await answer(here, "first", octets) == 250
        store: Any = here.store
        # A file system that gets read-only under open files lets SQLite read and write no more.
        store._database.execute("PRAGMA query_only = ON")
        assert await answer(here, "no", octets) == 451
        assert subjects(here) == ["first"]
        assert no_litter(salmon.folder / "run/hold", bool(octets))
        store._database.execute("PRAGMA query_only = OFF")
        assert await answer(here, "second", octets) == 250
        assert subjects(here) == ["first", "second"]

    in_the_world(salmon, work)


def test_a_slow_disk_holds_up_no_one_but_who_waits_for_it(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No 250 before the message is safe; meanwhile others are answered, and what came in the
    meantime is made safe together."""

    async def work(here: World) -> None:
        slow, put = threading.Event(), here.store.put
        batches: list[int] = []

        def slowly(arrivals: Sequence[Arrival]) -> Sequence[tuple[int, ...]]:
            assert slow.wait(PATIENCE)
            batches.append(len(arrivals))
            return put(arrivals)

        monkeypatch.setattr(here.store, "put", slowly)
        waiting = [asyncio.create_task(answer(here, f"m{number}")) for number in range(20)]
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=here.mx, start_tls=False) as other:
            for _ in range(10):
                await other.ehlo()
                assert (await other.noop()).code == 250
        assert not any(one.done() for one in waiting)
        slow.set()
        assert await asyncio.gather(*waiting) == [250] * 20
        assert len(here.held()) == 20 == sum(batches)

    in_the_world(salmon, work)


def test_answers_on_a_full_disk_are_settled_when_there_is_room(
    salmon: Salmon, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The customer has them all.  It does not get one again, and none stays."""
    monkeypatch.setattr(settling, "RETRY", 0.05)
    salmon.handle("b@.*")
    salmon.handle("never@.*", fails(550, "5.1.1 no such user"))

    async def main() -> None:
        held = Holding(disk.folder / "hold")
        for number in range(20):
            data = MESSAGE + b"%d\r\n" % number
            held.put(Envelope("a@example.net", ("b@example.org", "never@example.org")), data)
        without_a_log(disk.folder / "hold")
        disk.fill()
        async with held.provider() as provider:
            keys = agent_keys(provider.port)
            [report] = await collect(salmon, keys)
            assert (report.outcome, report.messages) == (Outcome.COLLECTED, 20)
            [report] = await collect(salmon, keys)
            assert report.outcome is Outcome.NO_MAIL
            assert len(held) == 20, "nothing could be settled"
            disk.empty()
            while len(held):
                await asyncio.sleep(0.01)
            [report] = await collect(salmon, keys)
            assert report.outcome is Outcome.NO_MAIL
        assert len(salmon.handled) == 40
        assert len(held.told) == 20, "each refusal once"
        held.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


def test_a_provider_that_ends_on_a_full_disk_repeats_and_its_customer_does_not(
    salmon: Salmon, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts on a full disk, too: what it holds is what will make room."""
    monkeypatch.setattr(settling, "RETRY", 0.05)
    salmon.handle(".*")

    async def main() -> None:
        held = Holding(disk.folder / "hold")
        held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
        without_a_log(disk.folder / "hold")
        disk.fill()
        async with held.provider() as provider:
            [report] = await collect(salmon, agent_keys(provider.port))
            assert report.outcome is Outcome.COLLECTED
            await provider.stop(0.1)
        assert len(held) == 1
        held.close()
        disk.empty()
        again = Holding(disk.folder / "hold")
        async with again.provider() as provider:
            [report] = await collect(salmon, agent_keys(provider.port))
            assert report.outcome is Outcome.COLLECTED
        assert len(again) == 0
        again.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert len(salmon.handled) == 1


def test_a_refusal_is_settled_only_when_its_notification_is_safe(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk on which notifications wait is full; the hold store's is not.  However often it is
    tried, the sender is told in the end."""
    monkeypatch.setattr(settling, "RETRY", 0.01)
    held = Holding(salmon.folder / "hold")
    held.put(Envelope("a@example.net", ("b@example.org",)), MESSAGE)
    [one] = held.waiting()

    async def main(disk: Disk) -> None:
        outbox = Outbox(lambda: salmon.relay)
        reporter = Reporter(lambda: "odmr.example.net", RateLimit(CountJournal()))
        tries: list[Reply | None] = []
        notices, tried = Notices(reporter, outbox), threading.Event()

        def notify(*refused: Any) -> Reply | None:
            tries.append(notices.refused(*refused))
            if len(tries) >= 2 * ADDRESS.messages:
                tried.set()
            return tries[-1]

        disk.fill()
        settler = Settler(held.store, notify, NoHooks())
        settler.settle(Answered(one, [Reply(550, "no")]))
        assert await asyncio.to_thread(tried.wait, PATIENCE)
        assert len(held) == 1
        disk.empty()
        await settler.finish(PATIENCE)
        outbox.wait(PATIENCE)

    with small_disk(salmon.folder / "run") as disk:
        asyncio.run(main(disk))
        assert len(held) == 0
        assert len(salmon.relayed) == 1, "its sender is told once"


def test_a_store_is_opened_again_on_a_full_disk(salmon: Salmon, disk: Disk) -> None:
    store = EmbeddedStore(disk.folder / "hold")
    arrivals = [
        Arrival(Envelope("a@example.net", ("b@example.org",)), ("acme",), [MESSAGE * times])
        for times in (1, 10_000)
    ]
    [[small], [large]] = store.put(arrivals)
    store.close()
    disk.fill(64 * 1024)  # SQLite needs as much as its index of the log
    store = EmbeddedStore(disk.folder / "hold")
    assert [one.key for one in store.feed("acme").take(10, MIB)] == [small, large]
    loaded = store.load([small, large])
    assert whole(loaded[small]) == MESSAGE and whole(loaded[large]) == MESSAGE * 10_000
    store.close()
