"""The thread in which messages are delivered, one after another, in batches.

What waits at the same time makes a batch, so that what costs the same for one message as for fifty
is paid once: a look into the journal, a wake-up of the event loop.  A message that comes alone is
a batch by itself and waits for nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Generic, Protocol, TypeVar

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


class BatchHandler(Protocol[Item_contra]):
    """What is done with the items of a batch; every call comes in the thread."""

    def begin(self, items: Sequence[Item_contra]) -> None:
        """Prepare for a batch, of which the last ones may not come about."""

    def do(self, item: Item_contra) -> None:
        """One of them."""

    def end(self, items: Sequence[Item_contra]) -> None:
        """These have been done."""

    def drop(self, item: Item_contra) -> None:
        """This one will not be done: it was withdrawn, the thread was closed, or its batch failed.
        The one call that may come in another thread."""


class BatchWorker(Generic[Item]):
    """Works off what several handlers have, in the order in which it came, in one thread.

    ``name``  the thread's.
    """

    def __init__(self, name: str) -> None:
        self._thread = Threads(name, 1)
        self._work_under_way: Future[None] | None = None
        self._lock = threading.Lock()
        self._waiting: deque[tuple[BatchHandler[Item], Item]] = deque()
        self._most = BATCH_SIZE  # in the next batch
        self._at_work = False
        self._closed = False

    def submit(self, handler: BatchHandler[Item], item: Item) -> None:
        """Have ``handler`` do an item.  Raises :class:`RuntimeError` after :meth:`close`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the thread of deliveries is closed")
            if not self._at_work:
                self._work_under_way = self._thread.submit(self._work)
                self._at_work = True
            self._waiting.append((handler, item))

    def withdraw(self, handler: BatchHandler[Item], item: Item) -> None:
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
        self._thread.close()
        for handler, item in dropped:
            handler.drop(item)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the item in hand, for so long at most; whether none is left in hand."""
        under_way = self._work_under_way
        return under_way is None or not wait([under_way], seconds).not_done

    # -- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while following := self._next():
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

    def _next(self) -> tuple[BatchHandler[Item], list[Item]] | None:
        """The next batch, which is of one handler; ``None``: there is no work."""
        with self._lock:
            if not self._waiting:
                self._at_work = False
                return None
            handler = self._waiting[0][0]
            items: list[Item] = []
            while self._waiting and self._waiting[0][0] is handler and len(items) < self._most:
                items.append(self._waiting.popleft()[1])
            return handler, items

    def _batch(self, handler: BatchHandler[Item], items: Sequence[Item]) -> Sequence[Item]:
        """Returns those for which there was no time."""
        handler.begin(items)
        ends = time.monotonic() + BATCH_SECONDS
        done = 0
        while done < len(items) and (done == 0 or time.monotonic() < ends) and not self._closed:
            handler.do(items[done])
            done += 1
        try:
            handler.end(items[:done])
        except BaseException:  # the next ones have nothing to do with it
            log_safely(log, logging.ERROR, "the end of a batch of deliveries failed", error=True)
        # To prepare for a item for which there is no time is work that is done again.
        most = 2 * self._most if done == len(items) else done + done // 4
        self._most = min(most + 1, BATCH_SIZE)
        return items[done:]
