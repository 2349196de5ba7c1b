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
from concurrent.futures import Future, wait
from typing import Any, Generic, Protocol, TypeVar

from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.threads import Threads

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

    ``name``     the threads'.
    ``threads``  how many there are at most.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self._threads, self._most_threads = Threads(name, threads), threads
        self._under_way: list[Future[None]] = []
        self._lock = threading.Lock()
        self._waiting: deque[tuple[BatchHandler[Item, Any], Item]] = deque()
        self._largest = BATCH_SIZE if threads == 1 else 1
        self._most = self._largest  # in the next batch
        self._at_work = self._busy = 0  # threads: those that look for work, and those that have it
        self._closed = False

    def submit(
        self, handler: BatchHandler[Item, Any], item: Item, *, before_others: bool = False
    ) -> None:
        """Have ``handler`` do an item.  Raises :class:`RuntimeError` after :meth:`close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads of deliveries are closed")
            looking = self._at_work - self._busy
            if looking <= len(self._waiting) and self._at_work < self._most_threads:
                work = self._threads.submit(self._work)
                self._under_way = [*(one for one in self._under_way if not one.done()), work]
                self._at_work += 1
            if before_others:
                self._waiting.appendleft((handler, item))
            else:
                self._waiting.append((handler, item))

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
        self._threads.close()
        for handler, item in dropped:
            handler.drop(item)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the items in hand, for so long at most; whether none is left in hand."""
        with self._lock:
            under_way = [one for one in self._under_way if not one.done()]
        return not wait(under_way, seconds).not_done

    # -- in the threads ---------------------------------------------------------------------------

    def _work(self) -> None:
        busy = 0
        while following := self._next(busy):
            busy = 1
            handler, items = following
            try:
                left = self._batch(handler, items)
            except BaseException:
                # A bug.  What hears no answer is deferred when its time is up.
                log_safely(log, logging.ERROR, "a batch of deliveries failed", error=True)
                for item in items:
                    handler.drop(item)
                continue
            with self._lock:
                closed = self._closed
                if not closed:
                    self._waiting.extendleft((handler, item) for item in reversed(left))
            for item in left if closed else ():
                handler.drop(item)

    def _next(self, busy: int) -> tuple[BatchHandler[Item, Any], list[Item]] | None:
        """The next batch, which is of one handler; ``None``: there is no work.  ``busy`` is 1 for a
        thread that has had one."""
        with self._lock:
            if not self._waiting:
                self._at_work -= 1
                self._busy -= busy
                return None
            self._busy += 1 - busy
            handler = self._waiting[0][0]
            items: list[Item] = []
            while self._waiting and self._waiting[0][0] is handler and len(items) < self._most:
                items.append(self._waiting.popleft()[1])
            return handler, items

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
