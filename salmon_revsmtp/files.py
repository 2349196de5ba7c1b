"""What a file system must be told: that a name is to survive a power cut, that a lock is held."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["exclusive_lock", "give_to_owner", "make_folder", "make_private_file", "sync_folder"]

log = logging.getLogger(__name__)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut: syncing a file does not sync its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, for their owner only whatever the umask.  Raises
    :class:`OSError`."""
    missing = []
    for one in (folder, *folder.parents):
        if one.exists():
            break
        missing.append(one)
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another was faster
            one.mkdir(mode=0o700)
            give_to_owner(one)


def make_private_file(path: Path) -> None:
    """Make an empty file, for its owner only, unless it is there.  Raises :class:`OSError`."""
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        give_to_owner(path)


def give_to_owner(path: Path) -> None:
    """What root makes in someone's folder belongs to whom the folder belongs to, or the server,
    which may not be root, could not use it.  Raises :class:`OSError`."""
    if os.geteuid() == 0:
        found, above = path.lstat(), path.parent.stat()
        if (found.st_uid, found.st_gid) != (above.st_uid, above.st_gid):
            os.chown(path, above.st_uid, above.st_gid, follow_symlinks=False)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[bool]:
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
