"""The network breaks within a live transaction, at any octet of it: between the sender and the
provider, or between the provider and home.

The sender does as a mail server does: it sends its message again until it hears 2yz or 5yz.  Then:

- What was answered 2yz was handled, or was in the hold store, at that instant.
- In the end home has handled it once for each recipient, or has refused it, and the sender knows.
- Nothing is held, and no one was sent a notification.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest
from salmon.mail import MailRequest
from salmon.server import SMTPError
from support.ends import PATIENCE, Ends, both_ends, message
from support.proxy import Direction, Fault, How
from support.salmon import Salmon
from support.sample import positions
from support.senders import Mail, send_until_heard

from salmon_revsmtp.customer import schedule
from salmon_revsmtp.provider import connection
from salmon_revsmtp.server import collector
from salmon_revsmtp.service.listening import listeners
from salmon_revsmtp.smtp.content import whole
from salmon_revsmtp.smtp.replies import Reply

# One recipient; two, with a reply for each; one more of them, who refuses; a message that goes by a
# file.
ONE, TWO, REFUSED, LARGE = "one", "two", "refused", "large"
# Seconds of silence: until a sender gives a connection up, and until the provider does.
SILENT, IDLE = 0.5, 2.0
# Of the places of a long run, those that a sample tries.
ONE_IN = 20


def by_name(message: MailRequest) -> None:
    if str(message.To).startswith("no"):
        raise SMTPError(550, "5.7.1 not this")


def mail(kind: str, number: int) -> Mail:
    """A message that is like no other."""
    data = message(f"m{number}", 600_000 if kind == LARGE else 0)
    if kind == REFUSED:
        return Mail(data, ("b@example.org", "no@example.org", "c@example.org"), prdr=True)
    if kind == TWO:
        return Mail(data, ("b@example.org", "c@example.org"), prdr=True)
    return Mail(data, prdr=bool(number % 2))


class Trials:
    """Sends messages, each like no other, and sees what becomes of them.

    ``live``, ``held``  how many recipients were answered by home, and by the provider.
    """

    def __init__(self, ends: Ends) -> None:
        self.ends = ends
        self.live = self.held = 0
        self._numbers = itertools.count()
        self._expected: Counter[tuple[str, str]] = Counter()

    @property
    def handled(self) -> Counter[tuple[str, str]]:
        """What home's handlers got, by subject and recipient."""
        return Counter((str(one["Subject"]), str(one.To)) for one in self.ends.salmon.handled)

    def _in_store(self) -> set[tuple[str, str]]:
        """What is held: a message that is let go of meanwhile is not."""
        store = self.ends.provider.store
        held = store.listing(messages=1000)
        contents = store.load([one.key for one in held])
        return {
            (whole(contents[one.key]).partition(b"Subject: ")[2].split()[0].decode(), to)
            for one in held
            if one.key in contents
            for to in one.envelope.recipients
        }

    async def send(self, kind: str, patience: float = PATIENCE) -> None:
        """Send one until all is known, and see that it is handled once and let go of."""
        number = next(self._numbers)
        one = mail(kind, number)

        def heard(recipient: str, reply: Reply) -> None:
            self.held += "held as" in reply.text
            self.live += "held as" not in reply.text
            if reply.positive:
                # In this order: what is handed over just now is in one of them.
                safe = self._in_store() | set(self.handled)
                assert (f"m{number}", recipient) in safe, f"{recipient}: {reply}, and it is lost"

        said = await send_until_heard(
            self.ends.way_in.port, one, heard=heard, again=self._pause, patience=patience
        )
        for recipient, reply in said.items():
            assert reply.permanent is recipient.startswith("no"), f"{recipient}: {reply}"
        self._expected.update((f"m{number}", to) for to in one.recipients)
        await self.ends.until(lambda: not self.ends.held and self.handled >= self._expected)
        assert self.handled == self._expected

    async def _pause(self) -> None:
        """A sender that comes again finds that the provider knows that it was gone."""
        listener: Any = self.ends.provider.daemon.listeners[0]
        await self.ends.until(lambda: not listener._connections)


