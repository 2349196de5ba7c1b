"""Salmon Queues, written and read so that nothing is lost: they are Maildirs on disk.

The order of writes, so that a crash at any instruction loses nothing and a full disk leaves no
litter: written under ``tmp/``, synced, renamed into ``new/``, and ``new/`` synced.  What cannot be
synced in the end is taken back: its client hears that it was not stored, and sends it again.

Salmon's own ``Queue.push`` does not sync the folder, and leaves its file in ``tmp/`` when the sync
fails, on a disk that is full already.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mailbox
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from salmon import queue

from salmon_revsmtp.delivery.waiting import by_age
from salmon_revsmtp.files import give_to_owner, make_folder, sync_folder
from salmon_revsmtp.smtp.replies import Reply

__all__ = [
    "by_age",
    "disk_reply",
    "folder_of",
    "make_whole",
    "move_across",
    "open_queue",
    "push_safely",
]

log = logging.getLogger(__name__)

# Two writers that take the same name at the same time: one of them takes another.
CLASHES = 10

# Held while a folder is made: mailbox fails where another thread makes it at the same time.
_making = threading.Lock()
# Held while a name is taken, which has the time and a number that is counted on after it: two
# threads would have the same within a microsecond, and one overwrites what the other has stored.
_naming = threading.Lock()


def open_queue(folder: str | Path) -> Any:
    """A Salmon Queue in a folder, which is made with those above it.  Raises :class:`OSError`.

    What a process left under ``tmp/`` when it died goes when it is 36 hours old, as Maildir has it.
    """
    place = Path(folder).expanduser()  # mailbox does that, and Salmon does not
    with _making:
        make_folder(place.parent)
        opened = queue.Queue(str(place))
        # mailbox reads its folders anew if their times have changed since it looked last: with a
        # clock that was set back they have not.  A skew of any size has it read them always.
        opened.mbox._skewfactor = math.inf
        make_whole(opened)
    with contextlib.suppress(OSError):  # litter costs no mail
        opened.mbox.clean()
    return opened


def make_whole(target: Any) -> None:
    """Make what is missing of a Salmon Queue: :mod:`mailbox` takes a folder that is there for a
    Maildir, also if a process died while it was making it.  Raises :class:`OSError`."""
    if type(target) is queue.Queue:
        _make_parts(target.mbox)


def _make_parts(mbox: Any) -> None:
    for part in map(Path, (mbox._path, *mbox._paths.values())):
        make_folder(part)
        give_to_owner(part)  # mailbox, or the boot module, may have made it


def push_safely(target: Any, *pieces: bytes | memoryview, mark: str = "") -> str:
    """Push a message, in pieces so that a large one is not copied, onto a Salmon Queue; returns its
    key, which ends with ``mark``, when it would survive a power cut.

    A queue that is not Salmon's own writes in its own way; its folder is synced if it has one, and
    the message gets the mark then if that is a Maildir.
    Raises :class:`OSError`; then the message is not there.
    """
    if type(target) is not queue.Queue:
        key = str(target.push(b"".join(pieces)))
        if folder := folder_of(target):
            with _taken_back(lambda: target.remove(key)):
                if isinstance(getattr(target, "mbox", None), mailbox.Maildir):
                    with contextlib.suppress(FileNotFoundError):  # it may have put it elsewhere
                        Path(folder, "new", key).rename(Path(folder, "new", key + mark))
                        key += mark
                sync_folder(Path(folder, "new"))
        return key
    file = _create(target.mbox)
    tmp = Path(file.name)
    new, key = tmp.parent.parent / "new", tmp.name + mark
    try:
        with file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        tmp.rename(new / key)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    with _taken_back((new / key).unlink):
        sync_folder(new)
    return key


def folder_of(target: Any) -> Path | None:
    """Where a queue is; ``None`` for one of someone's own that is in no folder, and for none."""
    # Salmon keeps the name as it was given, and mailbox the whole path.
    found = getattr(getattr(target, "mbox", None), "_path", None) or getattr(target, "dir", None)
    return Path(found).absolute() if found else None


@contextlib.contextmanager
def _taken_back(remove: Callable[[], object]) -> Iterator[None]:
    """Remove what has been stored if it cannot be made to last."""
    try:
        yield
    except BaseException:
        try:
            remove()
        except Exception as error:
            log.error("a message that could not be synced cannot be removed either: %s", error)
        raise


def _create(mbox: Any) -> Any:
    """A new file under ``tmp/``, with the name that the mailbox would give it."""
    for _ in range(CLASHES):
        try:
            with _naming:
                file = mbox._create_tmp()
            os.fchmod(file.fileno(), 0o600)  # it has 0666 less the umask
            give_to_owner(Path(file.name))
            return file
        except FileNotFoundError as gone:
            # Someone has deleted the folder, or a part of it, since it was opened.
            error: Exception = gone
            _make_parts(mbox)
        except mailbox.ExternalClashError as clash:
            error = clash
    raise OSError(errno.EEXIST, str(error))


def move_across(target: Any, key: str) -> None:
    """Move a message of a Salmon Queue from ``new/`` to ``cur/``, or back: whoever can do that can
    delete it.  Raises :class:`OSError`, and :class:`KeyError` when it is not there."""
    mbox = target.mbox
    folder, name = os.path.split(mbox._lookup(key))
    other = "cur" if folder == "new" else "new"
    there = Path(mbox._paths[other], name)
    if not there.exists():  # nothing is overwritten
        Path(mbox._paths[folder], name).rename(there)
        mbox._toc[key] = f"{other}/{name}"


def disk_reply(error: OSError) -> Reply:
    """The reply when a message could not be written; the provider keeps it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Reply(452, "no room on the disk, try again later", "4.3.1")
    return Reply(451, "could not be written to disk, try again later", "4.3.0")
