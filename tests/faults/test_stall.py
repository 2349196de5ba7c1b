"""The network is silent, slow, or gone at one end only: each message arrives, and arrives once."""

from __future__ import annotations

import itertools

import pytest
from support.proxy import Direction, Fault, How
from support.rig import Rig, one_message, with_rig
from support.salmon import Salmon

from salmon_revsmtp.customer import odmr
from salmon_revsmtp.net.outcome import Outcome

TO_CUSTOMER, TO_PROVIDER = Direction.TO_CUSTOMER, Direction.TO_PROVIDER


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
