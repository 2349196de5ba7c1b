"""What is this process's alone, and what becomes of a child that a handler forks.

A child gets a copy of every descriptor, and what it keeps open stays open when we die: the
provider does not see its connection closed, the port is in use, the lock is held.  So in a child
that is forked from Python (``os.fork``, ``multiprocessing``) everything that was named here is
closed.  A program that is executed has none of it anyway (PEP 446).

A child is the handler's own.  It hears signals as any process does, and it never goes on with our
work: where the handler's code ends, the child ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["end_child_of", "ours_alone"]

#: Gives the descriptors that are open when it is asked.
Descriptors = Callable[[], Iterable[int]]

_ours: dict[int, Descriptors] = {}
_numbers = itertools.count()

# What a server is stopped by; a handler that ends its child sends it one of them.
_SIGNALS: dict[signal.Signals, Any] = {
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


@contextlib.contextmanager
def ours_alone(descriptors: Descriptors) -> Iterator[None]:
    """While this lasts, a child does not keep these open."""
    number = next(_numbers)
    _ours[number] = descriptors
    try:
        yield
    finally:
        _ours.pop(number, None)  # in a child they are forgotten


def end_child_of(process: int) -> None:
    """Called in a ``finally`` after code of other people that may have forked: unless this still is
    that process, it is a child, which ends here with the status that its exception gives it."""
    if os.getpid() != process:
        os._exit(_status(sys.exc_info()[1]))


def _status(error: BaseException | None) -> int:
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        return 1
    return 0 if error is None else 1


def _in_a_child() -> None:
    """Have the numbers stand for nothing.  They stay taken: an object of ours that still has one
    must not close another's file later."""
    found: set[int] = set()
    for descriptors in list(_ours.values()):
        with contextlib.suppress(Exception):
            found.update(descriptors())
    _ours.clear()
    for descriptor in found:
        with contextlib.suppress(OSError):
            _stand_for_nothing(descriptor)
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)  # it would wake our event loop
    for number, default in _SIGNALS.items():
        # One of ours, or of our event loop, only keeps the child from being ended.
        module = getattr(signal.getsignal(number), "__module__", None) or ""
        if module.startswith(("salmon_revsmtp.", "asyncio.")):
            with contextlib.suppress(ValueError):
                signal.signal(number, default)
    _unblock()


# A signal that reached a child before that would wake our event loop, and stop us.
_mask = threading.local()


def _block() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _stand_for_nothing(descriptor: int) -> None:
    try:
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        os.close(descriptor)
        return
    os.dup2(nothing, descriptor, inheritable=False)
    os.close(nothing)


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_in_a_child)
