"""How a project gets into a folder: all of it or nothing, and never over what is there already.

A file is written beside its place first, synced, and then takes its name.  What can go wrong (a
full disk, a folder of someone else's) goes wrong before the first of them has its name; if one of
the names cannot be had after all, those before are taken back.

Whoever owns the folder may be someone else than who writes, which may be root.  So no symbolic link
below it is followed, neither to write nor to read: each component is opened in the one above it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from salmon_revsmtp.files import make_folder
from salmon_revsmtp.init import environment

__all__ = ["Change", "File", "Owner", "changes", "difference", "read", "write"]

#: User and group of what is written.
Owner = tuple[int, int]


LINK = (
    "it is a symbolic link, and none below the folder is followed; put what it names in its place"
)

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL

# "password": "...", in any spelling; os.environ["..."] is none.  And revsmtp://name:password@host.
_PASSWORD = re.compile(
    r"""((?:pass|secret|token)\w*["']?\s*[:=]\s*[rbuf]*)(["'])(.*)\2""", re.IGNORECASE
)
_IN_A_URL = re.compile(r"//[^/\s\"']*@")


@dataclass(frozen=True)
class File:
    """A file of a project.

    ``path``    below its folder.
    ``kind``    what a person may see of it: ``"text"`` all but passwords, ``"env"`` names,
                ``"secret"`` nothing.
    ``made_of``  of ``"env"``: what was there when the content was made of it; ``None``: nothing.
    ``public``  any user may read it; otherwise only its owner.
    """

    path: str
    content: bytes
    kind: Literal["text", "env", "secret"] = "text"
    public: bool = False
    made_of: bytes | None = None

    @property
    def mode(self) -> int:
        return 0o644 if self.public else 0o600


@dataclass(frozen=True)
class Change:
    """A file that is not yet as it is to be.  ``before``: what is there; ``None``: nothing."""

    file: File
    before: bytes | None


def changes(folder: Path, files: Iterable[File]) -> list[Change]:
    """What would change in a folder, which need not be there.  Raises :class:`OSError`."""
    found = []
    for file in files:
        before = read(folder, file.path)
        if file.kind == "env" and before != file.made_of:
            raise _changed(folder / file.path)
        if before != file.content:
            found.append(Change(file, before))
    return found


def read(folder: Path, path: str) -> bytes | None:
    """What is in a file below a folder; ``None`` where there is none.  Raises :class:`OSError`,
    also for a symbolic link on the way."""
    whole = PurePosixPath(path)
    try:
        with _opened(folder, whole.parent) as place:
            return _content(place, folder / whole)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _opened(folder: Path, below: PurePosixPath) -> Iterator[int]:
    """A descriptor of a folder below ``folder``, to which no link has led."""
    place, descriptor = folder, _open(str(folder), _FOLDER, None, folder)
    try:
        for name in below.parts:
            place /= name
            inner = _open(name, _FOLDER, descriptor, place)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _open(name: str, flags: int, within: int | None, path: Path) -> int:
    """A descriptor of ``path``, which is ``name`` in the folder ``within`` and no link."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
            raise OSError(errno.ELOOP, LINK, str(path)) from None
        error.filename = str(path)
        raise


def _content(place: int, path: Path) -> bytes:
    # A pipe would be waited for.
    descriptor = _open(path.name, os.O_RDONLY | os.O_NONBLOCK, place, path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _changed(path: Path) -> OSError:
    return OSError(errno.EBUSY, "it was changed meanwhile; say it again", str(path))


def difference(change: Change) -> str:
    """A change as a unified diff, in which no secret is."""
    before, after = change.before or b"", change.file.content
    if change.file.kind == "secret":
        return f"{change.file.path}: replaced (its content is secret)\n"
    hidden = environment.hidden if change.file.kind == "env" else _without_passwords
    texts = [hidden(one.decode("utf-8", "backslashreplace")) for one in (before, after)]
    if texts[0] == texts[1]:
        return f"{change.file.path}: a value changes\n"
    lines = difflib.unified_diff(
        texts[0].splitlines(),
        texts[1].splitlines(),
        fromfile=f"{change.file.path} (now)",
        tofile=f"{change.file.path} (then)",
        lineterm="",
    )
    return "".join(f"{line}\n" for line in lines)


def _without_passwords(text: str) -> str:
    """A text, in which a person may have written a password after all."""
    return _IN_A_URL.sub(f"//{environment.HIDDEN}@", _PASSWORD.sub(_hidden, text))


def _hidden(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}{environment.HIDDEN}{found[2]}"


def write(
    folder: Path, wanted: Sequence[Change], folders: Sequence[str] = (), owner: Owner | None = None
) -> None:
    """Write what changes, and make ``folders`` below the folder; all of it or nothing.

    What is made belongs to ``owner``, if one is given.  Raises :class:`OSError`, also where a file
    is not as it was when the change was made.
    """
    places = {PurePosixPath(one) for one in folders}
    places |= {PurePosixPath(one.file.path).parent for one in wanted}
    places |= {above for place in places for above in place.parents}
    with contextlib.ExitStack() as undo:
        for made in _made(folder):
            undo.callback(_remove_folder, made)
            with _opened(made, PurePosixPath()) as descriptor:
                _give(descriptor, owner)
        for place in sorted(places):
            if place.name:
                _make_below(folder, place, owner, undo)
        for change in wanted:
            _unchanged(folder, change)
        if wanted:
            with _beside(folder) as beside:
                _stage(beside, wanted, owner)
                for number, change in enumerate(wanted):
                    _name(beside, str(number), folder, change, undo)
        undo.pop_all()
    for place in sorted(places):
        with _opened(folder, place) as descriptor:
            os.fsync(descriptor)


def _made(folder: Path) -> Iterator[Path]:
    """Make a folder with those above it, and name each that was not there."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        make_folder(one)
        yield one
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _make_below(
    folder: Path, place: PurePosixPath, owner: Owner | None, undo: contextlib.ExitStack
) -> None:
    """Make a folder in one that is there, unless it is there, too."""
    with _opened(folder, place.parent) as above:
        try:
            os.mkdir(place.name, 0o700, dir_fd=above)
        except FileExistsError:
            os.close(_open(place.name, _FOLDER, above, folder / place))
            return
        undo.callback(_remove_folder, folder / place)
        made = _open(place.name, _FOLDER, above, folder / place)
        try:
            _give(made, owner)
        finally:
            os.close(made)


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[int]:
    """A descriptor of a folder beside what is written, which is gone at the end."""
    name = f".init-{secrets.token_hex(8)}"
    with _opened(folder, PurePosixPath()) as above:
        os.mkdir(name, 0o700, dir_fd=above)
        beside = _open(name, _FOLDER, above, folder / name)
        try:
            yield beside
        finally:
            with contextlib.suppress(OSError), os.scandir(beside) as left:
                for one in left:
                    os.unlink(one.name, dir_fd=beside)
            os.close(beside)
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=above)


