"""Deliveries that are not in the journal's file yet, kept where they survive the process.

A commit for each delivery costs as much as all the rest of ours; one for a round costs little.  In
between, a delivery is a line of JSON at the end of a file, written without a sync: the system has
it, whatever becomes of the process.  When the journal has been written, the file is emptied.

Every process has a file of its own beside the journal (``...-tail0``, ``...-tail1``), and locks
it.  One that nobody has locked was left by a process that died: whoever opens the journal next
takes over what is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Row", "Tail"]

#: A delivery as the journal's table has it: ten values, of which the first is octets.
Row = tuple[Any, ...]

COLUMNS = 10
# Processes that use one journal at a time; any more do without.
FILES = 100
# Octets in it when the journal cannot be written for long.
LIMIT = 16 * 2**20


class Tail:
    """The file of one process.  Not safe to use from several threads at once."""

    def __init__(self, journal: Path) -> None:
        """Take one of the files beside ``journal``.  Raises :class:`OSError`."""
        self.found: list[Row] = []  #: what processes that died have left
        self._descriptor = -1
        self._size = 0
        try:
            for number in range(FILES):
                path = journal.with_name(f"{journal.name}-tail{number}")
                if self._descriptor >= 0 and not path.exists():
                    return
                self._take(path)
        except BaseException:
            self.close()
            raise
        if self._descriptor < 0:
            raise BlockingIOError(f"{journal}-tail*: all are in use")

    def _take(self, path: Path) -> None:
        """Lock a file and read it, if nobody has it; the first is ours, what is in others is moved
        there."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return
        with open(descriptor, "rb", closefd=False) as file:
            found = [row for line in file if (row := _parsed(line))]
        self.found += found
        if self._descriptor < 0:
            self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size
            return
        try:
            if all(self.append(row) for row in found):
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def append(self, row: Row) -> bool:
        """Keep a delivery; ``False`` if that cannot be."""
        digest, *rest = row
        # The line end in front ends a line that a full disk has cut off.
        line = f"\n{json.dumps([digest.hex(), *rest])}\n".encode()
        if self._size + len(line) > LIMIT:
            return False
        try:
            written = os.write(self._descriptor, line)
        except OSError:
            return False
        self._size += written
        return written == len(line)

    def clear(self) -> None:
        """All that was appended is in the journal."""
        if self._size:
            with contextlib.suppress(OSError):  # it is only read again
                os.ftruncate(self._descriptor, 0)
                self._size = 0

    def close(self) -> None:
        """Leave the file, with what is in it, to others."""
        if self._descriptor >= 0:
            # A child that a handler has forked has the descriptor, too, and would keep the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = -1


def _parsed(line: bytes) -> Row | None:
    """``None``: an empty line, or one that is not whole."""
    try:
        digest, *rest = json.loads(line)
        return (bytes.fromhex(digest), *rest) if len(rest) == COLUMNS - 1 else None
    except (ValueError, TypeError):
        return None
