"""What a provider with very many customers needs, and what happens when all call at once::

    python -m benchmarks.fleet --customers 1000000 --nodes 20

Two parts.  The first is arithmetic on what was measured (the inputs below).  The second simulates
the customers of one host, event by event: when each dials, how long it waits for its login, and
when its session is asked whether it is there.  The times are those of the code itself: the
customers' schedule, with its waits and their variation, is the class that they run.

Nothing is measured here, and no server runs.  The same arguments print the same text.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from salmon_revsmtp.customer.schedule import VARIED, Schedule
from salmon_revsmtp.customer.settings import ServerSettings
from salmon_revsmtp.net.driver import DEAD_AFTER
from salmon_revsmtp.provider.settings import ProviderSettings

# -- what was measured -----------------------------------------------------------------------------

# Of a session under TLS that waits for mail, in the provider: KiB.  docs/benchmarks.rst, "10,000
# push sessions under TLS" (python -m benchmarks.idle).
SESSION_KIB = 23.9
# Seconds of a core for one NOOP and its answer: 2.3 % of one for 10,000 sessions that have one a
# minute.  The same run.
NOOP = 0.023 * 60 / 10_000
# Seconds of a core for one customer that comes: connection, TLS, login, reversal.  36 s for 10,000,
# the same run.
LOGIN = 36.0 / 10_000
# Octets of write-ahead log for a message that is held, and for one that is handed over: 5,069 and
# 609 at 4,000 octets, 22,194 and 1,058 at 20,000 (PostgreSQL 15, python -m benchmarks --only
# hosts-size).
HELD_WAL, HELD_WAL_OCTET, HANDED_WAL = 788, 1.07, 1058
# Octets on the database's disk for a message that waits: 6,056 at 4,000 octets, 22,626 at 20,000
# (the same run).
HELD_DISK, HELD_DISK_OCTET = 1914, 1.036
# Rows of it: one in hold_queue, one in hold_messages.
HELD_ROWS = 2
# Connections of a host, as docs/several-hosts.rst counts them.
CONNECTIONS = 18

# -- what the code does ----------------------------------------------------------------------------

#: Seconds between the collections of a customer that is alone with its trouble.
EVERY: float = ServerSettings.model_fields["every"].default * 60
#: Seconds that a customer waits for an answer of its login.
PATIENCE: float = ServerSettings.model_fields["timeout"].default
#: Seconds of silence after which the provider says NOOP.
KEEPALIVE: float = ProviderSettings.model_fields["keepalive"].default

DAY = 86400.0
MINUTE = 60.0


@dataclass(frozen=True)
class Fleet:
    """``away``  the share of customers that have no session, each for ``days``.

    ``mail``   messages for each customer in a day, of ``octets`` each; in its busiest hour ``peak``
               times as many as on average.
    """

    customers: int
    nodes: int
    away: float = 0.05
    days: float = 2.0
    mail: float = 10.0
    octets: int = 20_000
    peak: float = 3.0

    @property
    def sessions(self) -> int:
        """Those of each host."""
        return round(self.customers * (1 - self.away) / self.nodes)

    @property
    def most_mail(self) -> float:
        """Messages a second in the busiest hour, of all hosts."""
        return self.customers * self.mail / DAY * self.peak

    @property
    def held(self) -> float:
        """Messages that wait for those who are away."""
        return self.customers * self.away * self.mail * self.days


# -- the simulation --------------------------------------------------------------------------------


@dataclass
class Return:
    """How the customers of one host came back.

    ``back``     when each had its session again, in seconds.
    ``dials``    how many dialled in each second.
    ``refused``  dials that no one took; ``gave_up``: dials whose login was not begun in time.
    """

    back: list[float] = field(default_factory=list)
    dials: Counter[int] = field(default_factory=Counter)
    refused: int = 0
    gave_up: int = 0

    def after(self, share: float) -> float:
        """Seconds until so many of them were back."""
        return sorted(self.back)[max(0, round(share * len(self.back)) - 1)]

    def most_noops(self) -> int:
        """NOOPs in the busiest second of a minute, when all are back: each session has its own
        from when it began."""
        return max(Counter(int(at % KEEPALIVE) for at in self.back).values())


def come_back(
    customers: int,
    chance: random.Random,
    *,
    down: float = 0.0,
    noticed: Callable[[], float] = lambda: 0.0,
) -> Return:
    """Their sessions are gone, which each notices after ``noticed()`` seconds; the host takes
    connections from the second ``down`` on.

    One core does the logins, in the order in which they came.  Who has waited for ``PATIENCE``
    seconds gives up, has cost nothing, and counts as one whose collection has failed.  The system's
    own queue of new connections has room for all.
    """
    found = Return()
    schedules = [_dropped(noticed(), chance) for _ in range(customers)]
    # (when, 0: it dials; 1: it gives up; whose)
    events = [(one.next_time() or 0.0, 0, number) for number, one in enumerate(schedules)]
    heapq.heapify(events)
    free = down  # when the core is
    while events:
        now, gives_up, number = heapq.heappop(events)
        schedule = schedules[number]
        if gives_up:
            found.gave_up += 1
        else:
            assert schedule.due(now) is not None
            found.dials[int(now)] += 1
            if now >= down:
                begins = max(now, free)
                if begins - now <= PATIENCE:
                    free = begins + LOGIN
                    found.back.append(free)
                else:
                    heapq.heappush(events, (now + PATIENCE, 1, number))
                continue
            found.refused += 1
        schedule.finished(_NAME, False, now)
        heapq.heappush(events, (schedule.next_time() or now, 0, number))
    return found


_NAME = "provider"


def _dropped(noticed: float, chance: random.Random) -> Schedule:
    """The schedule of a customer whose session of a day ended at that second."""
    schedule = Schedule({_NAME: EVERY}, -DAY - EVERY, lambda wait: wait * chance.uniform(*VARIED))
    started = schedule.due(-DAY)
    assert started == _NAME
    schedule.dropped(_NAME, DAY, noticed)
    return schedule


# -- what is printed -------------------------------------------------------------------------------


def report(fleet: Fleet, seed: int) -> str:
    """All of it."""
    return "\n".join([*_needs(fleet), "", *_returns(fleet, seed)])


def _needs(fleet: Fleet) -> Iterator[str]:
    sessions, mail = fleet.sessions, fleet.most_mail
    wal = mail * (HELD_WAL + HELD_WAL_OCTET * fleet.octets + HANDED_WAL)
    disk = fleet.held * (HELD_DISK + HELD_DISK_OCTET * fleet.octets)
    noops = sessions / KEEPALIVE
    yield (
        f"{fleet.customers:,} customers on {fleet.nodes} hosts; {fleet.away:.0%} are away, for "
        f"{fleet.days:g} days"
    )
    yield (
        f"{fleet.mail:g} messages of {fleet.octets:,} octets a day for each, {fleet.peak:g} times "
        "as many in the busiest hour"
    )
    yield ""
    yield "Each host"
    yield _row("sessions that are open (max_sessions, descriptors)", f"{sessions:,}")
    yield _row("their memory", f"{sessions * SESSION_KIB / 1024**2:.1f} GiB")
    yield _row("NOOPs", f"{noops:,.0f} a second")
    yield _row("of one core, for these", f"{noops * NOOP:.0%}")
    yield _row("mail in the busiest hour", f"{mail / fleet.nodes:,.0f} a second")
    yield ""
    yield "The database"
    yield _row(f"connections ({CONNECTIONS} for each host)", f"{CONNECTIONS * fleet.nodes:,}")
    yield _row("mail in the busiest hour, if all is held", f"{mail:,.0f} a second")
    yield _row("write-ahead log for it", f"{wal / 1e6:,.0f} MB a second")
    yield _row("write-ahead log of a day", f"{wal / fleet.peak * DAY / 1e9:,.0f} GB")
    yield _row("messages that wait for who is away", f"{fleet.held:,.0f}")
    yield _row("rows for them", f"{fleet.held * HELD_ROWS:,.0f}")
    yield _row("disk for them", f"{disk / 1e9:,.0f} GB")


def _row(what: str, value: str) -> str:
    return f"  {what:52} {value:>22}"


def _returns(fleet: Fleet, seed: int) -> Iterator[str]:
    sessions = fleet.sessions
    share = round(sessions / max(1, fleet.nodes - 1))

    def silently(chance: random.Random) -> Callable[[], float]:
        return lambda: DEAD_AFTER * KEEPALIVE - chance.uniform(0, KEEPALIVE)

    yield "All are back, on one host"
    yield (
        f"  {'':40} {'customers':>9} {'half':>7} {'99 %':>7} {'all':>7} {'dials/s':>8} "
        f"{'refused':>8} {'gave up':>8} {'NOOPs/s':>8}"
    )
    for what, customers, down, silent in (
        ("one host stops, the others take its", share, 0.0, False),
        ("one host is gone without a word", share, 0.0, True),
        ("all hosts stop, and are back in 5 s", sessions, 5.0, False),
        ("all hosts are gone for 10 minutes", sessions, 10 * MINUTE, False),
    ):
        chance = random.Random(seed)
        noticed = silently(chance) if silent else (lambda: 0.0)
        found = come_back(customers, chance, down=down, noticed=noticed)
        yield (
            f"  {what:40} {customers:>9,} "
            + " ".join(f"{found.after(part):>5,.0f} s" for part in (0.5, 0.99, 1.0))
            + f" {max(found.dials.values()):>8,} {found.refused:>8,} {found.gave_up:>8,} "
            f"{found.most_noops():>8,}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--customers", type=int, default=1_000_000)
    parser.add_argument("--nodes", type=int, default=20, help="hosts of the provider")
    parser.add_argument("--away", type=float, default=Fleet.away, help="share without a session")
    parser.add_argument("--days", type=float, default=Fleet.days, help="for which they are away")
    parser.add_argument("--mail", type=float, default=Fleet.mail, help="messages a day for each")
    parser.add_argument("--octets", type=int, default=Fleet.octets, help="of a message")
    parser.add_argument("--peak", type=float, default=Fleet.peak, help="the busiest hour's factor")
    parser.add_argument("--seed", type=int, default=1)
    options = vars(parser.parse_args(arguments))
    seed = options.pop("seed")
    if options["customers"] < 1 or options["nodes"] < 1:
        parser.error("there is at least one customer, and one host")
    print(report(Fleet(**options), seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
