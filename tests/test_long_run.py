"""A simulated week of the server: real agents of both types, a simulated clock."""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.configuration import agent_keys, configuration
from support.salmon import Salmon

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.journal.collections import AgentState
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.daemon import NOTIFY_EVERY, TICK, Daemon
from salmon_revsmtp.server.failing import Failing

MINUTE, HOUR = 60.0, 3600.0
WEEK = 7 * 24 * HOUR


class Leaping(selectors.DefaultSelector):
    """Does not wait: when nothing is ready, the loop's time leaps to its next timer."""

    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0 if timeout else timeout)
        if not ready and timeout:
            self.loop.now += timeout
        return ready


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        selector = Leaping()
        selector.loop = self
        super().__init__(selector)
        self.set_default_executor(Inline())

    def time(self) -> float:
        return self.now


class Inline(ThreadPoolExecutor):
    """Threads would take real time: what is handed over is done at once."""

    def submit(self, function: Any, /, *args: Any, **keys: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **keys))
        return done


class World:
    """The network, the machine's sleep, and what is noticed of each run."""

    def __init__(self, loop: SimulatedLoop, agents: tuple[Any, ...]) -> None:
        self._loop = loop
        self._chance = random.Random(1985)
        self.slept = 0.0
        self.running: set[str] = set()
        self.starts: dict[str, list[float]] = defaultdict(list)
        # Every other agent has an outage of some hours.
        self.outages = {
            agent.name: (begin, begin + self._chance.uniform(1, 12) * HOUR)
            for agent in agents[::2]
            for begin in [self._chance.uniform(5, 120) * HOUR]
        }
        self.configuration = SimpleNamespace(agents=agents, holds=False, module=None)
        self.providing = SimpleNamespace(provider=lambda: None, leave_store=lambda: None)
        self.project = Path.cwd()
        self.failing = Failing()
        self.journal: dict[str, float] = {}
        self.failed: set[str] = set()
        self.sent_waiting: list[float] = []
        self.outbox = SimpleNamespace()

    def send_waiting(self) -> None:
        self.sent_waiting.append(self.clock())

    def clock(self) -> float:
        """As CLOCK_BOOTTIME: it goes on while the machine sleeps, and timers do not."""
        return self._loop.time() + self.slept

    async def state(self, name: str) -> AgentState:
        return AgentState(None, self.journal.get(name))

    async def enabled(self, agent: Any) -> bool:
        return True

    async def disabled(self, agents: Iterable[Any]) -> list[Any]:
        return []

    async def note_traffic(self, collections: Iterable[Any]) -> None:
        pass

    async def listeners(self) -> list[Any]:
        return []

    def collection(self, agent: Any) -> Any:
        tally = SimpleNamespace(messages=0, bytes=0, deferring=None)
        report = Report(agent.name, agent.protocol)
        return SimpleNamespace(
            agent=agent,
            tally=tally,
            report=report,
            stop=lambda: False,
            pushing=False,
            push_since=None,
        )

    async def run(self, agent: Any, collection: Any) -> Report:
        name = collection.agent.name
        assert name not in self.running, "two runs of one agent at once"
        self.running.add(name)
        self.starts[name].append(self.clock())
        try:
            await asyncio.sleep(self._chance.uniform(0.1, 20))
        finally:
            self.running.discard(name)
        begin, end = self.outages.get(name, (WEEK, WEEK))
        failing = begin <= self.clock() < end
        if failing:
            self.failed.add(name)
        good = Outcome.REQUESTED if collection.agent.protocol == "etrn" else Outcome.NO_MAIL
        report = Report(name, collection.agent.protocol, Outcome.FAILED if failing else good)
        self.failing.note(report, await self.state(name))
        if failing:
            self.journal.setdefault(name, self.clock())
        else:
            self.journal.pop(name, None)
        return report


def agents() -> tuple[Any, ...]:
    keys = []
    for number in range(50):
        every = (5, 10, 30, 60)[number % 4]
        one = agent_keys(366, name=f"agent{number}", every=every)
        if number % 2:
            one["protocol"] = "etrn"
        keys.append(one)
    return configuration(*keys).agents


def test_a_week(salmon: Salmon, caplog: pytest.LogCaptureFixture) -> None:
    sleeps = {20 * HOUR: 8 * HOUR, 70 * HOUR: HOUR / 2, 110 * HOUR: 20 * HOUR}
    restarts = [12 * HOUR, 13 * HOUR, 90 * HOUR]
    loop = SimulatedLoop()
    all_agents = agents()
    world: Any = World(loop, all_agents)

    async def sleep_and_wake() -> None:
        for at, length in sleeps.items():
            await asyncio.sleep(at - world.clock())
            world.slept += length

    async def week() -> None:
        sleeping = asyncio.create_task(sleep_and_wake())
        for end in (*restarts, WEEK):
            world.failing = Failing()
            daemon = Daemon(world, Plugins(), clock=world.clock)
            running = asyncio.create_task(daemon.run())
            while world.clock() < end:
                await asyncio.sleep(min(MINUTE, end - world.clock()))
            daemon.stop()
            await running
            assert world.running == set()
        await sleeping

    try:
        loop.run_until_complete(week())
    finally:
        loop.close()

    asleep = {at: at + length for at, length in sleeps.items()}
    for agent in all_agents:
        every = agent.settings.every * MINUTE
        starts = world.starts[agent.name]
        awake = WEEK - sum(sleeps.values())
        # Once more for each start and each sleep; while it fails, the first tries come sooner.
        more = len(restarts) + 1 + len(sleeps) + (8 if agent.name in world.outages else 0)
        assert awake / every - more - len(sleeps) <= len(starts) <= awake / every + more, agent
        for earlier, later in pairwise(starts):
            assert later - earlier <= every + 2 * TICK + MINUTE or any(
                earlier <= wakes and later >= falls for falls, wakes in asleep.items()
            ), (agent, earlier / HOUR, later / HOUR)
    for name in world.outages:
        noticed = int(name in world.failed)  # not if the machine slept all the while
        assert caplog.text.count(f"agent={name} fails") == noticed
        assert caplog.text.count(f"agent={name} recovered") == noticed
    assert len(world.failed) >= 20
    # What the relay did not take is tried again every five minutes, and no oftener.
    assert awake / NOTIFY_EVERY * 0.9 < len(world.sent_waiting) < awake / NOTIFY_EVERY + 10
    # No one dials in the same second as another, not even after a sleep.
    every_start = sorted(start for starts in world.starts.values() for start in starts)
    assert all(later - earlier >= 0.99 for earlier, later in pairwise(every_start))
