"""When agents run, on a clock that the tests turn."""

from __future__ import annotations

import heapq
import random
from itertools import pairwise

import pytest

from salmon_revsmtp.customer.schedule import FIRST, Schedule

MINUTE = 60.0
HOUR = 60 * MINUTE


def schedule(every: dict[str, float], now: float = 0.0) -> Schedule:
    return Schedule(every, now, lambda wait: wait)


def start(one: Schedule, now: float) -> list[str]:
    """Everything that is due by ``now``, as a loop would start it."""
    started = []
    while (at := one.next_time()) is not None and at <= now:
        name = one.due(at)
        if name is None:
            break
        started.append(name)
    return started


def test_the_first_run_is_soon_and_twenty_do_not_dial_in_the_same_second() -> None:
    one = schedule({f"agent{number}": 10 * MINUTE for number in range(20)})
    starts: list[float] = []
    while len(starts) < 20:
        at = one.next_time()
        assert at is not None
        assert one.due(at) is not None
        starts.append(at)
    assert starts[0] == FIRST
    assert all(later - earlier >= 1 for earlier, later in pairwise(starts))
    assert starts[-1] < MINUTE


def test_a_run_comes_every_interval_from_start_to_start() -> None:
    one = schedule({"isp": 10 * MINUTE})
    assert one.due(FIRST) == "isp"
    one.finished("isp", True, FIRST + 30)
    assert one.next_time() == FIRST + 10 * MINUTE


def test_an_agent_that_runs_is_not_due() -> None:
    one = schedule({"isp": MINUTE})
    assert one.due(FIRST) == "isp"
    assert one.due(HOUR) is None
    assert one.next_time() is None
    assert one.next_run("isp") is None


def test_after_failures_it_is_sooner_at_first() -> None:
    one = schedule({"isp": 10 * MINUTE})
    now, waits = FIRST, []
    for _ in range(7):
        assert one.due(now) == "isp"
        one.finished("isp", False, now)
        at = one.next_time()
        assert at is not None
        waits.append((at - now) / MINUTE)
        now = at
    assert waits == [1, 2, 4, 8, 10, 10, 10]
    assert one.due(now) == "isp"
    one.finished("isp", True, now)
    assert one.next_time() == now + 10 * MINUTE


def test_jitter_never_makes_it_later_than_its_interval() -> None:
    one = Schedule({"isp": 2 * MINUTE}, 0, lambda wait: wait * 1.2)
    now = FIRST
    for _ in range(5):
        assert one.due(now) == "isp"
        one.finished("isp", False, now)
        at = one.next_time()
        assert at is not None and at - now <= 2 * MINUTE
        now = at


@pytest.mark.parametrize("sleep", [HOUR, 30 * 24 * HOUR])
def test_after_a_long_sleep_it_catches_up_once(sleep: float) -> None:
    one = schedule({"isp": 10 * MINUTE, "mx": 20 * MINUTE})
    assert start(one, FIRST + 5) == ["isp", "mx"]
    one.finished("isp", True, FIRST + 6)
    one.finished("mx", True, FIRST + 6)
    assert one.due(sleep) == "isp"
    assert one.due(sleep) is None, "not in the same second"
    assert one.due(sleep + 1) == "mx"
    one.finished("isp", True, sleep + 2)
    one.finished("mx", True, sleep + 2)
    assert one.next_run("isp") == sleep + 10 * MINUTE


def test_an_agent_that_is_held_back_is_looked_at_again_soon() -> None:
    one = schedule({"isp": 10 * MINUTE})
    assert one.due(FIRST) == "isp"
    one.defer("isp", FIRST)
    assert one.next_time() == FIRST + MINUTE


def test_more_agents_than_seconds() -> None:
    one = schedule({f"agent{number}": MINUTE for number in range(1000)})
    runs = 0
    now = 0.0
    while now < MINUTE:
        name = one.due(now)
        if name is not None:
            runs += 1
            one.finished(name, True, now)
        at = one.next_time()
        assert at is not None
        now = max(at, now + 0.001)
    assert runs >= 1000


def test_nobody_is_nothing() -> None:
    one = schedule({})
    assert one.due(5) is None
    assert one.next_time() is None


def test_fifty_agents_for_a_week_with_failures_sleeps_and_restarts() -> None:
    """Simulated: each runs as often as it should, never twice at once, never never."""
    chance = random.Random(2645)
    every = {f"agent{number}": chance.choice([1, 5, 10, 60]) * MINUTE for number in range(50)}
    # Half of them fail for some hours of the week.
    outage = {
        name: (start, start + chance.uniform(1, 12) * HOUR)
        for name in list(every)[::2]
        for start in [chance.uniform(1, 100) * HOUR]
    }
    sleeps = [(24 * HOUR, 32 * HOUR), (75 * HOUR, 75.5 * HOUR), (120 * HOUR, 140 * HOUR)]
    restarts = [10 * HOUR, 60 * HOUR, 100 * HOUR]
    coming = list(restarts)
    week = 7 * 24 * HOUR

    starts: dict[str, list[float]] = {name: [] for name in every}
    ends: list[tuple[float, str]] = []
    running: set[str] = set()
    now = 0.0
    one = Schedule(every, now, lambda wait: wait * chance.uniform(0.8, 1.2))
    while now < week:
        if coming and now >= coming[0]:
            coming.pop(0)
            running, ends = set(), []
            one = Schedule(every, now, lambda wait: wait * chance.uniform(0.8, 1.2))
        while ends and ends[0][0] <= now:
            _, name = heapq.heappop(ends)
            running.discard(name)
            begins, finishes = outage.get(name, (week, week))
            one.finished(name, not begins <= now < finishes, now)
        while (due := one.due(now)) is not None:
            assert due not in running
            running.add(due)
            starts[due].append(now)
            heapq.heappush(ends, (now + chance.uniform(0.1, 20), due))
        times = [at for at in (one.next_time(), ends[0][0] if ends else None) if at is not None]
        now = max(now + 0.01, min(times))
        for asleep, awake in sleeps:
            if asleep <= now < awake:
                now = awake

    awake_for = week - sum(awake - asleep for asleep, awake in sleeps)
    for name, at in starts.items():
        expected = awake_for / every[name]
        begins, finishes = outage.get(name, (0, 0))
        # While it fails it may run a few times more, at each restart and after each sleep once.
        extra = 12 + 0.3 * (finishes - begins) / every[name]
        assert expected * 0.9 - 6 <= len(at) <= expected + extra, (name, len(at), expected)
        gaps = [later - earlier for earlier, later in pairwise(at)]
        longest_sleep = max(awake - begin for begin, awake in sleeps)
        assert max(gaps) <= every[name] + 90 + longest_sleep
        for gap, moment in zip(gaps, at, strict=False):
            if not any(moment < restart <= moment + gap for restart in restarts):
                assert gap >= 0.8 * MINUTE, (name, moment / HOUR, gap)
            if not any(moment <= awake and moment + gap >= begin for begin, awake in sleeps):
                assert gap <= every[name] + 90, (name, moment / HOUR, gap)
