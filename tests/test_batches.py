"""Deliveries in threads: who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from salmon_revsmtp.delivery import batches as module
from salmon_revsmtp.delivery.batches import BatchWorker

LONG = 20.0


class RecordingHandler:
    """Writes down what it is asked to do; waits in the middle of a piece until it may go on."""

    def __init__(self, do: Callable[[str], None] = lambda piece: None) -> None:
        self.record: list[str] = []
        self.ended = threading.Semaphore(0)
        self._do = do

    def begin(self, pieces: Sequence[str]) -> str:
        self.record.append(f"begin {' '.join(pieces)}")
        return " ".join(pieces)

    def do(self, piece: str, batch: str) -> None:
        assert piece in batch.split()
        self._do(piece)
        self.record.append(piece)

    def drop(self, piece: str) -> None:
        self.record.append(f"drop {piece}")

    def end(self, pieces: Sequence[str], batch: str) -> None:
        assert batch.startswith(" ".join(pieces))
        self.record.append(f"end {' '.join(pieces)}")
        self.ended.release()

    def wait(self, ends: int = 1) -> list[str]:
        for _ in range(ends):
            assert self.ended.acquire(timeout=LONG)
        return self.record


class Gate:
    """Holds up one piece until it is opened."""

    def __init__(self, piece: str) -> None:
        self.piece, self.reached, self.opened = piece, threading.Event(), threading.Event()

    def __call__(self, piece: str) -> None:
        if piece == self.piece:
            self.reached.set()
            assert self.opened.wait(LONG)


@pytest.fixture
def worker() -> Iterator[BatchWorker[str]]:
    worker = BatchWorker[str]("worker")
    yield worker
    worker.close()
    assert worker.wait(LONG)


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no reason to end a batch."""
    monkeypatch.setattr(module, "BATCH_SECONDS", LONG)


def busy_with(worker: BatchWorker[str], handler: RecordingHandler, gate: Gate) -> None:
    worker.submit(handler, gate.piece)
    assert gate.reached.wait(LONG)


def test_a_piece_that_comes_alone_is_a_round(worker: BatchWorker[str]) -> None:
    handler = RecordingHandler()
    worker.submit(handler, "a")
    assert handler.wait() == ["begin a", "a", "end a"]
    worker.submit(handler, "b")
    assert handler.wait()[3:] == ["begin b", "b", "end b"]


def test_what_waits_makes_a_round(worker: BatchWorker[str], endless: None) -> None:
    gate = Gate("a")
    handler = RecordingHandler(gate)
    busy_with(worker, handler, gate)
    for piece in "bcd":
        worker.submit(handler, piece)
    gate.opened.set()
    assert handler.wait(2)[3:] == ["begin b c d", "b", "c", "d", "end b c d"]


def test_a_batch_is_of_one_handler_and_the_order_is_kept(
    worker: BatchWorker[str], endless: None
) -> None:
    gate = Gate("a")
    first = RecordingHandler(gate)
    second = RecordingHandler(first.record.append)
    busy_with(worker, first, gate)
    for handler, piece in ((first, "b"), (second, "c"), (second, "d"), (first, "e")):
        worker.submit(handler, piece)
    gate.opened.set()
    done = [piece for piece in first.wait(3) if len(piece) == 1]
    assert done == ["a", "b", "c", "d", "e"]
    assert [one for one in second.record if one.startswith("begin")] == ["begin c d"]


def test_an_answer_does_not_wait_for_the_slow_ones_behind_it(worker: BatchWorker[str]) -> None:
    first, slow = Gate("a"), Gate("c")

    def do(piece: str) -> None:
        first(piece)
        if piece == "b":
            assert not threading.Event().wait(2 * module.BATCH_SECONDS)
        slow(piece)

    handler = RecordingHandler(do)
    busy_with(worker, handler, first)
    for piece in "bc":
        worker.submit(handler, piece)
    first.opened.set()
    assert slow.reached.wait(LONG)
    assert handler.record[3:] == ["begin b c", "b", "end b", "begin c"]
    slow.opened.set()
    assert handler.wait(3)[-1] == "end c"


def test_closed_it_ends_behind_the_piece_in_hand(endless: None) -> None:
    worker = BatchWorker[str]("worker")
    first, second = Gate("a"), Gate("b")

    def do(piece: str) -> None:
        first(piece)
        second(piece)

    handler = RecordingHandler(do)
    busy_with(worker, handler, first)
    for piece in "bcd":
        worker.submit(handler, piece)
    first.opened.set()
    assert second.reached.wait(LONG)
    worker.close()
    with pytest.raises(RuntimeError):
        worker.submit(handler, "e")
    second.opened.set()
    assert worker.wait(LONG)
    assert handler.record[3:] == ["begin b c d", "b", "end b", "drop c", "drop d"]
    with pytest.raises(RuntimeError):
        worker.submit(handler, "e")


