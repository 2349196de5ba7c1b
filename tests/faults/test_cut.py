"""The network breaks at every octet of a session: each message still arrives, and arrives once.

A :class:`Rig` is a provider, a proxy before it that breaks connections, and a customer with one
memory of what it has served, all in one event loop.  The fault strikes the first connection; what
has not come with it comes with a later one, and nobody says that there was nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import CERTIFICATE, PASSWORD, Salmon, agent_keys, configuration, server_tls
from proxy import Direction, Fault, How, Proxy

from salmon_revsmtp.agents import odmr
from salmon_revsmtp.plugins import Plugins
from salmon_revsmtp.provider.accounts import Account, Accounts
from salmon_revsmtp.provider.holdqueue import HoldQueue
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.report import Outcome, Report
from salmon_revsmtp.runtime import Runtime
from salmon_revsmtp.smtp.envelope import Envelope

ACME = Account("acme", PASSWORD, ("example.org",))
BOTH = ("ann@example.org", "bob@example.org")
TO_CUSTOMER, TO_PROVIDER = Direction.TO_CUSTOMER, Direction.TO_PROVIDER
# What is waited for here takes milliseconds; this is for a machine that does much else.
PATIENCE = 20


class QuickLogin(Accounts):
    """CRAM-MD5 and nothing else: SCRAM's thousands of rounds are another test's."""

    def mechanisms(self, tls: bool) -> tuple[str, ...]:
        return ("CRAM-MD5",)


class Rig:
    def __init__(self, salmon: Salmon, provider: Provider, proxy: Proxy, runtime: Runtime) -> None:
        self.queue, self.proxy = provider.queue, proxy
        self._salmon, self._runtime = salmon, runtime
        self._numbers = itertools.count()
        self._sent: Counter[tuple[str, bytes]] = Counter()

    def put(self, octets: int = 0, recipients: tuple[str, ...] = BOTH) -> None:
        """Have the provider hold a message that is like no other."""
        number = next(self._numbers)
        line = b".%06d and so on, lines that begin with a dot among them\r\n" % number
        data = b"Subject: %06d\r\n\r\n%b" % (number, line * (octets // len(line)))
        self.queue.put(Envelope("a@example.net", recipients), data)
        content = data.replace(b"\r\n", b"\n").removesuffix(b"\n")
        self._sent.update((one, content) for one in recipients)

    async def collect(self, fault: Fault | None = None, *, to_the_end: bool = True) -> Report:
        """One collection, the first connection of which has this fault; ``to_the_end`` of all that
        it set going."""
        self.proxy.fault = fault
        collecting = self._runtime.collect(self._runtime.configuration.agents)
        [report] = await asyncio.wait_for(collecting, PATIENCE)
        if to_the_end:
            await self.at_rest()
        said_why = report.error is not None and len(report.error.split()) > 3
        assert said_why is not report.outcome.good, report
        if report.outcome is Outcome.NO_MAIL:
            assert (report.messages, len(self.queue)) == (0, 0), report
        return report

    async def collect_the_rest(self) -> list[Report]:
        """Collect until the provider has no more."""
        reports = []
        for _ in range(10):
            reports.append(await self.collect())
            if reports[-1].outcome in (Outcome.COLLECTED, Outcome.NO_MAIL):
                return reports
        raise AssertionError(f"the provider never says that it has no more: {reports}")

    async def at_rest(self) -> None:
        """Nothing is open or running any more that a collection has set going."""
        await asyncio.wait_for(self.proxy.quiet(), PATIENCE)
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            _, pending = await asyncio.wait(others, timeout=PATIENCE)
            assert not pending

    def came_once(self) -> None:
        """Every message that was ever put has been handled once per recipient, octet for octet."""
        handled = Counter(
            (message.To, message.Data.partition(b";")[2].partition(b"\n")[2])
            for message in self._salmon.handled
        )
        assert handled == self._sent
        assert len(self.queue) == 0
        self._salmon.handled.clear()
        self._sent.clear()


def with_rig(
    salmon: Salmon,
    work: Callable[[Rig], Awaitable[None]],
    *,
    tls: str = "none",
    provider_timeout: float = 600,
    **keys: Any,
) -> None:
    """Run ``work`` on a rig; ``keys`` are the agent's.  At the end nothing is open."""
    salmon.handle(".*")
    context: ssl.SSLContext | None = None if tls == "none" else server_tls()
    keys = {"server": "127.0.0.1", "tls": tls, "ca_file": str(CERTIFICATE), **keys}

    async def main() -> None:
        queue = HoldQueue(salmon.folder / "provider")
        async with (
            Provider(
                QuickLogin([ACME]),
                queue,
                "odmr",
                tls=context,
                implicit_tls=tls == "implicit",
                timeout=provider_timeout,
            ) as provider,
            Proxy(provider.port) as proxy,
        ):
            plugins = Plugins.load()
            valid = configuration(agent_keys(proxy.port, **keys), plugins=plugins)
            with Runtime(valid, plugins, lambda: salmon.relay) as runtime:
                rig = Rig(salmon, provider, proxy, runtime)
                await rig.collect()  # what is made once has been made
                before = _open_files()
                await work(rig)
                assert _open_files() == before

    asyncio.run(main())


def _open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


async def one_message(rig: Rig, fault: Fault) -> Report:
    """One message for two recipients over a connection with a fault, and what it takes then;
    returns the report of the collection that had the fault."""
    rig.put()
    first = await rig.collect(fault)
    if not fault.struck:
        assert first.outcome is Outcome.COLLECTED
    if first.outcome is Outcome.COLLECTED:
        # "mail came, and the provider has no more"
        assert (first.messages, first.recipients, len(rig.queue)) == (1, 2, 0)
    else:
        assert first.outcome is Outcome.FAILED
    reports = [first, *await rig.collect_the_rest()]
    assert sum(report.messages for report in reports) == 1
    assert sum(report.recipients for report in reports) == 2
    rig.came_once()
    return first


