"""Which messages this process is delivering, as far as others on the machine must know.

The journal knows what has been delivered.  It cannot know what is being delivered: a row for that
would outlive a process that dies.  So a message is claimed with a lock on one octet of a file, at
an offset that stands for the message.  The system drops such locks (POSIX record locks) with the
process, and no child inherits them.

They belong to the process, and closing the file by any of its descriptors drops all of them.  So
there is one descriptor for a file, and within the process we keep the claims apart ourselves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from salmon_revsmtp.files import make_private_file

__all__ = ["CLAIMS", "Claims", "SharedClaims"]

CLAIMS = Path("run/.revsmtp.claims")

# What another process says by having the lock.
_TAKEN = (errno.EACCES, errno.EAGAIN)

log = logging.getLogger(__name__)

#: What stands for a message: a service, a reverse-path, and the SHA-256 of the octets.
Key = TypeVar("Key", bound="tuple[str, str, bytes]")


class _File:
    """A file of claims, for all of the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._owners: dict[int, object] = {}
        self._descriptor: int | None = None
        self._warned = False

    def claim(self, offsets: Iterable[int], owner: object) -> set[int]:
        """Returns those that could not be claimed."""
        taken = set()
        with self._lock:
            if not self._owners and self._descriptor is not None and not self._in_place():
                self._close()
            for offset in offsets:
                if self._owners.get(offset, owner) is not owner:
                    taken.add(offset)
                    continue
                try:
                    if self._descriptor is None:
                        self._descriptor = self._open()
                    fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
                except OSError as error:
                    if error.errno in _TAKEN and self._descriptor is not None:
                        taken.add(offset)
                        continue
                    self._warn(error)
                self._owners[offset] = owner
        return taken

    def release(self, offsets: Iterable[int], owner: object) -> None:
        with self._lock:
            for offset in offsets:
                if self._owners.get(offset) is owner:
                    del self._owners[offset]
                    if self._descriptor is not None:
                        with contextlib.suppress(OSError):
                            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, offset)

    def close(self) -> None:
        """Close it, unless something is claimed."""
        with self._lock:
            if not self._owners:
                self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _in_place(self) -> bool:
        """It is still the one that has its name."""
        assert self._descriptor is not None
        ours = os.fstat(self._descriptor)
        try:
            found = self._path.stat()
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (found.st_dev, found.st_ino)

    def _open(self) -> int:
        make_private_file(self._path)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        self._warned = False
        return descriptor

    def _warn(self, error: OSError) -> None:
        """Once.  A folder that cannot be written is no reason not to work."""
        if not self._warned:
            log.warning(
                "claims=%s cannot be made: %s; a message that two processes get at the same moment "
                "may be handled twice",
                *(self._path, error),
            )
        self._warned = True


_files: dict[Path, _File] = {}
_making = threading.Lock()


class Claims:
    """The claims of one owner.  Safe to use from several threads; never raises."""

    def __init__(self, path: Path = CLAIMS) -> None:
        path = path.absolute()
        with _making:
            self._file = _files.setdefault(path, _File(path))

    def claim(self, keys: Iterable[Key]) -> set[Key]:
        """Claim messages before looking into the journal for them; returns those that are being
        delivered elsewhere.  What this owner has claimed already it has."""
        offsets = {_offset(*key): key for key in keys}
        return {offsets[one] for one in self._file.claim(offsets, self)}

    def release(self, keys: Iterable[Key]) -> None:
        """These have been delivered, and are in the journal."""
        self._file.release([_offset(*key) for key in keys], self)

    def close(self) -> None:
        """Close the file, if no one in this process has a claim.  The next claim opens it again."""
        self._file.close()


class SharedClaims(Claims):
    """The claims of several threads: a message that more than one of them has is claimed until the
    last one has released it."""

    def __init__(self, path: Path = CLAIMS) -> None:
        super().__init__(path)
        self._lock = threading.Lock()
        self._times: Counter[tuple[str, str, bytes]] = Counter()

    def claim(self, keys: Iterable[Key]) -> set[Key]:
        """As that of one owner.  What was claimed is to be released once for each time."""
        keys = list(keys)
        with self._lock:
            elsewhere = super().claim(key for key in keys if not self._times[key])
            self._times.update(key for key in keys if key not in elsewhere)
            return elsewhere

    def release(self, keys: Iterable[Key]) -> None:
        """Only what was claimed."""
        with self._lock:
            keys = list(keys)
            self._times.subtract(keys)
            last = [key for key in keys if not self._times[key]]
            for key in last:
                del self._times[key]
            super().release(last)


@functools.lru_cache(maxsize=1024)  # it is asked for at the claim and at the release
def _offset(service: str, reverse_path: str, digest: bytes) -> int:
    """An octet of a file that is as large as files may be."""
    name = f"{service}\0{reverse_path}\0".encode()
    return int.from_bytes(hashlib.sha256(name + digest).digest()[:8], "big") >> 2
