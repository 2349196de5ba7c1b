"""Salmon Queues, written and read so that nothing is lost: they are Maildirs on disk.

The order of writes, so that a crash at any instruction loses nothing and a full disk leaves no
litter: written under ``tmp/``, synced, renamed into ``new/``, and ``new/`` synced.  What cannot be
synced in the end is taken back: its client hears that it was not stored, and sends it again.

A message that is written while it comes has no name until it is whole, where the system can do
that: when the process dies, nothing is left of it.

What waits together is synced together.  The files of a group are synced by several threads, so that
a file system with a journal commits them together, too; their folder is synced once for all.

Salmon's own ``Queue.push`` does not sync the folder, and leaves its file in ``tmp/`` when the sync
fails, on a disk that is full already.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import mailbox
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, TypeVar

from salmon import queue

from salmon_revsmtp.delivery.waiting import by_age
from salmon_revsmtp.files import give_open_to_owner, give_to_owner, make_folder, sync_folder
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.threads import Threads

__all__ = [
    "SYNC_THREADS",
    "Begun",
    "Unsynced",
    "by_age",
    "disk_reply",
    "folder_of",
    "keep_together",
    "make_whole",
    "move_across",
    "open_queue",
    "push_safely",
]

log = logging.getLogger(__name__)

Made = TypeVar("Made")

#: Threads, beside the one that asks, that sync the files of a group: one thread syncs 2,200 files a
#: second, four 4,400, and more than four no more (ext4, 2 cores).
SYNC_THREADS = 3

# Octets after which the disk begins with a message: of 10 MB it has written most when the rest has
# been copied.
EARLY = 1024 * 1024
# Octets of a file that are read at a time.
READ = 256 * 1024

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
    [kept] = keep_together([Unsynced(target, *pieces, mark=mark)])
    if isinstance(kept, BaseException):
        raise kept
    return kept


class Unsynced:
    """A message under ``tmp/`` of a Salmon Queue, with all its octets, that is not safe yet: see
    :func:`keep_together`.  To make one raises :class:`OSError`, and leaves nothing.

    ``begun``  its descriptor and path, if it has been begun; ``pieces`` are the rest of it then.
    """

    __slots__ = ("_descriptor", "_new", "_tmp", "failed", "folder", "key")

    def __init__(
        self,
        target: Any,
        *pieces: bytes | memoryview,
        mark: str = "",
        begun: tuple[int, str] | None = None,
    ) -> None:
        self.failed: BaseException | None = None
        self._descriptor, self._tmp = begun or _create(target.mbox)
        folder, name = os.path.split(self._tmp)
        self.key, self.folder = name + mark, f"{os.path.dirname(folder)}/new"  # noqa: PTH120
        self._new = f"{self.folder}/{self.key}"
        try:
            _write(self._descriptor, pieces)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget it: nothing of it is left under ``tmp/``."""
        os.close(self._descriptor)
        _unlink(self._tmp)

    def sync(self) -> None:
        """Sync it and give it its name, which is not synced.  Does not raise."""
        try:
            try:
                os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
            os.rename(self._tmp, self._new)  # noqa: PTH104
        except BaseException as error:
            self.failed = error
            _unlink(self._tmp)

    def take_back(self, error: BaseException) -> None:
        """Its name could not be synced.  Does not raise."""
        self.failed = error
        _take_back(functools.partial(os.unlink, self._new))


