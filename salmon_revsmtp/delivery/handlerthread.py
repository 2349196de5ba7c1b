"""The thread in which a consumer's handlers run, one after another; another one when one hangs.

Python cannot end a thread.  So a handler that takes too long is left alone: its thread goes on as
long as it likes, and ends with it or with the process; what comes next has a new one.
"""

from __future__ import annotations

import logging
import threading
from queue import SimpleQueue

from salmon.routing import Router

from salmon_revsmtp.delivery.router import Handling
from salmon_revsmtp.safelog import log_safely

__all__ = ["HandlerThread"]

log = logging.getLogger(__name__)

_Job = tuple[Handling, threading.Event]


class HandlerThread:
    """Runs what it is given, and waits for it as long as it is told."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] | None = None
        self._thread: threading.Thread | None = None
        self._left: list[threading.Thread] = []

    def run(self, handling: Handling, seconds: float) -> bool:
        """Have a message handled; whether that was done in so many seconds.  If not, it goes on in
        a thread of its own.  Raises :class:`RuntimeError` when the machine has no thread to spare.
        """
        if self._jobs is None:
            jobs: SimpleQueue[_Job | None] = SimpleQueue()
            thread = threading.Thread(target=_work, args=(jobs,), name="handlers", daemon=True)
            thread.start()
            self._jobs, self._thread = jobs, thread
        done = threading.Event()
        self._jobs.put((handling, done))
        if done.wait(seconds):
            return True
        if thread_left := self._thread:
            self._left.append(thread_left)
        self.end()
        _free_call_lock()
        return False

    def end(self) -> None:
        """The thread ends after what it has in hand."""
        if self._jobs is not None:
            self._jobs.put(None)
        self._jobs = self._thread = None

    @property
    def hanging(self) -> int:
        """How many handlers that took too long have not ended yet."""
        self._left = [thread for thread in self._left if thread.is_alive()]
        return len(self._left)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while job := jobs.get():
        handling, done = job
        try:
            handling.run()
        except BaseException:
            log_safely(log, logging.ERROR, "handling a message failed", error=True)
        done.set()


def _free_call_lock() -> None:
    """Salmon's Router holds this lock while a handler runs; one that hangs would keep it, and no
    other would run any more."""
    if Router.call_lock.acquire(blocking=False):
        Router.call_lock.release()
    else:
        Router.call_lock = threading.RLock()