async def cut_at_each(rig: Rig, hows: Iterable[How], direction: Direction, step: int = 1) -> None:
    """Cut behind each octet, or each ``step``-th, until the session is shorter than that."""
    kinds = itertools.cycle(hows)
    for octets in itertools.count(1, step):
        fault = Fault(next(kinds), direction, octets)
        await one_message(rig, fault)
        if not fault.struck:
            break
    assert octets > 300, "the session was too short to be one"


@pytest.mark.parametrize("direction", Direction)
def test_a_cut_at_any_octet(salmon: Salmon, direction: Direction) -> None:
    async def work(rig: Rig) -> None:
        await cut_at_each(rig, (How.RST, How.FIN), direction)

    with_rig(salmon, work)


@pytest.mark.long
@pytest.mark.parametrize("direction", Direction)
def test_a_cut_at_any_octet_in_the_other_way(salmon: Salmon, direction: Direction) -> None:
    async def work(rig: Rig) -> None:
        await cut_at_each(rig, (How.FIN, How.RST), direction)

    with_rig(salmon, work)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("tls", "step"),
    [
        ("starttls", 97),
        ("implicit", 149),
        pytest.param("starttls", 1, marks=pytest.mark.long),
        pytest.param("implicit", 7, marks=pytest.mark.long),
    ],
)
def test_a_cut_under_tls(salmon: Salmon, direction: Direction, tls: str, step: int) -> None:
    async def work(rig: Rig) -> None:
        await cut_at_each(rig, (How.RST, How.FIN), direction, step)

    with_rig(salmon, work, tls=tls)


LARGE = (0, 4_000, 1_000_000, 4_000, 0)


async def many_messages(rig: Rig, fault: Fault) -> Report:
    """Several messages, one of them large, over a connection with a fault, and what it takes then;
    returns the report of the collection that had the fault."""
    for octets in LARGE:
        rig.put(octets)
    first = await rig.collect(fault)
    assert first.outcome in (Outcome.COLLECTED, Outcome.FAILED)
    if first.outcome is Outcome.COLLECTED:
        assert (first.messages, len(rig.queue)) == (len(LARGE), 0)
    reports = [first, *await rig.collect_the_rest()]
    assert sum(report.messages for report in reports) == len(LARGE)
    assert sum(report.recipients for report in reports) == len(LARGE) * len(BOTH)
    rig.came_once()
    return first


@pytest.mark.parametrize("tls", ["none", "starttls"])
@pytest.mark.parametrize(
    ("direction", "step"),
    [
        (TO_CUSTOMER, 98_765),
        (TO_PROVIDER, 173),
        pytest.param(TO_CUSTOMER, 7_013, marks=pytest.mark.long),
        pytest.param(TO_PROVIDER, 11, marks=pytest.mark.long),
    ],
)
def test_a_cut_in_a_large_session(
    salmon: Salmon, direction: Direction, step: int, tls: str
) -> None:
    async def work(rig: Rig) -> None:
        kinds = itertools.cycle((How.RST, How.FIN))
        for octets in itertools.count(step, step):
            fault = Fault(next(kinds), direction, octets)
            await many_messages(rig, fault)
            if not fault.struck:
                break
        assert octets > 5 * step

    with_rig(salmon, work, tls=tls)


# -- stalls and trickles -----------------------------------------------------------------------


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("tls", ["none", "starttls"])
def test_a_connection_that_stalls(
    salmon: Salmon, direction: Direction, tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # RFC 2645 5.2.1: 10 minutes for the answer to ATRN, whatever the agent's timeout.
    monkeypatch.setattr(odmr, "ATRN_TIMEOUT", 0.3)

    async def work(rig: Rig) -> None:
        for octets in itertools.count(1, 61 if tls == "none" else 347):
            fault = Fault(How.STALL, direction, octets)
            first = await one_message(rig, fault)
            if not fault.struck:
                break
            if first.outcome is Outcome.FAILED:
                assert first.error is not None
                assert "Timed out" in first.error or "0.3 seconds" in first.error

    with_rig(salmon, work, tls=tls, timeout=0.3)


@pytest.mark.parametrize("tls", ["none", "starttls"])
def test_one_octet_at_a_time(salmon: Salmon, tls: str) -> None:
    async def work(rig: Rig) -> None:
        fault = Fault(How.TRICKLE, None)
        first = await one_message(rig, fault)
        assert (first.outcome, fault.struck) == (Outcome.COLLECTED, True)

    with_rig(salmon, work, tls=tls)


@pytest.mark.parametrize(("direction", "step"), [(TO_CUSTOMER, 83), (TO_PROVIDER, 127)])
def test_a_cut_of_which_the_provider_hears_nothing(
    salmon: Salmon, direction: Direction, step: int
) -> None:
    """It goes on holding the mail for the dead connection; who calls again waits for it, and does
    not hear that there is none."""

    async def work(rig: Rig) -> None:
        for octets in itertools.count(step, step):
            fault = Fault(How.VANISH, direction, octets)
            rig.put()
            first = await rig.collect(fault, to_the_end=False)
            second = await rig.collect()
            assert (first.outcome, second.outcome) in [
                (Outcome.FAILED, Outcome.COLLECTED),
                (Outcome.COLLECTED, Outcome.NO_MAIL),
            ]
            assert first.messages + second.messages == 1
            rig.came_once()
            if not fault.struck:
                break
        assert octets > 2 * step

    with_rig(salmon, work, provider_timeout=0.5)
