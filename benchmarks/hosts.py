"""The hold store on PostgreSQL: two hosts before one database, beside the embedded store.

The server is of Debian's package, in a temporary folder, and syncs as it is installed; all of it,
the hosts too, is on this machine.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peers, serving
from benchmarks.intake import BOUND
from benchmarks.processes import ROOT, Child, Failure, module
from benchmarks.provider import OCTETS, POSTFIX, Run, _by_server, by_source, median_of, times
from benchmarks.table import Case, Section, Target

if TYPE_CHECKING:
    from support.postgres import Cluster

__all__ = ["SECTIONS", "targets"]

EMBEDDED, ONE, TWO = "embedded", "PostgreSQL, one host", "PostgreSQL, two hosts"
AT_A_TIME = (1, 10, 100)
MESSAGES, QUICK = 6_000, 200
ACCOUNTS = 1_000
RATE, WAKE_UPS = 1_000, 10_000
CHURNED, PACED = 30_000, 5_000
HELD = 1_000_000
SESSIONS = 10

OPTIONS = {
    **{"fsync": "on", "full_page_writes": "on", "shared_buffers": "512MB"},
    "max_wal_size": "4GB",
}


def missing() -> str | None:
    """Why there is no PostgreSQL; ``None`` if there is."""
    with _tests():
        try:
            from support.postgres import programs
        except ImportError as error:
            return f"not installed: {error.name}"
    found = programs()
    return f"not installed: {found}" if isinstance(found, str) else None


@contextlib.contextmanager
def _tests() -> Iterator[None]:
    """What the tests share can be imported."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "tests"))


class _Server:
    """One for all, from when it is needed first."""

    def __init__(self) -> None:
        self._cluster: Cluster | None = None

    def __call__(self) -> Cluster:
        if self._cluster is None:
            with _tests():
                from support.postgres import Cluster, programs
            stack = contextlib.ExitStack()
            atexit.register(stack.close)
            where = programs()
            assert isinstance(where, Path)
            self._cluster = stack.enter_context(Cluster(where, None, **OPTIONS))
        return self._cluster


server = _Server()


@contextlib.contextmanager
def places(name: str) -> Iterator[list[str]]:
    """A new hold store of a kind, once for each host that has it."""
    if name == EMBEDDED:
        with tempfile.TemporaryDirectory(prefix="revsmtp-bench-") as folder:
            yield [f"{folder}/hold"]
        return
    schema = server().schema()
    try:
        yield [str(server().url(schema))] * (2 if name == TWO else 1)
    finally:
        server().execute(f"DROP SCHEMA {schema} CASCADE")


