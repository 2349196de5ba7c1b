"""Deliveries in rounds: who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from salmon_revsmtp.delivery import batches as module
from salmon_revsmtp.delivery.batches import Rounds

LONG = 20.0


class Clerk:
    """Writes down what it is asked to do; waits in the middle of a piece until it may go on."""

    def __init__(self, do: Callable[[str], None] = lambda piece: None) -> None:
        self.minutes: list[str] = []
        self.ended, self.rested = threading.Semaphore(0), threading.Semaphore(0)
        self._do = do

    def begin(self, pieces: Sequence[str]) -> None:
        self.minutes.append(f"begin {' '.join(pieces)}")

    def do(self, piece: str) -> None:
        self._do(piece)
        self.minutes.append(piece)

    def end(self, pieces: Sequence[str]) -> None:
        self.minutes.append(f"end {' '.join(pieces)}")
        self.ended.release()

    def rest(self) -> None:
        self.rested.release()

    def wait(self, ends: int = 1) -> list[str]:
        for _ in range(ends):
            assert self.ended.acquire(timeout=LONG)
        return self.minutes


class Gate:
    """Holds up one piece until it is opened."""

    def __init__(self, piece: str) -> None:
        self.piece, self.reached, self.opened = piece, threading.Event(), threading.Event()

    def __call__(self, piece: str) -> None:
        if piece == self.piece:
            self.reached.set()
            assert self.opened.wait(LONG)


@pytest.fixture
def rounds() -> Iterator[Rounds[str]]:
    rounds = Rounds[str]("rounds")
    yield rounds
    rounds.close(wait=True)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no reason to end a round."""
    monkeypatch.setattr(module, "ROUND_SECONDS", LONG)


def busy_with(rounds: Rounds[str], clerk: Clerk, gate: Gate) -> None:
    rounds.submit(clerk, gate.piece)
    assert gate.reached.wait(LONG)


def test_a_piece_that_comes_alone_is_a_round(rounds: Rounds[str]) -> None:
    clerk = Clerk()
    rounds.submit(clerk, "a")
    assert clerk.wait() == ["begin a", "a", "end a"]
    rounds.submit(clerk, "b")
    assert clerk.wait()[3:] == ["begin b", "b", "end b"]


def test_it_rests_when_there_is_no_more(rounds: Rounds[str], endless: None) -> None:
    gate = Gate("a")
    clerk = Clerk(gate)
    busy_with(rounds, clerk, gate)
    rounds.submit(clerk, "b")
    assert not clerk.rested.acquire(blocking=False)
    gate.opened.set()
    assert clerk.rested.acquire(timeout=LONG)
    assert clerk.minutes[-1] == "end b"
    rounds.close(wait=True)
    assert not clerk.rested.acquire(blocking=False)


def test_what_waits_makes_a_round(rounds: Rounds[str], endless: None) -> None:
    gate = Gate("a")
    clerk = Clerk(gate)
    busy_with(rounds, clerk, gate)
    for piece in "bcd":
        rounds.submit(clerk, piece)
    gate.opened.set()
    assert clerk.wait(2)[3:] == ["begin b c d", "b", "c", "d", "end b c d"]


def test_a_round_is_of_one_worker_and_the_order_is_kept(rounds: Rounds[str], endless: None) -> None:
    gate = Gate("a")
    first = Clerk(gate)
    second = Clerk(first.minutes.append)
    busy_with(rounds, first, gate)
    for clerk, piece in ((first, "b"), (second, "c"), (second, "d"), (first, "e")):
        rounds.submit(clerk, piece)
    gate.opened.set()
    done = [piece for piece in first.wait(3) if len(piece) == 1]
    assert done == ["a", "b", "c", "d", "e"]
    assert [one for one in second.minutes if one.startswith("begin")] == ["begin c d"]


def test_an_answer_does_not_wait_for_the_slow_ones_behind_it(rounds: Rounds[str]) -> None:
    first, slow = Gate("a"), Gate("c")

    def do(piece: str) -> None:
        first(piece)
        if piece == "b":
            assert not threading.Event().wait(2 * module.ROUND_SECONDS)
        slow(piece)

    clerk = Clerk(do)
    busy_with(rounds, clerk, first)
    for piece in "bc":
        rounds.submit(clerk, piece)
    first.opened.set()
    assert slow.reached.wait(LONG)
    assert clerk.minutes[3:] == ["begin b c", "b", "end b", "begin c"]
    slow.opened.set()
    assert clerk.wait(3)[-1] == "end c"


def test_closed_it_ends_behind_the_piece_in_hand(endless: None) -> None:
    rounds = Rounds[str]("rounds")
    first, second = Gate("a"), Gate("b")

    def do(piece: str) -> None:
        first(piece)
        second(piece)

    clerk = Clerk(do)
    busy_with(rounds, clerk, first)
    for piece in "bcd":
        rounds.submit(clerk, piece)
    first.opened.set()
    assert second.reached.wait(LONG)
    rounds.close(wait=False)
    with pytest.raises(RuntimeError):
        rounds.submit(clerk, "e")
    second.opened.set()
    rounds.close(wait=True)
    assert clerk.minutes[3:] == ["begin b c d", "b", "end b"]
    with pytest.raises(RuntimeError):
        rounds.submit(clerk, "e")


@pytest.mark.parametrize("bug", [ValueError, SystemExit])
def test_a_bug_ends_one_round_and_not_the_thread(
    rounds: Rounds[str], bug: type[BaseException]
) -> None:
    def do(piece: str) -> None:
        raise bug(piece)

    clerk = Clerk(do)
    rounds.submit(clerk, "bug")
    # The thread is at work on it, or has ended its work: either way the next is done.
    other = Clerk()
    rounds.submit(other, "b")
    assert other.wait() == ["begin b", "b", "end b"]
    assert clerk.minutes == ["begin bug"]


def test_a_round_whose_end_fails_takes_nothing_from_the_next(
    rounds: Rounds[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROUND_SECONDS", 0.0)  # for one piece
    gate = Gate("a")

    class Fails(Clerk):
        def end(self, pieces: Sequence[str]) -> None:
            super().end(pieces)
            raise ValueError("a bug")

    clerk = Fails(gate)
    busy_with(rounds, clerk, gate)
    for piece in "bc":
        rounds.submit(clerk, piece)
    gate.opened.set()
    assert clerk.wait(3)[-3:] == ["begin c", "c", "end c"]


def test_a_round_is_prepared_for_what_there_is_time_for(
    rounds: Rounds[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROUND_SECONDS", 0.0)  # for one piece
    gate = Gate("a")
    clerk = Clerk(gate)
    busy_with(rounds, clerk, gate)
    for piece in "bcdef":
        rounds.submit(clerk, piece)
    gate.opened.set()
    begun = [line for line in clerk.wait(6) if line.startswith("begin")]
    assert begun[:3] == ["begin a", "begin b c d e f", "begin c d"]
    assert begun[-1] == "begin f"
    # And for more again, when there is more time.
    monkeypatch.setattr(module, "ROUND_SECONDS", LONG)
    second = Gate("g")
    clerk = Clerk(second)
    busy_with(rounds, clerk, second)
    for piece in "hijklmnop":
        rounds.submit(clerk, piece)
    second.opened.set()
    assert clerk.rested.acquire(timeout=LONG)
    assert max(line.count(" ") for line in clerk.minutes if line.startswith("begin")) > 2