class Begun:
    """A message that is written for a Salmon Queue while it comes.  All but :meth:`drop` raise
    :class:`OSError`; to make one leaves nothing then."""

    def __init__(self, target: Any) -> None:
        self._queue = target
        self._octets = 0
        self._lost: OSError | None = None
        self._descriptor, self._path = _create_unnamed(target.mbox)
        # No descriptor outlives a message that someone forgot to drop.
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def append(self, *pieces: bytes) -> None:
        """What comes next of it; the disk begins with that soon."""
        _write_all(self._descriptor, [memoryview(piece) for piece in pieces if piece])
        octets = sum(map(len, pieces))
        _begin_to_sync(self._descriptor, self._octets, octets)
        self._octets += octets

    def read(self, start: int) -> Iterator[bytes]:
        """What is there of it, in pieces, from this octet on; synced first, for a disk that fails
        may lose what was not, and says so once."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._lost = error
            raise
        while piece := os.pread(self._descriptor, READ, start):
            start += len(piece)
            yield piece

    def finish(self, *pieces: bytes) -> Unsynced:
        """With these it is whole.  Whatever comes of that, this is not to be used again."""
        if self._lost is not None:
            self.drop()
            raise self._lost
        path = self._path
        if path is None:
            try:
                path = _name(self._queue.mbox, self._descriptor)
            except OSError:  # there is no /proc, or a rule against it, or the folder is another
                return self._copied(pieces)
        self._close.detach()
        return Unsynced(self._queue, *pieces, begun=(self._descriptor, path))

    def _copied(self, pieces: Sequence[bytes]) -> Unsynced:
        """In a file that has a name."""
        begun = _create(self._queue.mbox)
        try:
            for piece in self.read(0):
                _write_all(begun[0], [memoryview(piece)])
        except BaseException:
            os.close(begun[0])
            _unlink(begun[1])
            raise
        finally:
            self._close()
        return Unsynced(self._queue, *pieces, begun=begun)

    def drop(self) -> None:
        """Forget it: nothing of it is left."""
        self._close()
        if self._path is not None:
            _unlink(self._path)


def keep_together(
    messages: Sequence[Unsynced], threads: Threads | None = None
) -> list[str | BaseException]:
    """Make these safe; returns for each its key, or why it is not there.

    Those of one folder are safe at the same time.  What goes wrong with one file concerns that one
    alone; without its folder none is safe, and none is there then.
    """
    if messages:
        _sync_files(messages, threads)
    for folder in {one.folder for one in messages if one.failed is None}:
        named = [one for one in messages if one.failed is None and one.folder == folder]
        try:
            sync_folder(Path(folder))
        except BaseException as error:
            for one in named:
                one.take_back(error)
    return [one.failed or one.key for one in messages]


def _sync_files(messages: Sequence[Unsynced], threads: Threads | None) -> None:
    shares = min(len(messages), SYNC_THREADS + 1) if threads is not None else 1
    elsewhere: list[tuple[Future[None], Sequence[Unsynced]]] = []
    for number in range(1, shares):
        assert threads is not None
        share = messages[number::shares]
        try:
            future = threads.submit(functools.partial(_sync_each, share))
            elsewhere.append((future, share))
        except RuntimeError:  # they are closed, or the machine has none to spare
            _sync_each(share)
    _sync_each(messages[::shares])
    for future, share in elsewhere:
        try:
            future.result()
        except CancelledError:  # it was not begun, for the threads are being closed
            _sync_each(share)


def _sync_each(messages: Sequence[Unsynced]) -> None:
    for one in messages:
        one.sync()


def _write(descriptor: int, pieces: Sequence[bytes | memoryview]) -> None:
    """All of them, in as few calls as the system takes; the disk is at work on the beginning of a
    large message while the rest is written.  Raises :class:`OSError`."""
    views = [memoryview(piece) for piece in pieces if piece]
    if sum(map(len, views)) <= EARLY:
        _write_all(descriptor, views)
        return
    at = 0
    for view in views:
        for start in range(0, len(view), EARLY):
            part = view[start : start + EARLY]
            _write_all(descriptor, [part])
            _begin_to_sync(descriptor, at, len(part))
            at += len(part)


def _write_all(descriptor: int, left: list[memoryview]) -> None:
    while left:
        written = os.writev(descriptor, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def _begin_to_sync(descriptor: int, start: int, octets: int) -> None:
    """Linux begins to write what it is told that no one reads soon, and keeps what it has not
    written yet."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is no more than a hint
            os.posix_fadvise(descriptor, start, octets, os.POSIX_FADV_DONTNEED)


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
        _take_back(remove)
        raise


def _take_back(remove: Callable[[], object]) -> None:
    try:
        remove()
    except Exception as error:
        log.error("a message that could not be synced cannot be removed either: %s", error)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):  # litter costs no mail
        os.unlink(path)  # noqa: PTH108


def _create(mbox: Any) -> tuple[int, str]:
    """A new file under ``tmp/``, for its owner only, with the name that the mailbox would give it:
    its descriptor, and its path.  Raises :class:`OSError`."""

    def create(path: str) -> tuple[int, str]:
        descriptor = os.open(path, _NEW, 0o600)
        try:
            os.fchmod(descriptor, 0o600)  # it has that less the umask
            give_open_to_owner(descriptor, path)
        except BaseException:
            os.close(descriptor)
            _unlink(path)
            raise
        return descriptor, path

    return _named(mbox, create)


def _create_unnamed(mbox: Any) -> tuple[int, str | None]:
    """The same for a file that has no name yet, where there can be one.  Raises
    :class:`OSError`."""
    if _UNNAMED:
        with contextlib.suppress(OSError):  # not every file system can do that
            return os.open(mbox._paths["tmp"], _UNNAMED, 0o600), None
    return _create(mbox)


def _name(mbox: Any, descriptor: int) -> str:
    """Give a file that has none a name under ``tmp/``; returns its path.  Raises
    :class:`OSError`."""

    def link(path: str) -> str:
        # To be told of a folder to begin at is what has the system follow the link.
        os.link(_LINK.format(descriptor), path, src_dir_fd=descriptor, follow_symlinks=True)
        return path

    path = _named(mbox, link)
    try:
        os.fchmod(descriptor, 0o600)
        give_open_to_owner(descriptor, path)
    except BaseException:
        _unlink(path)
        raise
    return path


def _named(mbox: Any, make: Callable[[str], Made]) -> Made:
    """Make a file under ``tmp/`` with the name that the mailbox would give it."""
    for _ in range(CLASHES):
        try:
            return make(f"{mbox._paths['tmp']}/{_new_name(mbox)}")
        except FileNotFoundError as gone:
            # Someone has deleted the folder, or a part of it, since it was opened.
            error: OSError = gone
            _make_parts(mbox)
        except FileExistsError as clash:
            error = clash
    raise OSError(errno.EEXIST, str(error))


_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# A file without a name, where the system has such, and where it shows it, to give it one (open(2)).
_UNNAMED = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC if hasattr(os, "O_TMPFILE") else 0
_LINK = "/proc/self/fd/{}"


def _new_name(mbox: Any) -> str:
    """As :mod:`mailbox` and Salmon name a message; they count, too."""
    with _naming:
        now, count = time.time(), mailbox.Maildir._count  # type: ignore[attr-defined]
        mailbox.Maildir._count = count + 1  # type: ignore[attr-defined]
    host = socket.gethostname().replace("/", r"\057").replace(":", r"\072")
    if isinstance(mbox, queue.SafeMaildir):
        host = queue.HASHED_HOSTNAME
    return f"{int(now)}.M{int(now % 1 * 1e6)}P{os.getpid()}Q{count}.{host}"


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
