"""The provider, or home, is killed (SIGKILL) within a live transaction, and started again.

At each line of its code between RCPT and the answer to the message, one after another; and at
random, while several senders are there.  The sender sends its message again until it hears 250.
After every death:

- What a sender heard 250 for was handled, or is held.
- The handlers see nothing twice, whatever is sent again by whom; but home may see that one again
  which was handled and not recorded at the instant of its death.
- No one is sent a notification.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.ends import PATIENCE, message
from support.processes import KillableProcess
from support.provider_process import ProviderProcess
from support.salmon import Salmon
from support.sample import amount, chance, positions
from support.senders import Mail, send_until_heard
from support.world import World, world

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.server.control import SOCKET, NoServer, ask
from salmon_revsmtp.server.daemon import Daemon

# Goes by a file.
LARGE = 600_000
# How often a sender comes again while others are killed.
OFTEN = 10_000

# Both count lines by the one hook that Python has for that.
not_measured = pytest.mark.skipif(
    "COVERAGE_RUN" in os.environ, reason="coverage has the hook that counts lines"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Home is there at once, and soon again."""
    for name in ("FIRST", "SPREAD", "DIAL_AGAIN"):
        monkeypatch.setattr(schedule, name, 0.005)


async def until(so: Callable[[], Awaitable[bool]]) -> None:
    async def wait() -> None:
        while not await so():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), PATIENCE)


# -- the provider ----------------------------------------------------------------------------------


class Killed:
    """A provider in a process that is killed, and home in this one."""

    def __init__(self, salmon: Salmon, provider: ProviderProcess) -> None:
        self.salmon, self.provider = salmon, provider
        self.expected: Counter[tuple[str, str]] = Counter()
        self.live = 0  # messages that home has answered
        self._numbers = itertools.count()

    @property
    def handled(self) -> Counter[tuple[str, str]]:
        return Counter((str(one["Subject"]), str(one.To)) for one in self.salmon.handled)

    async def ask(self, request: str) -> list[dict[str, Any]]:
        """Ask the running provider, if there is one."""

        def asked() -> list[dict[str, Any]]:
            with contextlib.suppress(NoServer, OSError):
                return list(ask({"do": request}, self.provider.folder / SOCKET))
            return []

        return await asyncio.to_thread(asked)

    async def session(self) -> None:
        """Wait until home is there."""

        async def there() -> bool:
            return any("session" in one for one in await self.ask("provider sessions"))

        await until(there)

    async def start(self, line: int | None = None) -> None:
        after = "provider/live.py:decide" if line is not None else ""
        await asyncio.to_thread(self.provider.start, line, after)

    def mail(self, octets: int = 0, *recipients: str) -> Mail:
        """A message that is like no other."""
        subject = f"m{next(self._numbers)}"
        to = recipients or ("b@example.org",)
        self.expected.update((subject, one) for one in to)
        return Mail(message(subject, octets), to, prdr=len(to) > 1)

    async def send(self, mail: Mail, again: Callable[[], Awaitable[None]]) -> None:
        said = await send_until_heard(self.provider.mx, mail, again=again, most=OFTEN)
        assert all(reply.positive for reply in said.values()), said
        self.live += all("held as" not in reply.text for reply in said.values())

    async def empty(self) -> None:
        """Wait until all is handled, with a provider that runs."""

        async def done() -> bool:
            said = await self.ask("provider accounts")
            held = [one["account"]["messages"] for one in said if "account" in one]
            return bool(held) and not sum(held) and self.handled >= self.expected

        await until(done)
        assert self.handled == self.expected


