"""The process is killed (SIGKILL), again and again, and started again until nothing waits.

In two ways: at random instants, and at each line of the code between a message's last octet and
its 250, one after another.  After every
death the ledger is reconciled: what the handlers wrote down, what the journal has, what waits with
the provider and in the queue.

- Nothing is lost: what the provider has let go of was handled, or waits in the queue, or is in the
  undeliverable queue.
- Nothing is repeated but what was handled (in queue mode: stored) and not yet recorded at the
  instant of a death; and that is one delivery for each thread, the one in hand, or, in queue mode,
  what was synced together, with nothing after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.configuration import agent_keys
from support.holding import Holding
from support.processes import LONG, KillableProcess
from support.sample import amount, chance, positions

from salmon_revsmtp.delivery.maildir import by_age, open_queue
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.smtp.envelope import Envelope

# Recipients by what their handlers do; "boom" raises, "never" refuses.
CASTS = (("ann",), ("ann", "bob"), ("boom",), ("ann", "never"), ("never", "boom", "bob"))
# Few, but each of them.
LINE_BY_LINE = (("ann", "never"), ("boom",))

#: A delivery: subject and recipient.
Delivery = tuple[str, str]
#: A delivery as the journal has it: service, digest and recipient.
Record = tuple[str, str, str]


@contextlib.contextmanager
def serving(held: Holding) -> Iterator[Provider]:
    """The built-in provider in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    provider = held.provider()

    def do(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(LONG)

    do(provider.start())
    try:
        yield provider
    finally:
        do(provider.stop())
        do(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Ledger:
    """What is known of every delivery, reconciled after each death."""

    def __init__(self, folder: Path, delivery: str) -> None:
        self.folder = folder
        mode, _, threads = delivery.partition(" ")
        self.queued, self.threads = mode == "queue", int(threads or 1)
        self.held = Holding(folder / "provider")
        self.sent: dict[Delivery, int] = {}
        self.keys: dict[int, str] = {}
        self.digests: dict[str, str] = {}
        self.begun: Counter[Delivery] = Counter()
        self.ended: Counter[Delivery] = Counter()
        self.stored: dict[str, Delivery] = {}
        self.notifications = 0
        self.repeats = 0
        self._read = 0
        self._recorded: set[Record] = set()

    def put(self, cast: tuple[str, ...]) -> None:
        """Give the provider one more message."""
        subject = f"m{len(self.keys)}"
        recipients = tuple(f"{name}@example.org" for name in cast)
        data = f"From: a@example.net\r\nSubject: {subject}\r\n\r\nhello\r\n".encode()
        key = self.held.put(Envelope("a@example.net", recipients), data)
        self.keys[key] = subject
        self.digests[subject] = hashlib.sha256(data).hexdigest()
        self.sent.update({(subject, recipient): key for recipient in recipients})

    def reconcile(self) -> None:
        """After a death: everything is somewhere, and nothing was repeated without its reason."""
        before = set(self._recorded)
        self._recorded = self._read_journal()
        made = self._read_ledger(before)
        # The consumer has one thread.
        most = 1 if self.queued else self.threads
        assert len(made - self._recorded) <= most, "more than was in hand was not recorded"
        if self.queued:
            stored = self._read_queue(before)
            made = set(stored)
            if self.threads == 1:
                first = next((one for one in stored if one not in self._recorded), None)
                since = stored[stored.index(first) :] if first else []
                assert not self._recorded & set(since), "more than was synced together"
            else:
                # Each thread makes one message safe for all its recipients, and records that.
                messages = {digest for _, digest, _ in made - self._recorded}
                assert len(messages) <= self.threads, "more than was in hand"
        waiting = set(self._waiting())
        undeliverable = set(self._undeliverable())
        for delivery in self.sent:
            safe = (
                delivery in waiting
                or self.ended[delivery]
                or delivery in undeliverable
                or delivery in self._in_queue()
            )
            assert safe, f"{delivery} is lost"

    def _read_ledger(self, before: set[Record]) -> set[Record]:
        """What was handled in this run."""
        try:
            lines = (self.folder / "ledger").read_text().splitlines()
        except FileNotFoundError:
            return set()
        made: set[Record] = set()
        for line in lines[self._read :]:
            what, subject, recipient, digest = line.split()
            if what == "sent":
                self.notifications += 1
                continue
            counts = self.begun if what == "begin" else self.ended
            counts[subject, recipient] += 1
            if what == "begin":
                # In queue mode the consumer is judged by what was stored, not by what was sent.
                service = "queue run/inbound" if self.queued else "default"
                record = (service, digest if self.queued else self.digests[subject], recipient)
                assert record not in made, f"{line}: twice in one run"
                assert record not in before, f"{line}: again, though recorded"
                made.add(record)
                self.repeats += counts[subject, recipient] > 1
        self._read = len(lines)
        return made

    def _read_queue(self, before: set[Record]) -> list[Record]:
        """What was stored in this run, in its order."""
        made: list[Record] = []
        for key, stored in self._queue("run/inbound"):
            if key not in self.stored:
                delivery = _delivery(stored)
                self.stored[key] = delivery
                record = ("default", self.digests[delivery[0]], delivery[1])
                assert record not in before, f"{delivery}: stored again, though recorded"
                made.append(record)
        return made

    def _read_journal(self) -> set[Record]:
        path = self.folder / "run/revsmtp.sqlite3"
        if not path.exists():
            return set()
        database = sqlite3.connect(path)
        try:
            if not database.execute("PRAGMA user_version").fetchone()[0]:
                return set()
            rows = list(
                database.execute("SELECT lower(hex(digest)), service, recipient FROM deliveries")
            )
        finally:
            database.close()
        # The consumer's have the key of the file behind the queue's name.
        return {
            (" ".join(service.split()[:2]), digest, recipient)
            for digest, service, recipient in rows
        }

    def _waiting(self) -> Iterator[Delivery]:
        for held in self.held.waiting():
            for recipient in held.envelope.recipients:
                yield self.keys[held.key], recipient

    def _in_queue(self) -> set[Delivery]:
        return {_delivery(stored) for _, stored in self._queue("run/inbound")}

    def _undeliverable(self) -> Iterator[Delivery]:
        for _, stored in self._queue("run/undeliverable"):
            yield _delivery(stored)

    def _queue(self, name: str) -> Iterator[tuple[str, bytes]]:
        if (self.folder / name).exists():
            opened = open_queue(self.folder / name)
            for key in by_age(opened.keys()):
                yield key, opened.mbox.get_bytes(key)

    def settled(self) -> None:
        """At the end: nothing waits, and everybody was served."""
        assert len(self.held) == 0
        assert self._in_queue() == set()
        assert set(self.begun) == set(self.sent)
        undeliverable = Counter(self._undeliverable())
        for delivery in self.sent:
            if delivery[1].startswith("boom"):
                assert undeliverable[delivery] >= 1
            else:
                assert self.ended[delivery] >= 1


def _delivery(stored: bytes) -> Delivery:
    recipient = re.search(rb"^Delivered-To: (.*)$", stored, re.MULTILINE)
    subject = re.search(rb"^Subject: (.*)$", stored, re.MULTILINE)
    assert recipient and subject
    return subject[1].decode(), recipient[1].decode()


@contextlib.contextmanager
def everything(folder: Path, delivery: str) -> Iterator[tuple[Ledger, KillableProcess]]:
    (folder / "run").mkdir()
    ledger = Ledger(folder, delivery)
    with serving(ledger.held) as provider:
        killable = KillableProcess(folder, agent_keys(provider.port), delivery)
        try:
            yield ledger, killable
        finally:
            killable.close()


def drain(ledger: Ledger, killable: KillableProcess) -> None:
    """Processes that no one kills, until nothing waits.

    What several deaths in a row have hit is set aside by the provider, and the owner has it back.
    """
    for _ in range(50):
        ledger.held.retry()
        assert killable.run("collect") == 0
        if ledger.queued:
            assert killable.run("consume") == 0
        ledger.reconcile()
        if len(ledger.held) == 0:
            return
    raise AssertionError("the provider does not get empty")


def killed_at_random(folder: Path, delivery: str, kills: int, chance: random.Random) -> Ledger:
    with everything(folder, delivery) as (ledger, killable):
        done = 0
        while done < kills:
            while len(ledger.held) < 30:
                ledger.put(chance.choice(CASTS))
            do = "consume" if ledger.queued and chance.random() < 0.5 else "collect"
            # So that most deaths fall where messages are under way, wherever that is here.
            done += killable.run(do, kill_after=chance.uniform(0.005, 0.08)) == -9
            ledger.reconcile()
        drain(ledger, killable)
        ledger.settled()
        assert sum(ledger.begun.values()) == len(ledger.sent) + ledger.repeats
        return ledger


@pytest.mark.parametrize("delivery", ["router", "queue", "router 4", "queue 4"])
def test_killed_at_random_nothing_is_lost(tmp_path: Path, delivery: str) -> None:
    killed_at_random(tmp_path, delivery, kills=15, chance=random.Random(2645))


@pytest.mark.long
@pytest.mark.parametrize("delivery", ["router", "queue", "router 4", "queue 4"])
@pytest.mark.parametrize("part", range(2))
def test_killed_at_random_hundreds_of_times_nothing_is_lost(
    tmp_path: Path, delivery: str, part: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = amount(250, sampled=50)
    ledger = killed_at_random(tmp_path, delivery, kills, chance())
    deliveries, repeats = len(ledger.sent), ledger.repeats
    with capsys.disabled():
        print(f"\n{delivery}: {deliveries} deliveries, {kills} kills, {repeats} repeats")


def killed_line_by_line(folder: Path, delivery: str, do: str, lines: Iterable[int]) -> int:
    """Die at each of these lines until a run gets to its end; returns how often it died."""
    deaths = 0
    with everything(folder, delivery) as (ledger, killable):
        for line in lines:
            for cast in LINE_BY_LINE:
                ledger.put(cast)
            if do == "consume":
                assert killable.run("collect") == 0
            status = killable.run(do, die_at=line)
            ledger.reconcile()
            drain(ledger, killable)
            if status == 0:
                break
            deaths += 1
        ledger.settled()
    return deaths


LINES = [("router", "collect"), ("queue", "collect"), ("queue", "consume")]


@pytest.mark.parametrize(("delivery", "do"), LINES)
def test_killed_at_some_lines_nothing_is_lost(tmp_path: Path, delivery: str, do: str) -> None:
    assert killed_line_by_line(tmp_path, delivery, do, itertools.count(1, 173)) >= 2


@pytest.mark.long
@pytest.mark.parametrize(("delivery", "do"), LINES)
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_line_nothing_is_lost(
    tmp_path: Path, delivery: str, do: str, part: int
) -> None:
    """Four parts, so that they may run side by side."""
    lines = positions(1 + part, 4, one_in=20)
    assert killed_line_by_line(tmp_path, delivery, do, lines) > amount(50, sampled=2)