def trials(salmon: Salmon, work: Callable[[Trials], Awaitable[None]], **options: Any) -> None:
    """Run ``work`` with both ends; nothing is left over after it, and nothing comes twice."""
    salmon.handle(".*", by_name)

    async def main(ends: Ends) -> None:
        await ends.open()
        trials = Trials(ends)
        await work(trials)
        await ends.open()
        await trials.send(ONE)  # whatever is late is before it

    both_ends(salmon, main, agent={"every": 0.0005}, **options)
    assert salmon.relayed == [], "someone was notified"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Home is there at once, and soon again."""
    monkeypatch.setattr(schedule, "FIRST", 0.005)
    monkeypatch.setattr(schedule, "DIAL_AGAIN", 0.005)
    monkeypatch.setattr(schedule, "SPREAD", 0.005)
    monkeypatch.setattr(connection, "REPLACED_GRACE", 0.05)


# -- between the sender and the provider -----------------------------------------------------------


async def cut_the_way_in(
    trials: Trials,
    kind: str,
    hows: Iterable[How],
    direction: Direction,
    places: Iterator[int],
    patience: float = PATIENCE,
) -> int:
    """Cut after so many octets, for each place, until the dialogue was shorter than that; returns
    how often it was cut."""
    times = 0
    for how, place in zip(itertools.cycle(hows), places, strict=False):
        await trials.ends.open()
        fault = trials.ends.way_in.fault = Fault(how, direction, place)
        await trials.send(kind, patience=patience)
        if not fault.struck:
            break
        times += 1
    return times


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("kind", "step", "one_in"),
    [
        (ONE, 11, 1),
        (REFUSED, 23, 1),
        (LARGE, 120_011, 1),
        pytest.param(ONE, 1, 1, marks=pytest.mark.long),
        pytest.param(REFUSED, 1, 1, marks=pytest.mark.long),
        pytest.param(LARGE, 1_009, ONE_IN, marks=pytest.mark.long),
    ],
)
def test_a_cut_between_the_sender_and_the_provider(
    salmon: Salmon, direction: Direction, kind: str, step: int, one_in: int
) -> None:
    async def work(trials: Trials) -> None:
        # What senders hear does not grow with the message.
        to_sender = direction is Direction.TO_CUSTOMER
        places = positions(
            1, min(step, 31) if to_sender else step, one_in=1 if to_sender else one_in
        )
        hows = (How.RST, How.FIN, How.HALF)
        assert await cut_the_way_in(trials, kind, hows, direction, places) >= 5

    trials(salmon, work)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("how", "step", "one_in"),
    [
        (How.STALL, 173, 1),
        (How.VANISH, 211, 1),
        pytest.param(How.STALL, 1, ONE_IN // 2, marks=pytest.mark.long),
        pytest.param(How.VANISH, 1, ONE_IN * 2, marks=pytest.mark.long),
    ],
)
def test_a_cut_of_which_one_end_hears_nothing(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    direction: Direction,
    how: How,
    step: int,
    one_in: int,
) -> None:
    """The sender gives up a connection that is silent; or the provider does, before the sender
    comes again."""
    made = functools.partial(listeners, idle_timeout=IDLE)
    monkeypatch.setattr(collector, "listeners", made)

    async def work(trials: Trials) -> None:
        places = positions(20, step, one_in=one_in)
        await cut_the_way_in(trials, TWO, (how,), direction, places, SILENT)

    trials(salmon, work)


def test_a_dialogue_that_comes_one_octet_at_a_time(salmon: Salmon) -> None:
    async def work(trials: Trials) -> None:
        for kind in (ONE, REFUSED):
            fault = trials.ends.way_in.fault = Fault(How.TRICKLE, None)
            await trials.send(kind)
            assert fault.struck
        assert trials.held == 0

    trials(salmon, work)


# -- between the provider and home -----------------------------------------------------------------


async def cut_the_session(
    trials: Trials, kind: str, hows: Iterable[How], direction: Direction, places: Iterator[int]
) -> int:
    """Cut the open session so many octets after a transaction begins, for each place, until the
    transaction was shorter than that; returns how often it was cut."""
    ends = trials.ends
    times = 0
    for how, place in zip(itertools.cycle(hows), places, strict=False):
        await ends.open()
        await ends.until(lambda: ends.proxy.connections == 1)
        fault = Fault(how, direction, place)
        ends.proxy.fault_from_now(fault)
        await trials.send(kind)
        if not fault.struck:
            ends.proxy.fault_from_now(None)
            break
        times += 1
    return times


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize(
    ("kind", "step", "one_in"),
    [
        (ONE, 67, 1),
        (TWO, 97, 1),
        (LARGE, 140_009, 1),
        pytest.param(ONE, 1, ONE_IN // 4, marks=pytest.mark.long),
        pytest.param(TWO, 1, ONE_IN // 4, marks=pytest.mark.long),
        pytest.param(LARGE, 1_009, ONE_IN, marks=pytest.mark.long),
    ],
)
def test_a_cut_between_the_provider_and_home(
    salmon: Salmon, direction: Direction, kind: str, step: int, one_in: int
) -> None:
    async def work(trials: Trials) -> None:
        # What home says does not grow with the message.
        from_home = direction is Direction.TO_PROVIDER
        stretch = 1 if from_home else one_in
        places = positions(1, min(step, 29) if from_home else step, one_in=stretch)
        hows = (How.RST, How.FIN, How.VANISH, How.HALF)
        assert await cut_the_session(trials, kind, hows, direction, places) >= 3
        assert trials.live and trials.held

    trials(salmon, work)


def test_a_session_that_goes_one_octet_at_a_time(salmon: Salmon) -> None:
    async def work(trials: Trials) -> None:
        trials.ends.proxy.fault_from_now(Fault(How.TRICKLE, None))
        for kind in (ONE, REFUSED):
            await trials.send(kind)
        assert trials.held == 0

    trials(salmon, work)