def killed_and_there(salmon: Salmon, work: Callable[[Killed], Awaitable[None]]) -> None:
    """Run ``work`` while home is there; in the end all is handled once, and no one was notified."""
    salmon.handle(".*")

    async def main(provider: ProviderProcess) -> None:
        plugins = Plugins.load()
        valid = configuration(agent_keys(provider.odmr, every=0.0005), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            daemon = Daemon(collector, plugins)
            running = asyncio.create_task(daemon.run())
            killed = Killed(salmon, provider)
            await work(killed)
            await killed.start()
            await killed.empty()
            await asyncio.to_thread(provider.stop)
            daemon.stop()
            await asyncio.wait_for(running, PATIENCE)

    with ProviderProcess(salmon.folder / "provider") as provider:
        asyncio.run(main(provider))
        assert provider.held() == []
        assert not (provider.folder / "ledger").exists(), "someone was notified"
    assert salmon.relayed == []


def killed_at_lines(salmon: Salmon, octets: int, recipients: int, lines: Iterable[int]) -> int:
    """Die at each of these lines until one is not reached; returns how often it died."""
    to = [f"b{number}@example.org" for number in range(recipients)]
    deaths = 0

    async def at_line(killed: Killed, line: int) -> bool:
        """Whether it died."""
        tries = 1

        async def again() -> None:
            nonlocal tries
            tries += 1
            await asyncio.to_thread(killed.provider.kill)
            await killed.start()
            if line % 2:  # or the sender is there before home is
                await killed.session()

        await killed.start(line)
        await killed.session()
        mail = killed.mail(octets, *to)
        await killed.send(mail, again)
        # It may have died after the answer.
        died = await asyncio.to_thread(killed.provider.stop)
        held = {subject_of(data) for _, data in killed.provider.held()}
        subject = subject_of(mail.data)
        for one in to:
            assert subject in held or (subject, one) in killed.handled, "a message is lost"
        await killed.start()
        await killed.empty()
        await asyncio.to_thread(killed.provider.kill)
        return died or tries > 1

    async def work(killed: Killed) -> None:
        nonlocal deaths
        for line in lines:
            if not await at_line(killed, line):
                break
            deaths += 1
        assert killed.live, "home was never asked"

    killed_and_there(salmon, work)
    return deaths


def subject_of(data: bytes) -> str:
    return data.partition(b"Subject: ")[2].split()[0].decode()


KINDS = [(0, 1), (LARGE, 2)]


@not_measured
@pytest.mark.parametrize(("octets", "recipients"), KINDS)
def test_a_provider_killed_at_some_lines(salmon: Salmon, octets: int, recipients: int) -> None:
    assert killed_at_lines(salmon, octets, recipients, itertools.count(1, 199)) >= 2


@pytest.mark.long
@pytest.mark.parametrize(("octets", "recipients"), KINDS)
@pytest.mark.parametrize("part", range(2))
def test_a_provider_killed_at_every_line(
    salmon: Salmon, octets: int, recipients: int, part: int
) -> None:
    """Two parts, so that they may run side by side."""
    lines = positions(1 + part, 2, one_in=10)
    assert killed_at_lines(salmon, octets, recipients, lines) > amount(50, sampled=5)


def killed_at_random(salmon: Salmon, kills: int, random_: random.Random) -> int:
    """Several senders at once, and the provider is killed again and again; returns how many
    messages home has answered."""
    ending, up = asyncio.Event(), asyncio.Event()
    answered = 0

    async def work(killed: Killed) -> None:
        nonlocal answered

        async def again() -> None:
            await up.wait()

        async def sending(seed: int) -> None:
            own = random.Random(seed)
            while not ending.is_set():
                octets, recipients = own.choice(((0, 1), (0, 1), (4_000, 2), (LARGE, 1)))
                to = [f"b{number}@example.org" for number in range(recipients)]
                await killed.send(killed.mail(octets, *to), again)

        senders = [asyncio.create_task(sending(seed)) for seed in range(4)]
        for _ in range(kills):
            await killed.start()
            up.set()
            await killed.session()
            await asyncio.sleep(random_.uniform(0.0, 0.3))
            up.clear()
            await asyncio.to_thread(killed.provider.kill)
        ending.set()
        await killed.start()
        up.set()
        await asyncio.wait_for(asyncio.gather(*senders), PATIENCE)
        await killed.empty()
        await asyncio.to_thread(killed.provider.kill)
        answered = killed.live

    killed_and_there(salmon, work)
    return answered


def test_a_provider_killed_at_random(salmon: Salmon) -> None:
    assert killed_at_random(salmon, 8, random.Random(1870)) > 20


@pytest.mark.long
def test_a_provider_killed_at_random_many_times(
    salmon: Salmon, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = amount(300, sampled=60)
    live = killed_at_random(salmon, kills, chance())
    with capsys.disabled():
        print(f"\n{kills} kills, {len(salmon.handled)} deliveries, {live} messages live")


# -- home ------------------------------------------------------------------------------------------


class Home:
    """Home in a process that is killed, and the provider in this one.

    ``deaths``   how often it died.
    ``repeats``  how often that was between a handler's end and its record.
    """

    def __init__(self, folder: Path, here: World, process: KillableProcess) -> None:
        self.here = here
        self.live = self.deaths = self.repeats = 0
        self._folder, self._process = folder, process
        self._sent: set[str] = set()
        self._again: Counter[str] = Counter()  # handled, and not recorded
        self._running: asyncio.Task[int] | None = None

    async def start(self, line: int | None = None) -> None:
        """Start it, to die at this line after RCPT."""
        after = "service/recipients.py:verdict"
        run = functools.partial(self._process.run, "serve", die_at=line, after=after)
        self._running = asyncio.create_task(asyncio.to_thread(run))
        await self.here.until(self._there)

    def _there(self) -> bool:
        sessions = self.here.daemon.sessions
        return any(one.live is not None and one.live.passes("example.org") for one in sessions)

    @property
    def dead(self) -> bool:
        return self._running is None or self._running.done()

    async def kill(self) -> None:
        """End it, if it is not dead; and see what it had in hand."""
        assert self._running is not None
        self._process.kill()
        assert await self._running == -9
        # The session that there is next is another one's.
        await self.here.until(lambda: not self.here.daemon.sessions)
        self.deaths += 1
        begun, recorded = self._begun(), self._recorded()
        lost_sight_of = [one for one in begun if one not in recorded]
        assert len(lost_sight_of) <= 1, "more than the one in hand was not recorded"
        self._again.update(lost_sight_of)
        assert all(times <= 1 + self._again[one] for one, times in begun.items()), begun

    def _begun(self) -> Counter[str]:
        """How often each was given to its handler."""
        ledger = self._folder / "ledger"
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        assert not [one for one in lines if one.startswith("sent")], "someone was notified"
        return Counter(one.split()[2] for one in lines if one.startswith("begin"))

    def _recorded(self) -> set[str]:
        path = self._folder / "run/revsmtp.sqlite3"
        with contextlib.closing(sqlite3.connect(path)) as database:
            if not database.execute("PRAGMA user_version").fetchone()[0]:
                return set()  # it died before there was a journal
            return {one for (one,) in database.execute("SELECT recipient FROM deliveries")}

    async def send(self, octets: int = 0) -> None:
        """Send a message to someone who gets no other, until that is heard of."""
        # Letters, which is what the handler's route has.
        name = "".join(chr(ord("a") + int(digit)) for digit in str(len(self._sent)))
        self._sent.add(f"{name}@example.org")
        mail = Mail(message(name, octets), (f"{name}@example.org",))
        [reply] = (await send_until_heard(self.here.mx, mail)).values()
        assert reply.positive, reply
        self.live += "held as" not in reply.text

    @property
    def _held(self) -> int:
        return sum(used.messages for used in self.here.store.usages().values())

    async def settled(self) -> None:
        """Wait until all is handled, or home is dead."""
        await self.here.until(lambda: self.dead or not self._held)

    def all_handled(self) -> None:
        """Each once, but for what was in hand at a death."""
        begun = self._begun()
        assert set(begun) == self._sent, "a message is lost"
        assert all(times <= 1 + self._again[one] for one, times in begun.items()), begun
        self.repeats = sum(begun.values()) - len(begun)
        assert self.repeats <= self.deaths


def with_home(salmon: Salmon, work: Callable[[Home], Awaitable[None]]) -> Home:
    """Run ``work``; in the end all is handled."""

    async def main() -> Home:
        folder = salmon.folder / "home"
        (folder / "run").mkdir(parents=True)
        async with world(salmon) as here:
            process = KillableProcess(folder, agent_keys(here.odmr, every=0.0005), "router")
            try:
                home = Home(folder, here, process)
                await work(home)
                await home.start()
                await home.settled()
                await home.kill()
                home.all_handled()
            finally:
                process.kill()
                await asyncio.to_thread(process.close)
        return home

    home = asyncio.run(main())
    assert salmon.relayed == [], "someone was notified"
    return home


def home_killed_at_lines(salmon: Salmon, octets: int, lines: Iterable[int]) -> int:
    """Die at each of these lines until one is not reached; returns how often it died."""
    deaths = 0

    async def work(home: Home) -> None:
        nonlocal deaths
        for line in lines:
            await home.start(line)
            await home.send(octets)
            await home.settled()
            died = home.dead
            await home.kill()
            if not died:
                break
            deaths += 1
        assert home.live, "it never answered"

    with_home(salmon, work)
    return deaths


@not_measured
@pytest.mark.parametrize("octets", [0, LARGE])
def test_home_killed_at_some_lines(salmon: Salmon, octets: int) -> None:
    assert home_killed_at_lines(salmon, octets, itertools.count(1, 199)) >= 2


@pytest.mark.long
@pytest.mark.parametrize("octets", [0, LARGE])
@pytest.mark.parametrize("part", range(2))
def test_home_killed_at_every_line(salmon: Salmon, octets: int, part: int) -> None:
    """Two parts, so that they may run side by side."""
    lines = positions(1 + part, 2, one_in=10)
    assert home_killed_at_lines(salmon, octets, lines) > amount(50, sampled=5)


def home_killed_at_random(salmon: Salmon, kills: int, random_: random.Random) -> Home:
    async def work(home: Home) -> None:
        ending, up = asyncio.Event(), asyncio.Event()

        async def sending(seed: int) -> None:
            own = random.Random(seed)
            while not ending.is_set():
                await up.wait()  # what comes between two deaths is only held
                await home.send(own.choice((0, 0, 4_000, LARGE)))

        senders = [asyncio.create_task(sending(seed)) for seed in range(4)]
        for _ in range(kills):
            await home.start()
            up.set()
            await asyncio.sleep(random_.uniform(0.0, 0.3))
            up.clear()
            await home.kill()
        ending.set()
        up.set()
        await asyncio.wait_for(asyncio.gather(*senders), PATIENCE)

    return with_home(salmon, work)


def test_home_killed_at_random(salmon: Salmon) -> None:
    assert home_killed_at_random(salmon, 8, random.Random(2645)).live


@pytest.mark.long
def test_home_killed_at_random_many_times(
    salmon: Salmon, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = amount(300, sampled=60)
    home = home_killed_at_random(salmon, kills, chance())
    with capsys.disabled():
        print(f"\n{kills} kills, {home.live} messages live, {home.repeats} repeats")