@pytest.mark.parametrize("bug", [ValueError, SystemExit])
def test_a_bug_ends_one_round_and_not_the_thread(
    worker: BatchWorker[str], bug: type[BaseException]
) -> None:
    def do(piece: str) -> None:
        raise bug(piece)

    handler = RecordingHandler(do)
    worker.submit(handler, "bug")
    # The thread is at work on it, or has ended its work: either way the next is done.
    other = RecordingHandler()
    worker.submit(other, "b")
    assert other.wait() == ["begin b", "b", "end b"]
    assert handler.record == ["begin bug", "drop bug"]


def test_a_batch_whose_end_fails_takes_nothing_from_the_next(
    worker: BatchWorker[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.0)  # for one piece
    gate = Gate("a")

    class Fails(RecordingHandler):
        def end(self, pieces: Sequence[str], batch: str) -> None:
            super().end(pieces, batch)
            raise ValueError("a bug")

    handler = Fails(gate)
    busy_with(worker, handler, gate)
    for piece in "bc":
        worker.submit(handler, piece)
    gate.opened.set()
    assert handler.wait(3)[-3:] == ["begin c", "c", "end c"]


def test_a_batch_is_prepared_for_what_there_is_time_for(
    worker: BatchWorker[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_SECONDS", 0.0)  # for one piece
    gate = Gate("a")
    handler = RecordingHandler(gate)
    busy_with(worker, handler, gate)
    for piece in "bcdef":
        worker.submit(handler, piece)
    gate.opened.set()
    begun = [line for line in handler.wait(6) if line.startswith("begin")]
    assert begun[:3] == ["begin a", "begin b c d e f", "begin c d"]
    assert begun[-1] == "begin f"
    # And for more again, when there is more time.
    monkeypatch.setattr(module, "BATCH_SECONDS", LONG)
    second = Gate("g")
    handler = RecordingHandler(second)
    busy_with(worker, handler, second)
    for piece in "hijklmnop":
        worker.submit(handler, piece)
    second.opened.set()
    while not handler.wait()[-1].endswith("p"):
        pass
    assert max(line.count(" ") for line in handler.record if line.startswith("begin")) > 2


@pytest.fixture
def several() -> Iterator[BatchWorker[str]]:
    worker = BatchWorker[str]("several", 2)
    yield worker
    worker.close()
    assert worker.wait(LONG)


def test_several_threads_take_what_waits_one_by_one(several: BatchWorker[str]) -> None:
    """Nothing waits for a slow one before it while another thread has nothing to do."""
    gate = Gate("a")
    handler = RecordingHandler(gate)
    for piece in "abcd":
        several.submit(handler, piece)
    record = handler.wait(3)
    assert gate.reached.wait(LONG)
    assert [line for line in record if line.startswith("end")] == ["end b", "end c", "end d"]
    assert sorted(line for line in record if line.startswith("begin")) == [
        f"begin {piece}" for piece in "abcd"
    ]
    gate.opened.set()
    assert handler.wait()[-1] == "end a"


def test_as_many_are_in_hand_as_there_are_threads(several: BatchWorker[str]) -> None:
    meeting = threading.Barrier(2)

    def do(piece: str) -> None:
        meeting.wait(LONG)

    handler = RecordingHandler(do)
    for piece in "abcdef":
        several.submit(handler, piece)
    assert len(handler.wait(6)) == 18


def both_busy(several: BatchWorker[str]) -> tuple[RecordingHandler, list[Gate]]:
    """Two threads that have ``a`` and ``b`` in hand until their gates are opened."""
    gates = [Gate("a"), Gate("b")]

    def do(piece: str) -> None:
        for gate in gates:
            gate(piece)

    handler = RecordingHandler(do)
    for gate in gates:
        busy_with(several, handler, gate)
    return handler, gates


def test_an_item_that_comes_before_others(several: BatchWorker[str]) -> None:
    handler, gates = both_busy(several)
    several.submit(handler, "c")
    several.submit(handler, "d", before_others=True)
    gates[0].opened.set()
    done = [line for line in handler.wait(3) if line.startswith("end")]
    assert done == ["end a", "end d", "end c"]
    gates[1].opened.set()


def test_closed_several_threads_end_after_what_each_has_in_hand() -> None:
    several = BatchWorker[str]("several", 2)
    handler, gates = both_busy(several)
    several.submit(handler, "c")
    several.submit(handler, "d")
    several.withdraw(handler, "d")
    several.close()
    assert handler.record[2:] == ["drop d", "drop c"]
    gates[0].opened.set()
    handler.wait()
    assert not several.wait(0.0), "the other one is in hand still"
    gates[1].opened.set()
    assert several.wait(LONG)
    assert handler.record[-1] == "end b"


def test_closed_before_a_thread_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """No one waits for what will never be."""
    worker = BatchWorker[str]("worker")
    gate = Gate("a")
    handler = RecordingHandler(gate)
    busy_with(worker, handler, gate)
    other = BatchWorker[str]("other")
    monkeypatch.setattr(other, "_threads", worker._threads)  # which has none to spare
    other.submit(handler, "b")
    worker.close()
    other.close()
    gate.opened.set()
    assert other.wait(LONG) and worker.wait(LONG)
