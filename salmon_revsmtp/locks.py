"""Locks between processes: a file that one of them holds; the system frees it when that dies."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["only_one"]

log = logging.getLogger(__name__)


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path``, which is made with its folder; ``False``: another process (or
    another place in this one) has it.

    A folder that cannot be written is no reason not to work: a warning, and ``True``.
    """
    descriptor: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        assert descriptor is not None
        os.close(descriptor)
        yield False
        return
    except OSError as error:
        log.warning("lock=%s cannot be had: %s; nothing keeps a second one away", path, error)
    try:
        yield True
    finally:
        if descriptor is not None:
            # A child that a handler has forked has the descriptor, too, and would keep the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
