"""Files of this host into which large messages go as they come, and from which they are sent."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from salmon_revsmtp.files import give_to_owner
from salmon_revsmtp.smtp.content import Coming, Content, Traits

__all__ = ["READ", "FileSpool", "OpenFile"]

# Octets of a file that are read at a time.
READ = 256 * 1024


class FileSpool:
    """A new file ``path`` into which a message goes as it comes.

    ``traits``  what is known of what has come.
    ``failed``  what went wrong first; the rest is thrown away then.
    """

    def __init__(self, path: Path) -> None:
        self.traits = Traits()
        self._coming = Coming()
        self.failed: OSError | None = None
        self.path = path
        self.descriptor: int | None = None
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self.descriptor = os.open(path, flags, 0o600)
            give_to_owner(path)
        except OSError as error:
            self.failed = error

    @property
    def size(self) -> int:
        return self._coming.size

    def write(self, data: bytes) -> None:
        self._coming.add(data)
        self.traits.add(data)
        if self.failed is not None or self.descriptor is None:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            self.failed = error

    def beginning(self) -> bytes:
        return self._coming.beginning

    @property
    def digest(self) -> bytes:
        return self._coming.digest

    def content(self, head: bytes) -> Content | None:
        self.check()
        if not self.traits.streams or self.descriptor is None:
            return None
        ascii_ = self.traits.ascii and head.isascii()
        return self.open(head, ascii_)

    def open(self, head: bytes, ascii_: bool) -> OpenFile:
        """``head`` and then all of it, to be sent."""
        self.check()
        assert self.descriptor is not None
        return OpenFile(head, os.dup(self.descriptor), self.size, self.digest, ascii_)

    def read(self) -> bytes:
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """All of it, in pieces.  Raises :class:`OSError`."""
        self.check()
        if self.descriptor is None:
            raise FileNotFoundError(errno.ENOENT, "it has been discarded", str(self.path))
        yield from _pieces(self.descriptor, self.digest)

    def check(self) -> None:
        """Raises what went wrong."""
        if self.failed is not None:
            raise self.failed

    def discard(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


class OpenFile:
    """A message that is sent from a file that may get another name, or none; it is open until no
    one has this any more.

    ``size``, ``digest``  the file's octets, and their SHA-256.
    """

    def __init__(
        self, head: bytes, descriptor: int, size: int, digest: bytes, ascii_: bool
    ) -> None:
        self.size, self.ascii = len(head) + size, ascii_
        self._head, self._descriptor, self._digest = head, descriptor, digest
        weakref.finalize(self, os.close, descriptor)

    def pieces(self) -> Iterator[bytes]:
        yield self._head
        yield from _pieces(self._descriptor, self._digest)

    def beginning(self, octets: int) -> bytes:
        return (self._head + os.pread(self._descriptor, octets, 0))[:octets]


def _pieces(descriptor: int, digest: bytes) -> Iterator[bytes]:
    """All of a file.  The last piece comes if it is what was written: a disk that fails may have
    lost what was not synced yet.  Raises :class:`OSError`."""
    read, at, last = hashlib.sha256(), 0, b""
    while piece := os.pread(descriptor, READ, at):
        if last:
            yield last
        read.update(piece)
        at += len(piece)
        last = piece
    if read.digest() != digest:
        raise OSError(errno.EIO, "what was written is not what is read")
    yield last
