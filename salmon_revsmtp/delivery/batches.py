"""The thread in which messages are delivered, one after another, in rounds.

What waits at the same time makes a round, so that what costs the same for one message as for fifty
is paid once: a look into the journal, a wake-up of the event loop.  A message that comes alone is
a round by itself and waits for nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from salmon_revsmtp.safelog import say

__all__ = ["Rounds", "Worker"]

ROUND_PIECES = 256
# A round that has taken so many seconds ends behind the piece in hand: no answer waits much longer
# than this for the work of others.
ROUND_SECONDS = 0.05

log = logging.getLogger(__name__)

Piece = TypeVar("Piece")
Piece_contra = TypeVar("Piece_contra", contravariant=True)


class Worker(Protocol[Piece_contra]):
    """What is done with the pieces of a round; every call comes in the thread."""

    def begin(self, pieces: Sequence[Piece_contra]) -> None:
        """Prepare for a round, of which the last ones may not come about."""

    def do(self, piece: Piece_contra) -> None:
        """One of them."""

    def end(self, pieces: Sequence[Piece_contra]) -> None:
        """These have been done."""

    def rest(self) -> None:
        """There was a round, and there is none now."""


class Rounds(Generic[Piece]):
    """Works off what several workers have, in the order in which it came, in one thread.

    ``name``  the thread's.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Worker[Piece], Piece]] = deque()
        self._most = ROUND_PIECES  # in the next round
        self._at_work = False
        self._closed = False

    def submit(self, worker: Worker[Piece], piece: Piece) -> None:
        """Have ``worker`` do a piece.  Raises :class:`RuntimeError` after :meth:`close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the thread of deliveries is closed")
            if not self._at_work:
                self._executor.submit(self._work)
                self._at_work = True
            self._waiting.append((worker, piece))

    def close(self, wait: bool) -> None:
        """Begin nothing more; ``wait`` for the piece in hand."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
        self._executor.shutdown(wait=wait, cancel_futures=True)

    # -- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        worker = None
        while following := self._next():
            worker, pieces = following
            try:
                left = self._round(worker, pieces)
            except BaseException:
                # A bug.  What hears no answer is put off when its time is up.
                say(log, logging.ERROR, "a round of deliveries failed", error=True)
                continue
            with self._lock:
                if not self._closed:
                    self._waiting.extendleft((worker, piece) for piece in reversed(left))
        if worker is not None:
            worker.rest()

    def _next(self) -> tuple[Worker[Piece], list[Piece]] | None:
        """The next round, which is of one worker; ``None``: there is no work."""
        with self._lock:
            if not self._waiting:
                self._at_work = False
                return None
            worker = self._waiting[0][0]
            pieces: list[Piece] = []
            while self._waiting and self._waiting[0][0] is worker and len(pieces) < self._most:
                pieces.append(self._waiting.popleft()[1])
            return worker, pieces

    def _round(self, worker: Worker[Piece], pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Returns those for which there was no time."""
        worker.begin(pieces)
        ends = time.monotonic() + ROUND_SECONDS
        done = 0
        while done < len(pieces) and (done == 0 or time.monotonic() < ends) and not self._closed:
            worker.do(pieces[done])
            done += 1
        try:
            worker.end(pieces[:done])
        except BaseException:  # the next ones have nothing to do with it
            say(log, logging.ERROR, "the end of a round of deliveries failed", error=True)
        # To prepare for a piece for which there is no time is work that is done again.
        most = 2 * self._most if done == len(pieces) else done + done // 4
        self._most = min(most + 1, ROUND_PIECES)
        return pieces[done:]
