"""What a file system must be told: that a name is to survive a power cut, that a lock is held."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import pwd
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from salmon_revsmtp.forks import ours_alone

__all__ = [
    "FEW_FILES",
    "LITTLE_ROOM",
    "NO_ROOM",
    "FolderLock",
    "Room",
    "exclusive_lock",
    "give_open_to_owner",
    "give_to_owner",
    "make_folder",
    "make_private_file",
    "room_in",
    "sync_folder",
    "try_folder",
    "write_private",
]

log = logging.getLogger(__name__)


# Octets free on a disk: of less than the first, which is ten of the largest messages by default (50
# MiB each), a person should hear before mail is answered 452; in less than the second are no two.
LITTLE_ROOM = 512 * 1024**2
NO_ROOM = 100 * 1024**2
# Files that a disk can have still: each message in a queue is one.
FEW_FILES = 1000


@dataclass(frozen=True)
class Room:
    """What is free on a disk, for us: octets, and files (``None`` where there is no such limit).

    ``disk``  which one it is, as ``st_dev`` has it.
    """

    disk: int
    octets: int
    files: int | None

    @property
    def none(self) -> bool:
        """There is too little to take mail."""
        return self.octets < NO_ROOM or self.files == 0

    @property
    def little(self) -> bool:
        """It will be soon."""
        return self.octets < LITTLE_ROOM or (self.files is not None and self.files < FEW_FILES)


def room_in(folder: Path) -> Room:
    """The room on the disk that has ``folder``, or would have it.  Raises :class:`OSError`."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    found = os.statvfs(there)
    files = found.f_favail if found.f_files else None
    return Room(there.stat().st_dev, found.f_bavail * found.f_frsize, files)


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


def write_private(path: Path, *content: bytes, beside: Path | None = None) -> None:
    """Have a file hold this and nothing else, for its owner only: a crash leaves what it held
    before.  It is written as ``beside``, which is in the same folder by default, and renamed.  The
    folders are made.  Raises :class:`OSError`."""
    beside = beside or path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    for folder in {path.parent, beside.parent}:
        make_folder(folder)
    try:
        with os.fdopen(os.open(beside, _NEW, 0o600), "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        give_to_owner(beside)
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


# A file of before with such a name is no one's any more.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


def give_to_owner(path: Path) -> None:
    """What root makes in someone's folder belongs to whom the folder belongs to, or the server,
    which may not be root, could not use it.  Raises :class:`OSError`."""
    if os.geteuid() == 0:
        found, above = path.lstat(), path.parent.stat()
        if (found.st_uid, found.st_gid) != (above.st_uid, above.st_gid):
            os.chown(path, above.st_uid, above.st_gid, follow_symlinks=False)


def give_open_to_owner(descriptor: int, path: str) -> None:
    """The same for a file that is open, in fewer calls.  Raises :class:`OSError`."""
    if os.geteuid() == 0:
        found, above = os.fstat(descriptor), os.stat(os.path.dirname(path))  # noqa: PTH116, PTH120
        if (found.st_uid, found.st_gid) != (above.st_uid, above.st_gid):
            os.fchown(descriptor, above.st_uid, above.st_gid)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file ``path``, which is made with its folder; ``False``: another process (or
    another place in this one) has it.

    It has a twin, whose name begins with a dot, and both are held: someone who deletes a lock file
    while it is held lets no one in.  A folder that cannot be written is no reason not to work: a
    warning, and ``True``.
    """
    with contextlib.ExitStack() as held:
        try:
            for one in (path, path.with_name(f".{path.name}")):
                make_private_file(one)
                held.enter_context(_locked(one, os.O_RDWR | os.O_CREAT))
        except BlockingIOError:
            held.close()
            yield False
            return
        except OSError as error:
            log.warning("lock=%s cannot be had: %s; nothing keeps a second one away", path, error)
        yield True


class FolderLock:
    """The lock of a folder that is there.  It is the folder itself that is locked, by whatever name
    it was reached, and there is no file that could be deleted.

    ``had``  whether we have it; otherwise another process (or another place in this one) has.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._identity: tuple[int, int] | None = None
        self.had = False

    def holds(self) -> bool:
        """Whether the folder that is locked is still the one that has this name."""
        return self.had and self._identity in (None, _identity(self._folder))

    @contextlib.contextmanager
    def hold(self) -> Iterator[FolderLock]:
        """Hold it, if no one else does, while this lasts.  Raises :class:`OSError` for a folder
        that is not there or cannot be read."""
        with contextlib.ExitStack() as held:
            try:
                descriptor = held.enter_context(_locked(self._folder, os.O_RDONLY))
                self._identity, self.had = _identity(descriptor), True
            except BlockingIOError:
                self.had = False
            except OSError as error:
                if error.errno not in _NO_FOLDER_LOCKS:
                    raise
                beside = Path(f"{os.path.realpath(self._folder)}.lock")
                self.had = held.enter_context(exclusive_lock(beside))
            try:
                yield self
            finally:
                self.had = False


def try_folder(folder: Path) -> str:
    """Whether files can be made in a folder, or it itself, by making one that is gone at once; in
    words.  Raises :class:`OSError` with a sentence for a person where they cannot."""
    where = folder
    try:
        while not where.exists():  # "." does
            where = where.parent
        with tempfile.TemporaryFile(dir=where, prefix=".check-"):
            pass
    except OSError as error:
        raise OSError(_not_writable(where, error)) from None
    return "it can be written" if where == folder else NOT_THERE_YET


#: Of what is made by itself.
NOT_THERE_YET = "not there yet, it is made when it is needed"


def _not_writable(folder: Path, error: OSError) -> str:
    text = f"{folder} cannot be written: {error.strerror}"
    if isinstance(error, PermissionError):
        with contextlib.suppress(OSError, KeyError):
            text += _not_permitted(folder)
    elif isinstance(error, NotADirectoryError):
        text += "; it is no folder"
    return text


# What the owner of a folder needs to make files in it.
OWNERS = (("w", stat.S_IWUSR), ("x", stat.S_IXUSR))


def _not_permitted(folder: Path) -> str:
    """Why, and what to do: of the folder, or the next above it that is not closed to us."""
    try:
        found = folder.stat()
    except PermissionError:
        return _not_permitted(folder.parent)
    lacking = "".join(right for right, bit in OWNERS if not found.st_mode & bit)
    if found.st_uid == os.geteuid() and lacking:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        return f"; the mode of {folder} is {mode}; chmod u+{lacking} {folder}"
    who = pwd.getpwuid(os.geteuid()).pw_name
    return f"; {folder} belongs to {folder.owner()}, and this is {who}"


# A network file system may lock files that are open for writing, and nothing else.
_NO_FOLDER_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)

# Between opening a lock file and locking it somebody may delete it; hardly so often.
TRIES = 10


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of ``path``, which is locked, and has this name.  Raises
    :class:`BlockingIOError` when another has the lock, and :class:`OSError`."""
    for _ in range(TRIES):
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _identity(path) != _identity(descriptor):
                continue  # what is locked is deleted already, and keeps no one away
            try:
                with ours_alone([descriptor].copy):
                    yield descriptor
            finally:
                # A child that C code has forked has the descriptor, too, and would keep the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            return
        finally:
            os.close(descriptor)
    raise FileNotFoundError(errno.ENOENT, "it is deleted all the time", str(path))


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Which file this is; ``None`` if there is none."""
    try:
        found = file.stat() if isinstance(file, Path) else os.fstat(file)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
