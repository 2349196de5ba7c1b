"""Threads for what may block, and that no end waits for.

Python joins the threads of its own pools when the interpreter ends, and asyncio those of its event
loop's.  One that foreign code holds would then keep the process for ever.  These are daemon
threads: who wants to wait for one does so, for as long as he likes.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["LoopThreads", "Threads", "apart"]

Result = TypeVar("Result")


class Threads:
    """At most ``most`` threads, which are started as they are needed, and their work.

    ``name``  theirs.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._work: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._threads = self._idle = 0
        self._closed = False

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Have it called.  Raises :class:`RuntimeError` after :meth:`close`, and where the machine
        has no thread to spare."""
        future: Future[Result] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the threads of {self._name} are closed")
            if len(self._work) >= self._idle and self._threads < self._most:
                self._start()
            self._work.append((future, function))
            self._changed.notify()
        return future

    def _start(self) -> None:
        thread = threading.Thread(target=self._live, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            if not self._threads:
                raise
            return  # another will do it
        self._threads += 1

    def close(self) -> None:
        """Begin nothing more.  What was not begun is cancelled."""
        with self._changed:
            self._closed = True
            waiting = [future for future, _ in self._work]
            self._work.clear()
            self._changed.notify_all()
        for future in waiting:
            future.cancel()

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call it in one of the threads.  Cancelled, this waits no longer; the call goes on."""
        import asyncio  # only a collection needs it

        return await asyncio.wrap_future(self.submit(functools.partial(function, *arguments)))

    def _live(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._work and not self._closed:
                    self._changed.wait()
                self._idle -= 1
                if not self._work:
                    self._threads -= 1
                    return
                future, function = self._work.popleft()
            _do(future, function)
            del future, function  # an idle thread keeps nothing


def _do(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class LoopThreads(ThreadPoolExecutor):
    """The threads of an event loop (``loop.set_default_executor``, which takes this type only)."""

    def __init__(self, name: str, most: int) -> None:
        super().__init__(1)  # it starts none of its own
        self._ours = Threads(name, most)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._ours.submit(functools.partial(fn, *args, **kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Waits for none of them."""
        self._ours.close()
        super().shutdown(wait=False)


def apart(name: str, function: Callable[[], Result]) -> Future[Result]:
    """Call it in a thread of its own.  Raises :class:`RuntimeError` where the machine has none to
    spare."""
    future: Future[Result] = Future()
    threading.Thread(target=_do, args=(future, function), name=name, daemon=True).start()
    return future
