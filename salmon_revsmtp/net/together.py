"""What follows from several things that happen in one turn of the event loop, done once for all of
them, and in that turn: the answers to many messages go out in one write, and wait for no other
turn."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["afterwards", "together"]


class _Now(threading.local):
    """Of each thread that has an event loop: what is to be done at the end of what happens now."""

    waiting: list[Callable[[], None]] | None = None


_now = _Now()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is wanted :func:`afterwards` meanwhile is done at the end of this."""
    assert _now.waiting is None
    waiting: list[Callable[[], None]] = []
    _now.waiting = waiting
    try:
        yield
    finally:
        _now.waiting = None
        for callback in waiting:
            try:
                callback()
            except Exception as error:  # the others have nothing to do with it
                what = {"message": "an answer could not be given", "exception": error}
                asyncio.get_running_loop().call_exception_handler(what)


def afterwards(callback: Callable[[], None]) -> None:
    """Have it called once what happens now is over, or soon."""
    if _now.waiting is None:
        asyncio.get_running_loop().call_soon(callback)
    else:
        _now.waiting.append(callback)
