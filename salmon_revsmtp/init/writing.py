"""How a project gets into a folder: all of it or nothing, and never over what is there already.

A file is written beside its place first, synced, and then takes its name.  What can go wrong (a
full disk, a folder of someone else's) goes wrong before the first of them has its name; if one of
the names cannot be had after all, those before are taken back.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from salmon_revsmtp.files import make_folder, sync_folder
from salmon_revsmtp.init import environment

__all__ = ["Change", "File", "Owner", "changes", "difference", "write"]

#: User and group of what is written.
Owner = tuple[int, int]


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
    ``public``  any user may read it; otherwise only its owner.
    """

    path: str
    content: bytes
    kind: Literal["text", "env", "secret"] = "text"
    public: bool = False

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
        try:
            before = (folder / file.path).read_bytes()
        except FileNotFoundError:
            before = None
        if before != file.content:
            found.append(Change(file, before))
    return found


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

    What is made belongs to ``owner``, if one is given.  Raises :class:`OSError`.
    """
    places = {folder, *(folder / one for one in folders)}
    places |= {(folder / one.file.path).parent for one in wanted}
    with contextlib.ExitStack() as undo:
        for place in sorted(places):
            for made in _made(place):
                undo.callback(_remove_folder, made)
                _give(made, owner)
        if wanted:
            with tempfile.TemporaryDirectory(prefix=".init-", dir=folder) as beside:
                for change, source in _staged(Path(beside), wanted, owner):
                    _name(source, folder / change.file.path, change, undo)
        undo.pop_all()
    for place in sorted(places):
        sync_folder(place)


def _made(folder: Path) -> Iterator[Path]:
    """Make a folder with those above it, and name each that was not there."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        make_folder(one)
        yield one
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _staged(
    place: Path, wanted: Sequence[Change], owner: Owner | None
) -> list[tuple[Change, Path]]:
    """The files, written and synced, in a folder beside their places."""
    staged = []
    for number, change in enumerate(wanted):
        source = place / str(number)
        descriptor = os.open(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(change.file.content)
            stream.flush()
            os.fchmod(descriptor, change.file.mode)
            os.fsync(descriptor)
        _give(source, owner)
        staged.append((change, source))
    return staged


def _name(source: Path, target: Path, change: Change, undo: contextlib.ExitStack) -> None:
    if change.before is None and target.exists():
        raise FileExistsError(errno.EEXIST, "it was made meanwhile", str(target))
    source.rename(target)
    undo.callback(_restore, target, change)


def _give(path: Path, owner: Owner | None) -> None:
    if owner is not None:
        os.chown(path, *owner, follow_symlinks=False)


def _restore(target: Path, change: Change) -> None:
    with contextlib.suppress(OSError):
        if change.before is None:
            target.unlink()
        elif target.read_bytes() == change.file.content:
            target.write_bytes(change.before)


def _remove_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
