"""The network breaks while a sender gives its mail to the provider: what heard 250 is held, and
what is held is whole, once for each time that it was sent to the end."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable

import aiosmtplib
import pytest
from support.proxy import Direction, Fault, How, Proxy
from support.salmon import Salmon
from support.sample import positions
from support.world import World, in_the_world

from salmon_revsmtp.provider.hold.store import Settled

PATIENCE = 60
# Of the places of a long run, those that a sample tries.
ONE_IN = 20


def message(number: int, octets: int) -> bytes:
    line = b".%06d, and so on\r\n" % number
    return b"Subject: %06d\r\n\r\n" % number + line * (octets // len(line) + 1)


async def heard_250(port: int, data: bytes) -> bool:
    client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False, timeout=PATIENCE)
    try:
        async with client:
            await client.sendmail("a@example.net", ["b@example.org"], data)
    except (aiosmtplib.SMTPException, OSError):
        return False
    return True


async def cut_at_each(
    here: World, direction: Direction, places: Iterable[int], octets: int
) -> None:
    """Cut after so many octets, for each place, until the session was shorter than that."""
    async with Proxy(here.mx) as proxy:
        hows = itertools.cycle((How.RST, How.FIN))
        for number, (how, place) in enumerate(zip(hows, places, strict=False)):
            fault = proxy.fault = Fault(how, direction, place)
            data = message(number, octets)
            heard = await heard_250(proxy.port, data)
            await asyncio.wait_for(proxy.quiet(), PATIENCE)
            # The next one is made safe after what the cut one had sent.
            after = message(number + 1_000_000, 0)
            assert await heard_250(here.mx, after)
            held = here.held()
            found = [here.data(one) for one in held]
            assert found[-1].endswith(b"\r\n" + after)
            assert [one.endswith(b"\r\n" + data) for one in found[:-1]] == [True] * (len(held) - 1)
            assert len(held) == 2 if heard else len(held) <= 2
            here.store.settle([Settled(one.key, one.envelope.recipients) for one in held])
            if not fault.struck:
                break
    assert number > 5, "the session was too short to be one"


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("octets", "step", "one_in"),
    [
        (0, 5, 1),
        (300_000, 40_009, 1),
        pytest.param(0, 1, 1, marks=pytest.mark.long),
        pytest.param(300_000, 1_009, ONE_IN, marks=pytest.mark.long),
    ],
)
def test_a_cut_while_mail_comes(
    salmon: Salmon, direction: Direction, octets: int, step: int, one_in: int
) -> None:
    async def work(here: World) -> None:
        # What senders hear does not grow with the message.
        often = step if direction is Direction.TO_PROVIDER else min(step, 23)
        seldom = one_in if direction is Direction.TO_PROVIDER else 1
        await cut_at_each(here, direction, positions(1, often, one_in=seldom), octets)

    in_the_world(salmon, work)
