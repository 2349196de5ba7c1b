"""The network breaks at every octet of a session: each message still arrives, and arrives once."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable

import pytest
from support.proxy import Direction, Fault, How
from support.rig import BOTH, Rig, one_message, with_rig
from support.salmon import Salmon
from support.sample import positions

from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.net.outcome import Outcome

TO_CUSTOMER, TO_PROVIDER = Direction.TO_CUSTOMER, Direction.TO_PROVIDER
# Of the places of a long run, those that a sample tries.
ONE_IN = 20


async def cut_at_each(
    rig: Rig, hows: Iterable[How], direction: Direction, places: Iterable[int]
) -> None:
    """Cut after so many octets, for each place, until the session is shorter than that."""
    for how, octets in zip(itertools.cycle(hows), places, strict=False):
        fault = Fault(how, direction, octets)
        await one_message(rig, fault)
        if not fault.struck:
            break
    assert octets > 300, "the session was too short to be one"


@pytest.mark.parametrize("direction", Direction)
def test_a_cut_at_any_octet(salmon: Salmon, direction: Direction) -> None:
    async def work(rig: Rig) -> None:
        await cut_at_each(rig, (How.RST, How.FIN), direction, itertools.count(1))

    with_rig(salmon, work)


@pytest.mark.long
@pytest.mark.parametrize("direction", Direction)
def test_a_cut_at_any_octet_in_the_other_way(salmon: Salmon, direction: Direction) -> None:
    async def work(rig: Rig) -> None:
        await cut_at_each(rig, (How.FIN, How.RST), direction, positions(1, one_in=ONE_IN))

    with_rig(salmon, work)


silent = pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="asyncio of Python 3.10 says nothing of a connection that ends in its TLS handshake: "
    "each such cut is a wait for the whole timeout",
)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("tls", "step", "one_in"),
    [
        ("starttls", 97, 1),
        pytest.param("implicit", 149, 1, marks=silent),
        pytest.param("starttls", 1, ONE_IN, marks=pytest.mark.long),
        pytest.param("implicit", 7, ONE_IN, marks=[pytest.mark.long, silent]),
    ],
)
def test_a_cut_under_tls(
    salmon: Salmon, direction: Direction, tls: str, step: int, one_in: int
) -> None:
    async def work(rig: Rig) -> None:
        await cut_at_each(rig, (How.RST, How.FIN), direction, positions(1, step, one_in=one_in))

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
    ("direction", "step", "one_in"),
    [
        (TO_CUSTOMER, 98_765, 1),
        (TO_PROVIDER, 173, 1),
        pytest.param(TO_CUSTOMER, 7_013, ONE_IN, marks=pytest.mark.long),
        pytest.param(TO_PROVIDER, 11, ONE_IN, marks=pytest.mark.long),
    ],
)
def test_a_cut_in_a_large_session(
    salmon: Salmon, direction: Direction, step: int, one_in: int, tls: str
) -> None:
    async def work(rig: Rig) -> None:
        kinds = itertools.cycle((How.RST, How.FIN))
        for octets in positions(step, step, one_in=one_in):
            fault = Fault(next(kinds), direction, octets)
            await many_messages(rig, fault)
            if not fault.struck:
                break
        assert octets > 5 * step

    with_rig(salmon, work, tls=tls)
