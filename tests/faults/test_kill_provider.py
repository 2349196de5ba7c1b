"""The provider is killed (SIGKILL) again and again, and started again.

At each line of its code between a message's last octet and its 250, one after another; at each line
between a customer's answer and the end of its settling; and at random, while mail comes in and goes
out.  After every death:

- Nothing is lost: each message whose sender heard 250 is held whole, or its customer handled it.
- The customer's handlers see nothing twice, whatever the provider sends again.
- A sender is told of each recipient that was refused.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import smtplib
import threading
import time
from collections import Counter
from collections.abc import Iterable

import pytest
from support.collecting import collect
from support.configuration import agent_keys, configuration
from support.processes import LONG
from support.provider_process import ProviderProcess
from support.salmon import Salmon, fails
from support.sample import amount, chance, positions

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.daemon import Daemon

# One has a file of its own in the store, and is for two accounts.
LARGE = 200_000

# Both count lines by the one hook that Python has for that.
not_measured = pytest.mark.skipif(
    "COVERAGE_RUN" in os.environ, reason="coverage has the hook that counts lines"
)


def message(subject: str, octets: int = 0) -> bytes:
    line = b".%b, and so on\r\n" % subject.encode()
    head = f"From: a@example.net\r\nSubject: {subject}\r\n\r\n".encode()
    return head + line * (octets // len(line) + 1)


class Senders:
    """The world: sends messages, each like no other, and remembers which were answered 250."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sent: dict[str, bytes] = {}
        self.heard: set[str] = set()
        self._lock = threading.Lock()

    def send(self, *recipients: str, octets: int = 0) -> None:
        """Send one; a provider that dies is no error, it only is not 250."""
        with self._lock:
            subject = f"m{len(self.sent)}"
            self.sent[subject] = message(subject, octets)
        try:
            with smtplib.SMTP("127.0.0.1", self.port, timeout=LONG) as client:
                client.sendmail("a@example.net", list(recipients), self.sent[subject])
                self.heard.add(subject)
        except (OSError, smtplib.SMTPException):
            return


def subject_of(data: bytes) -> str:
    return data.partition(b"Subject: ")[2].split()[0].decode()


def is_whole(world: Senders, data: bytes) -> bool:
    """What is held is what was sent, beneath our Received line."""
    return data.startswith(b"Received: ") and data.endswith(b"\r\n" + world.sent[subject_of(data)])


def handled(salmon: Salmon) -> Counter[str]:
    return Counter(str(one["Subject"]) for one in salmon.handled)


def collect_all(salmon: Salmon, provider: ProviderProcess) -> None:
    """Collect until nothing is held for acme; the provider runs."""
    for _ in range(20):
        [report] = asyncio.run(collect(salmon, agent_keys(provider.odmr)))
        if report.outcome is Outcome.NO_MAIL:
            return
    raise AssertionError(f"the provider does not get empty: {report}")


# -- between the last octet and the 250 ------------------------------------------------------------


def killed_while_it_takes_mail(salmon: Salmon, lines: Iterable[int]) -> int:
    """Die at each of these lines until one is not reached; returns how often it died."""
    salmon.handle(".*")
    deaths = 0
    with ProviderProcess(salmon.folder / "provider") as provider:
        world = Senders(provider.mx)
        for line in lines:
            provider.start(line, "provider/intake.py:deliver")
            world.send("b@example.org")
            world.send("b@example.org", "c@example.org", "d@example.com", octets=LARGE)
            died = provider.stop()
            held = [(one.account, data) for one, data in provider.held()]
            assert all(is_whole(world, data) for _, data in held)
            here = Counter((account, subject_of(data)) for account, data in held)
            assert {("acme", one) for one in world.heard} <= set(here), "a message is lost"
            assert max(here.values(), default=0) <= 1
            assert len(list((provider.folder / "run/hold/bodies").iterdir())) == len(
                {subject_of(data) for _, data in held if len(data) > LARGE}
            )
            if not died:
                break
            deaths += 1
        provider.start()
        collect_all(salmon, provider)
        provider.stop()
    # The large one had two recipients.
    once = {one: 2 if len(data) > LARGE else 1 for one, data in world.sent.items()}
    found = handled(salmon)
    assert found == {one: once[one] for one in found}
    assert world.heard <= set(found)
    return deaths


@not_measured
def test_killed_at_some_lines_before_the_250(salmon: Salmon) -> None:
    assert killed_while_it_takes_mail(salmon, itertools.count(1, 101)) >= 5


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_line_before_the_250(salmon: Salmon, part: int) -> None:
    """Four parts, so that they may run side by side."""
    lines = positions(1 + part, 4, one_in=10)
    assert killed_while_it_takes_mail(salmon, lines) > amount(50, sampled=5)


# -- between the answer and its settling -----------------------------------------------------------


