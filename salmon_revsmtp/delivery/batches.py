"""The threads in which messages are delivered: one as a rule, and in that one after another.

What waits at the same time makes a batch, so that what costs the same for one message as for fifty
is paid once: a look into the journal, a wake-up of the event loop.  A message that comes alone is
a batch by itself and waits for nothing.

Several threads take what waits one by one: in a batch it would wait for the slow ones before it,
while another thread has nothing to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from salmon_revsmtp.safelog import log_safely

__all__ = ["BatchHandler", "BatchWorker"]

BATCH_SIZE = 256
# A batch that has taken so many seconds ends after the item in hand: no answer waits much longer
# than this for the work of others.
BATCH_SECONDS = 0.05

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Batch = TypeVar("Batch")


class BatchHandler(Protocol[Item_contra, Batch]):
    """What is done with the items of a batch.  Every call for a batch comes in one thread; where
    there are several, they have batches at the same time."""

    def begin(self, items: Sequence[Item_contra]) -> Batch:
        """Prepare for a batch, of which the last ones may not come about; returns what is to be
        known of it."""

    def do(self, item: Item_contra, batch: Batch) -> None:
        """One of them."""

    def end(self, items: Sequence[Item_contra], batch: Batch) -> None:
        """These have been done."""

    def drop(self, item: Item_contra) -> None:
        """This one will not be done: it was withdrawn, the threads were closed, or its batch
        failed.  The one call that may come in another thread."""


class BatchWorker(Generic[Item]):
    """Works off what several handlers have, in the order in which it came.

    A thread that has nothing to do waits at a gate of its own, so that work wakes one thread, and
    once.  They are daemon threads, as those of :mod:`salmon_revsmtp.threads`.

    ``name``     the threads'.
    ``threads``  how many there are at most; they are started as they are needed.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self._name, self._most_threads = name, threads
        self._threads = 0
        self._lock = threading.Lock()
        self._at_rest = threading.Condition(self._lock)
        self._waiting: deque[tuple[BatchHandler[Item, Any], Item]] = deque()
        self._largest = BATCH_SIZE if threads == 1 else 1
        self._most = self._largest  # in the next batch
        self._at_work = self._busy = 0  # threads: those that look for work, and those that have it
        self._gates: list[threading.Lock] = []  # of those that have none, closed
        self._closed = False

    def submit(
        self, handler: BatchHandler[Item, Any], *items: Item, before_others: bool = False
    ) -> None:
        """Have ``handler`` do these, in this order.  Raises :class:`RuntimeError` after
        :meth:`close`, and where the machine has no thread to spare."""
        gates = []
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads of deliveries are closed")
            wanted = len(self._waiting) + len(items) - (self._at_work - self._busy)
            for _ in range(min(wanted, self._most_threads - self._at_work)):
                if self._gates:
                    gates.append(self._gates.pop())
                    self._at_work += 1
                else:
                    self._start()
            if before_others:
                self._waiting.extendleft((handler, item) for item in reversed(items))
            else:
                self._waiting.extend((handler, item) for item in items)
        for gate in gates:
            gate.release()

    def _start(self) -> None:
        try:
            threading.Thread(target=self._live, name=self._name, daemon=True).start()
        except RuntimeError:
            if not self._threads:
                raise
            return  # another one will do it
        self._threads += 1
        self._at_work += 1

    def withdraw(self, handler: BatchHandler[Item, Any], item: Item) -> None:
        """Forget an item whose turn has not come."""
        try:
            with self._lock:
                self._waiting.remove((handler, item))
        except ValueError:
            return
        handler.drop(item)

    def close(self) -> None:
        """Begin nothing more."""
        with self._lock:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
            gates, self._gates = self._gates, []
            self._at_work += len(gates)
        for gate in gates:
            gate.release()
        for handler, item in dropped:
            handler.drop(item)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the items in hand, for so long at most; whether none is left in hand."""
        with self._at_rest:
            return self._at_rest.wait_for(lambda: not self._at_work, seconds)

    # -- in the threads ---------------------------------------------------------------------------

    def _live(self) -> None:
        gate = threading.Lock()
        gate.acquire()
        busy = 0
        while following := self._next(busy, gate):
            busy = 1
            self._do(*following)
            del following  # a thread that rests keeps nothing

    def _next(
        self, busy: int, gate: threading.Lock
    ) -> tuple[BatchHandler[Item, Any], list[Item]] | None:
        """The next batch, which is of one handler; waits for it.  ``None``: there will be none.
        ``busy`` is 1 for a thread that has had one."""
        while True:
            with self._lock:
                if self._waiting:
                    self._busy += 1 - busy
                    handler = self._waiting[0][0]
                    items: list[Item] = []
                    while (
                        self._waiting and self._waiting[0][0] is handler and len(items) < self._most
                    ):
                        items.append(self._waiting.popleft()[1])
                    return handler, items
                self._at_work -= 1
                self._busy -= busy
                busy = 0
                if not self._at_work:
                    self._at_rest.notify_all()
                if self._closed:
                    return None
                self._gates.append(gate)
            gate.acquire()

    def _do(self, handler: BatchHandler[Item, Any], items: Sequence[Item]) -> None:
        try:
            left = self._batch(handler, items)
        except BaseException:
            # A bug.  What hears no answer is deferred when its time is up.
            log_safely(log, logging.ERROR, "a batch of deliveries failed", error=True)
            for item in items:
                handler.drop(item)
            return
        if not left:
            return
        with self._lock:
            closed = self._closed
            if not closed:
                self._waiting.extendleft((handler, item) for item in reversed(left))
        for item in left if closed else ():
            handler.drop(item)

    def _batch(self, handler: BatchHandler[Item, Any], items: Sequence[Item]) -> Sequence[Item]:
        """Returns those for which there was no time."""
        batch = handler.begin(items)
        ends = time.monotonic() + BATCH_SECONDS
        done = 0
        while done < len(items) and (done == 0 or time.monotonic() < ends) and not self._closed:
            handler.do(items[done], batch)
            done += 1
        try:
            handler.end(items[:done], batch)
        except BaseException:  # the next ones have nothing to do with it
            log_safely(log, logging.ERROR, "the end of a batch of deliveries failed", error=True)
        # To prepare for a item for which there is no time is work that is done again.
        most = 2 * self._most if done == len(items) else done + done // 4
        self._most = min(most + 1, self._largest)
        return items[done:]
