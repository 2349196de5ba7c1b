"""The way home goes silent within a live transaction, and nothing is closed: a sender hears an
answer in time, and its message arrives when the network is back."""

from __future__ import annotations

import asyncio

import pytest
from support.ends import Ends, both_ends, message
from support.proxy import Direction
from support.salmon import Salmon
from support.senders import Line, connected

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.provider import live

# Seconds that a recipient, and a message, may take here; and what a busy machine may add to it.
RECIPIENT, MESSAGE, MORE = 0.4, 0.8, 5.0


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RECIPIENT_IN", RECIPIENT)
    monkeypatch.setattr(live, "MESSAGE_IN", MESSAGE)
    monkeypatch.setattr(live, "MESSAGE_AT_MOST", MESSAGE)
    for name in ("FIRST", "SPREAD", "DIAL_AGAIN"):
        monkeypatch.setattr(schedule, name, 0.005)


async def asked_in(line: Line, said: str, seconds: float) -> str:
    """The reply to a command, which comes in so many seconds."""
    before = asyncio.get_running_loop().time()
    reply = await line.ask(said)
    assert asyncio.get_running_loop().time() - before < seconds + MORE
    return str(reply)


@pytest.mark.parametrize("octets", [0, 600_000])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("silent_from", ["RCPT", "the data"])
def test_a_way_home_that_goes_silent(
    salmon: Salmon, direction: Direction, silent_from: str, octets: int
) -> None:
    salmon.handle(".*")

    async def work(ends: Ends) -> None:
        await ends.open()
        data = message("one", octets)
        async with connected(ends.way_in.port) as line:
            await line.hear()
            await line.ask("EHLO sender.example.net")
            await line.ask("MAIL FROM:<a@example.net>")
            if silent_from == "RCPT":
                ends.proxy.stall(direction)
            said = await asked_in(line, "RCPT TO:<b@example.org>", RECIPIENT)
            assert said == "250 2.1.5 recipient ok"
            ends.proxy.stall(direction)
            assert (await line.ask("DATA")).code == 354
            said = await asked_in(line, f"{data.decode()}.", MESSAGE)
            assert said.startswith("250 2.6.0 held as")
            assert ends.held == 1, "it is safe when that is said"
            # No one else waits for a way home that is silent.
            for number in range(3):
                [_, reply] = await asyncio.wait_for(ends.send(message(f"{number}")), MORE)
                assert "held as" in reply.text
        ends.proxy.abort()  # the network is back, and knows of no connection
        await ends.until(lambda: not ends.held)
        assert sorted(ends.handled) == ["0", "1", "2", "one"]
        await ends.open()
        assert str((await ends.send(message("last")))[-1]) == "250 2.0.0 delivered"

    both_ends(salmon, work, agent={"every": 0.0005})
    assert salmon.relayed == []