def killed_while_it_settles(salmon: Salmon, lines: Iterable[int]) -> int:
    salmon.handle("[ab]@.*")
    refused = Salmon(salmon.folder)
    refused.handle("never@.*", fails(550, "5.1.1 no such user"))
    deaths = 0
    with ProviderProcess(salmon.folder / "provider") as provider:
        names = (f"m{number}" for number in itertools.count())
        for line in lines:
            one, two, three = (next(names) for _ in range(3))
            provider.put(("a@example.org",), message(one))
            provider.put(("a@example.org", "never@example.org"), message(two))
            provider.put(("a@example.org", "b@example.org"), message(three, LARGE))
            forget_how_many_were_told(provider)
            provider.start(line, "provider/handover.py:_answered")
            asyncio.run(collect(salmon, agent_keys(provider.odmr)))
            died = provider.stop()
            held = {subject_of(data) for _, data in provider.held()}
            done = handled(salmon)
            assert {one, two, three} <= held | set(done), "a message is lost"
            provider.start()
            collect_all(salmon, provider)
            provider.stop()
            assert provider.held() == []
            assert handled(salmon) - done == Counter({one: 1, two: 1, three: 2}) - done
            deaths += died
            told = _told(provider)
            tries = len(refused.handled)
            assert deaths + tries >= told >= tries, "each refusal is told, a repeat at a death only"
            if not died:
                break
    assert set(handled(salmon).values()) <= {1, 2}
    assert handled(refused) == {f"m{number}": 1 for number in range(1, 3 * tries, 3)}
    return deaths


def forget_how_many_were_told(provider: ProviderProcess) -> None:
    """In an hour there are 500 notifications at most, and here there are more."""
    for one in (provider.folder / "run").glob("revsmtp.sqlite3*"):
        one.unlink()


def _told(provider: ProviderProcess) -> int:
    """How many notifications there are: those that the relay has, and those that wait for it."""
    ledger, unsent = provider.folder / "ledger", provider.folder / "run/unsent/new"
    sent = ledger.read_text().splitlines() if ledger.exists() else []
    return len(sent) + (len(list(unsent.iterdir())) if unsent.exists() else 0)


@not_measured
def test_killed_at_some_lines_before_an_answer_is_settled(salmon: Salmon) -> None:
    assert killed_while_it_settles(salmon, itertools.count(1, 251)) >= 5


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_line_before_an_answer_is_settled(salmon: Salmon, part: int) -> None:
    lines = positions(1 + part, 4, one_in=10)
    assert killed_while_it_settles(salmon, lines) > amount(50, sampled=5)


# -- at random, with a push session ----------------------------------------------------------------


def killed_at_random(salmon: Salmon, kills: int, random_: random.Random) -> Senders:
    """Mail comes from several senders at once, a customer has a push session, and the provider is
    killed again and again."""
    salmon.handle(".*")
    ending, up = threading.Event(), threading.Event()

    def sending(world: Senders, seed: int) -> None:
        own = random.Random(seed)
        while not ending.is_set():
            if up.wait(1):
                world.send("b@example.org", octets=own.choice((0, 0, 0, 4_000, LARGE)))

    async def customer(provider: ProviderProcess) -> None:
        plugins = Plugins.load()
        valid = configuration(agent_keys(provider.odmr, every=0.005), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            daemon = Daemon(collector, plugins)
            running = asyncio.create_task(daemon.run())
            await asyncio.to_thread(kill_again_and_again, provider)
            daemon.stop()
            await asyncio.wait_for(running, LONG)

    def kill_again_and_again(provider: ProviderProcess) -> None:
        for _ in range(kills):
            provider.start()
            up.set()
            time.sleep(random_.uniform(0.05, 0.5))
            up.clear()
            provider.kill()
            held = provider.held()
            assert all(is_whole(world, data) for _, data in held)
            here = {subject_of(data) for _, data in held}
            assert set(world.heard) - here <= set(handled(salmon)), "a message is lost"

    with ProviderProcess(salmon.folder / "provider") as provider:
        world = Senders(provider.mx)
        threads = [threading.Thread(target=sending, args=(world, seed)) for seed in range(4)]
        for one in threads:
            one.start()
        try:
            asyncio.run(customer(provider))
        finally:
            ending.set()
            for one in threads:
                one.join()
        assert salmon.handled, "the customer was never there in time"
        provider.start()
        collect_all(salmon, provider)
        provider.stop()
        assert provider.held() == []
    assert world.heard <= set(handled(salmon)), "a message is lost"
    assert set(handled(salmon).values()) == {1}, "a message was handled twice"
    return world


def test_killed_at_random(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "DIAL_AGAIN", 0.05)
    monkeypatch.setattr(schedule, "SPREAD", 0.05)
    world = killed_at_random(salmon, 10, random.Random(1870))
    assert len(world.heard) > 20


@pytest.mark.long
def test_killed_at_random_many_times(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "DIAL_AGAIN", 0.05)
    monkeypatch.setattr(schedule, "SPREAD", 0.05)
    kills = amount(300, sampled=60)
    world = killed_at_random(salmon, kills, chance())
    with capsys.disabled():
        print(f"\n{kills} kills, {len(world.sent)} messages, {len(world.heard)} answered 250")