def at_work(*hosts: tuple[str, str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Have hosts do something, all at once: what, where, and with which keys."""
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(module("hosting", work, place, json.dumps(keys)))
            for work, place, keys in hosts
        ]
        for one in children:
            one.says(BOUND)
        for one in children:
            go(one)
        return [one.says(BOUND) for one in children]


def go(child: Child) -> None:
    """Have it do the next thing."""
    assert child.process.stdin is not None
    child.process.stdin.write(b"\n")
    child.process.stdin.flush()


def names(number: int) -> list[str]:
    return [f"customer-{one}" for one in range(number)]


def together(said: list[dict[str, Any]]) -> float:
    """Messages per second of all."""
    return float(sum(one["messages"] for one in said) / max(one["seconds"] for one in said))


# -- what comes and what goes ---------------------------------------------------------------------

PUT = "Hold stores: kept, synced, 4 KB, {} at a time"
GONE = "Hold stores: taken, read and settled, 4 KB, 100 at a time"
WAL = "PostgreSQL: octets of its log a message of 4 KB"
TRIPS = "PostgreSQL: waits for an answer a message"


class _Pace(Run):
    """Of a store, in all ways."""

    def __init__(self, name: str, messages: int, accounts: int = 1) -> None:
        super().__init__()
        self.name, self._messages, self._accounts = name, messages, accounts

    def _measure(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        with places(self.name) as hosts:
            each = [names(self._accounts)] * len(hosts)
            if self._accounts == 1:
                each = [[f"customer-{number}"] for number in range(len(hosts))]
            kept = 0
            for batch in AT_A_TIME:
                messages = max(batch, self._messages // (10 if batch == 1 else 1) // batch * batch)
                keys = {"messages": messages, "batch": batch, "octets": OCTETS}
                figures[PUT.format(batch)] = self._work("put", hosts, each, keys, figures, batch)
                kept += messages
            keys = {"messages": kept}
            figures[GONE] = self._work("hand_over", hosts, each, keys, figures, 0)
        return figures

    def _work(
        self,
        work: str,
        hosts: list[str],
        each: list[list[str]],
        keys: dict[str, Any],
        figures: dict[str, float],
        batch: int,
    ) -> float:
        before = _log() if self.name != EMBEDDED else 0
        pairs = zip(hosts, each, strict=True)
        said = at_work(*((work, place, {**keys, "accounts": theirs}) for place, theirs in pairs))
        messages = sum(one["messages"] for one in said)
        if self.name != EMBEDDED:
            figures[f"{WAL} {batch}"] = (_log() - before) / messages
            figures[f"{TRIPS} {batch}"] = sum(one["waits"] for one in said) / messages
        return together(said)


def _log() -> int:
    """Octets of the server's log."""
    [[octets]] = server().rows("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    return int(octets)


def _paces(quick: bool) -> list[Section]:
    messages = QUICK if quick else MESSAGES
    runs = [_Pace(name, messages) for name in (EMBEDDED, ONE, TWO)]
    many = _Pace(TWO, messages, 10 if quick else ACCOUNTS)
    without = missing()

    def case(run: _Pace, title: str, name: str = "") -> Case:
        reason = None if run.name == EMBEDDED else without
        return Case(name or run.name, lambda: run.figure(title), reason)

    more = f"{TWO}, {many._accounts:,} accounts"
    sections = [
        Section(
            title,
            "messages/s",
            [*(case(run, title) for run in runs), case(many, title, more)],
            ours=TWO,
        )
        for title in (*(PUT.format(batch) for batch in AT_A_TIME), GONE)
    ]
    kinds = {**{f"kept, {batch} at a time": batch for batch in AT_A_TIME}, "handed over": 0}
    sections += [
        Section(
            title,
            unit,
            [case(runs[1], f"{title} {batch}", name) for name, batch in kinds.items()],
            higher=False,
        )
        for title, unit in ((WAL, "octets"), (TRIPS, "waits"))
    ]
    return sections


# -- octets --------------------------------------------------------------------------------------

SIZE = "PostgreSQL: octets for a message of {:,} octets, 16 a commit"
KEPT_LOG, GONE_LOG, DISK = "log, kept", "log, handed over", "disk, while it waits"
SIZES = (4_000, 20_000)


class _Sizes(Run):
    """Of messages of one size: what :mod:`benchmarks.fleet` computes with."""

    def __init__(self, octets: int, messages: int) -> None:
        super().__init__()
        self.octets, self._messages = octets, messages

    def _measure(self) -> dict[str, float]:
        with places(ONE) as [place]:
            keys: dict[str, Any] = {"messages": self._messages, "batch": 16}
            keys |= {"octets": self.octets, "accounts": names(1)}
            at_work(("put", place, {**keys, "messages": 16}))  # it has its tables then
            at_work(("hand_over", place, {**keys, "messages": 16}))
            figures, disk = {}, _disk()
            for name, work in ((KEPT_LOG, "put"), (GONE_LOG, "hand_over")):
                log = _log()
                at_work((work, place, keys))
                figures[name] = (_log() - log) / self._messages
                figures.setdefault(DISK, (_disk() - disk) / self._messages)
        return figures


def _disk() -> int:
    """Octets of all tables, with their indexes and what lies outside of their rows."""
    [[octets]] = server().rows(
        "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c JOIN pg_namespace n "
        "ON n.oid = relnamespace WHERE relkind = 'r' AND nspname NOT LIKE 'pg\\_%'"
    )
    return int(octets)


def _sizes(quick: bool) -> list[Section]:
    runs = [_Sizes(octets, 320 if quick else 8_000) for octets in SIZES]
    return [
        Section(
            SIZE.format(run.octets),
            "octets",
            [
                Case(name, lambda run=run, name=name: run.figure(name), missing())  # type: ignore[misc]
                for name in (KEPT_LOG, GONE_LOG, DISK)
            ],
            higher=False,
        )
        for run in runs
    ]


# -- intake by SMTP -------------------------------------------------------------------------------

INTAKE = "Intake by SMTP, synced, 4 KB, 10 sessions of smtp-source for each host"


def _intake(quick: bool) -> list[Section]:
    messages = 100 if quick else 5_000
    without = peers.missing("smtp-source")
    cases = [
        Case(EMBEDDED, lambda: _taken_in(EMBEDDED, messages), without),
        Case(ONE, lambda: _taken_in(ONE, messages), without or missing()),
        Case(TWO, lambda: _taken_in(TWO, messages), without or missing()),
        Case(
            POSTFIX,
            lambda: _by_server(peers.postfix_server, by_source, SESSIONS, messages),
            peers.missing("postfix", "smtp-source"),
        ),
    ]
    return [Section(INTAKE, "messages/s", cases, ours=TWO)]


def _taken_in(name: str, messages: int) -> float:
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(places(name))
        ports = []
        for place in hosts:
            folder = stack.enter_context(serving.host(hold=place))
            ports.append(stack.enter_context(serving.running(folder)).smtp)
        with ThreadPoolExecutor(len(ports)) as threads:
            rates = threads.map(lambda port: by_source(port, SESSIONS, messages), ports)
            return len(ports) * min(rates)


# -- wake-ups -------------------------------------------------------------------------------------

WAKE = "From kept by one host to the other woken, at {:,} messages a second for {:,} accounts, {}"


class _WakeUps(Run):
    def __init__(self, rate: int, messages: int) -> None:
        super().__init__()
        self._rate, self._messages = rate, messages

    def _measure(self) -> dict[str, float]:
        with places(TWO) as hosts, contextlib.ExitStack() as stack:
            listener = stack.enter_context(module("hosting", "listen", hosts[0], "{}"))
            listener.says(BOUND)
            go(listener)
            listener.says(BOUND)
            keys = {"messages": self._messages, "batch": 10, "octets": OCTETS, "rate": self._rate}
            [sent] = at_work(("send", hosts[1], {**keys, "accounts": names(ACCOUNTS)}))
            go(listener)
            heard: dict[str, list[float]] = {}
            for name, at in listener.says(BOUND)["heard"]:
                heard.setdefault(name, []).append(at)
        waits = []
        for name, at in sent["kept"]:
            later = [one for one in heard.get(name, ()) if one >= at]
            if not later:
                raise Failure(f"{name} was never heard of")
            waits.append(1000 * (min(later) - at))
        waits.sort()
        reached = self._messages / sent["seconds"]
        if reached < 0.9 * self._rate:
            raise Failure(f"only {reached:.0f} messages a second were kept")
        return {"p50": statistics.median(waits), "p99": waits[int(0.99 * (len(waits) - 1))]}


def _wake_ups(quick: bool) -> list[Section]:
    rate, messages = (50, 100) if quick else (RATE, WAKE_UPS)
    run = _WakeUps(rate, messages)
    return [
        Section(
            WAKE.format(rate, ACCOUNTS, name),
            "ms",
            [Case(TWO, lambda name=name: run.figure(name), missing())],  # type: ignore[misc]
            higher=False,
        )
        for name in ("p50", "p99")
    ]


# -- an old transaction, and many messages --------------------------------------------------------

OLD = "PostgreSQL: messages kept, taken and settled, after {:,} others"
WITHOUT, BESIDE = "no old transaction", "beside one that was there before all of them"


def _old(quick: bool) -> list[Section]:
    before, messages = (1_000, 200) if quick else (CHURNED, PACED)
    cases = [
        Case(name, lambda old=old: _churned(before, messages, old), missing())  # type: ignore[misc]
        for name, old in ((WITHOUT, False), (BESIDE, True))
    ]
    return [Section(OLD.format(before), "messages/s", cases, ours=BESIDE)]


def _churned(before: int, messages: int, old: bool) -> float:
    keys = {"messages": messages, "before": before, "octets": OCTETS, "accounts": names(1)}
    with places(ONE) as [place], server().connection() as connection:
        if old:
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            connection.execute("SELECT pg_current_xact_id()")
        rate = together(at_work(("churn", place, keys)))
        connection.execute("ROLLBACK")
        return rate


FULL_PUT, FULL_GONE = (
    f"PostgreSQL, two hosts: {what}, 4 KB, 100 at a time, with so many held"
    for what in ("kept", "taken, read and settled")
)
_FILL = """
INSERT INTO hold_messages SELECT one, 'a@example.net', '[{{}}, null, true]', 200, false, true,
    repeat('x', 200)::bytea, 0, 1 FROM generate_series(1, {0}) AS one;
INSERT INTO hold_queue (id, message, account, recipients, size, arrived)
    SELECT one, one, 'held-' || one % {1}, '[["b@example.org", null]]', 200, 1.0
    FROM generate_series(1, {0}) AS one;
INSERT INTO hold_usage SELECT 'held-' || one, 0, {0} / {1}, 200 * {0} / {1}
    FROM generate_series(0, {1} - 1) AS one;
SELECT setval('hold_ids', {0});
ANALYZE hold_queue, hold_messages;
"""


class _Full(Run):
    def __init__(self, held: int, messages: int) -> None:
        super().__init__()
        self._held, self._messages = held, messages
        self.name = f"{held:,} held, of 200 octets, for {ACCOUNTS:,} accounts"
        self._schema = ""
        self._calls = itertools.count()

    def _measure(self) -> dict[str, float]:
        if not self._schema:
            self._schema = server().schema()
            at_work(("hand_over", server().url(self._schema), {"messages": 0, "accounts": []}))
            server().execute(_FILL.format(self._held, ACCOUNTS), self._schema)
        keys = {"messages": self._messages, "batch": 100, "octets": OCTETS}
        place = server().url(self._schema)
        each = [[f"customer-{number}"] for number in range(2)]
        put = at_work(*(("put", place, {**keys, "accounts": one}) for one in each))
        gone = at_work(*(("hand_over", place, {**keys, "accounts": one}) for one in each))
        return {FULL_PUT: together(put), FULL_GONE: together(gone)}


def _full(quick: bool) -> list[Section]:
    few, many = (1_000, 2_000) if quick else (1_000, HELD)
    runs = [_Full(held, QUICK if quick else MESSAGES) for held in (few, many)]
    return [
        Section(
            title,
            "messages/s",
            [
                Case(run.name, lambda run=run, title=title: run.figure(title), missing())  # type: ignore[misc]
                for run in runs
            ],
            ours=runs[-1].name,
        )
        for title in (FULL_PUT, FULL_GONE)
    ]


#: What ``--only`` may name.
SECTIONS = {
    "hosts-pace": _paces,
    "hosts-size": _sizes,
    "hosts-intake": _intake,
    "hosts-wake-ups": _wake_ups,
    "hosts-old": _old,
    "hosts-held": _full,
}


def targets() -> list[Target]:
    """What is to be reached."""
    return [
        Target(
            "intake by SMTP of two hosts before PostgreSQL, messages/s",
            median_of(INTAKE, TWO),
            lambda sections: min(2_000.0, median_of(INTAKE, POSTFIX)(sections) or 2_000.0),
        ),
        Target(
            f"wake-up of another host at {RATE:,} messages a second, p99 in ms",
            median_of(WAKE.format(RATE, ACCOUNTS, "p99"), TWO),
            lambda _: 50.0,
            at_least=False,
        ),
        Target(
            "pace beside an old transaction, of that without",
            times(OLD.format(CHURNED), BESIDE, WITHOUT),
            lambda _: 0.8,
        ),
    ]
