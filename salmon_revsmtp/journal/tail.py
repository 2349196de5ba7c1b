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
import errno
import fcntl
import glob
import json
import os
import weakref
from pathlib import Path
from types import NoneType
from typing import Any

__all__ = ["Row", "Tail"]

#: A delivery as the journal's table has it: ten values, of which the first is octets.
Row = tuple[Any, ...]

TYPES: tuple[Any, ...] = (bytes, str, str, str, float, float, int, str, (str, NoneType), int)
# No number is as large as this, which is some thousand years in seconds.
FAR = 2**40
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
        self._path = journal
        self._size = 0
        _tails.add(self)
        try:
            for path in sorted(journal.parent.glob(f"{glob.escape(journal.name)}-tail*")):
                self._take(path)
            for number in range(FILES):
                if self._descriptor >= 0:
                    return
                self._take(journal.with_name(f"{journal.name}-tail{number}"), like=journal)
        except BaseException:
            self.close()
            raise
        raise BlockingIOError(errno.EAGAIN, f"{journal}-tail*: all are in use")

    def _take(self, path: Path, like: Path | None = None) -> None:
        """Lock a file and read it, if nobody has it; the first is ours, what is in others is moved
        there.  A new one is as accessible as ``like``."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags | (os.O_CREAT if like else 0), 0o600)
        except (PermissionError, IsADirectoryError, FileNotFoundError):
            return
        ours = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if like:
                _make_alike(descriptor, like)
            with open(descriptor, "rb", closefd=False) as file:
                found = [row for line in file if (row := _parsed(line))]
            self.found += found
            if self._descriptor < 0:
                self._descriptor, self._path, ours = descriptor, path, True
                self._size = os.fstat(descriptor).st_size
            elif self.append(*found):
                os.ftruncate(descriptor, 0)
        except BlockingIOError:
            return
        finally:
            if not ours:
                os.close(descriptor)

    def append(self, *rows: Row) -> bool:
        """Keep deliveries; ``False`` if that cannot be."""
        # The line end in front ends a line that a full disk has cut off.
        lines = "".join(f"\n{_encode([row[0].hex(), *row[1:]])}\n" for row in rows).encode()
        if self._descriptor < 0 or self._size + len(lines) > LIMIT:
            return False
        try:
            written = os.write(self._descriptor, lines)
        except OSError:
            return False
        self._size += written
        return written == len(lines)

    def clear(self) -> None:
        """All that was appended is in the journal."""
        if self._size:
            with contextlib.suppress(OSError):  # it is only read again
                os.ftruncate(self._descriptor, 0)
                self._size = 0

    @property
    def lost(self) -> bool:
        """Somebody has deleted the file."""
        try:
            return not os.path.samestat(os.fstat(self._descriptor), self._path.stat())
        except OSError:
            return True

    def close(self) -> None:
        """Leave the file, with what is in it, to others."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


# There are no circles in a row.
_encode = json.JSONEncoder(check_circular=False).encode

_tails: weakref.WeakSet[Tail] = weakref.WeakSet()


def _close_all() -> None:
    """A child that a handler forks has our descriptors, and would keep the locks when we die."""
    for tail in list(_tails):
        tail.close()


os.register_at_fork(after_in_child=_close_all)


def _make_alike(descriptor: int, like: Path) -> None:
    """Root may be the first here, and is not to shut others out of it."""
    there = like.stat()
    os.fchmod(descriptor, there.st_mode & 0o666)
    if os.geteuid() == 0:
        os.fchown(descriptor, there.st_uid, there.st_gid)


def _parsed(line: bytes) -> Row | None:
    """``None``: an empty line, or one that is not whole, or not ours."""
    try:
        digest, *rest = json.loads(line)
        row = (bytes.fromhex(digest), *rest)
    except (ValueError, TypeError, RecursionError):
        return None
    if len(row) != len(TYPES) or not all(map(isinstance, row, TYPES)):
        return None
    numbers = (value for value in row if isinstance(value, (int, float)))
    return row if all(abs(number) < FAR for number in numbers) else None