def _stage(beside: int, wanted: Sequence[Change], owner: Owner | None) -> None:
    """Write the files, and sync them; each is called by its number."""
    for number, change in enumerate(wanted):
        descriptor = os.open(str(number), _NEW | os.O_CLOEXEC, 0o600, dir_fd=beside)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(change.file.content)
            stream.flush()
            os.fchmod(descriptor, change.file.mode)
            _give(descriptor, owner)
            os.fsync(descriptor)


def _name(
    beside: int, source: str, folder: Path, change: Change, undo: contextlib.ExitStack
) -> None:
    target = PurePosixPath(change.file.path)
    with _opened(folder, target.parent) as place:
        _unchanged(folder, change)
        os.rename(source, target.name, src_dir_fd=beside, dst_dir_fd=place)
    undo.callback(_restore, folder, change)


def _unchanged(folder: Path, change: Change) -> None:
    """Raises :class:`OSError` where another has written meanwhile: that would be lost."""
    now, path = read(folder, change.file.path), folder / change.file.path
    if change.before is None and now is not None:
        raise FileExistsError(errno.EEXIST, "it was made meanwhile", str(path))
    if now != change.before:
        raise _changed(path)


def _give(descriptor: int, owner: Owner | None) -> None:
    if owner is not None:
        os.fchown(descriptor, *owner)


def _restore(folder: Path, change: Change) -> None:
    target = PurePosixPath(change.file.path)
    with contextlib.suppress(OSError), _opened(folder, target.parent) as place:
        if _content(place, folder / target) != change.file.content:
            return
        if change.before is None:
            os.unlink(target.name, dir_fd=place)
        else:
            descriptor = _open(target.name, os.O_WRONLY | os.O_TRUNC, place, folder / target)
            with os.fdopen(descriptor, "wb") as file:
                file.write(change.before)


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
