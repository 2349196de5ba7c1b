"""One message for one recipient into a Salmon Queue: handlers run later, in another process."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from salmon_revsmtp.delivery.dispatcher import BUG
from salmon_revsmtp.delivery.maildir import (
    Begun,
    Unsynced,
    disk_reply,
    keep_together,
    open_queue,
)
from salmon_revsmtp.delivery.trace import stored_envelope
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.content import Coming, with_lf
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.threads import Threads

__all__ = ["QueueDelivery", "QueueSpool"]

log = logging.getLogger(__name__)


class QueueSpool:
    """A message that goes into a queue as it comes: the file is that of ``recipient``, from the
    envelope on top to its last line.

    ``begin``   makes the file; may raise :class:`OSError`.
    ``head``    given the first lines of the message, what goes before them.
    """

    def __init__(
        self,
        recipient: str,
        begin: Callable[[], Begun],
        head: Callable[[bytes], bytes],
    ) -> None:
        self.recipient = recipient
        self._coming = Coming()
        self._head: Callable[[bytes], bytes] | None = head
        self._head_octets = 0
        self._rest = b""  # a CR whose LF may come
        self._ended = False  # its last line
        self._file: Begun | None = None
        self._failed = OSError(errno.ENOENT, "it has been discarded")
        try:
            self._file = begin()
        except OSError as error:
            self._failed = error

    @property
    def size(self) -> int:
        return self._coming.size

    def beginning(self) -> bytes:
        return self._coming.beginning

    @property
    def digest(self) -> bytes:
        return self._coming.digest

    def write(self, data: bytes) -> None:
        self._coming.add(data)
        if self._file is None or not data:
            return
        if self._rest:
            data = self._rest + data
        self._rest = b"\r" if data.endswith(b"\r") else b""
        lines = with_lf(data[:-1] if self._rest else data)
        if not lines:
            return
        self._ended = lines.endswith(b"\n")
        try:
            self._file.append(self._get_head(lines), lines)
        except OSError as error:
            self._failed = error
            self.discard()

    def _get_head(self, lines: bytes) -> bytes:
        """What goes before these, if they are the first."""
        if self._head is None:
            return b""
        head, self._head = self._head(lines), None
        self._head_octets = len(head)
        return head

    @property
    def _ending(self) -> bytes:
        return b"" if self._ended and not self._rest else self._rest + b"\n"

    def lines(self) -> Iterator[bytes]:
        """The message with LF line ends, the last one too, in pieces.  Raises :class:`OSError`."""
        yield from self._open().read(self._head_octets)
        yield self._ending

    def finish(self) -> Unsynced:
        """It is whole, and its recipient's: it is here no more.  Raises :class:`OSError`."""
        file = self._open()
        self._file = None
        return file.finish(self._get_head(self._rest), self._ending)

    def _open(self) -> Begun:
        if self._file is None:
            raise self._failed
        return self._file

    def discard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.drop()


class QueueDelivery:
    """Into a Salmon Queue: handlers run in another thread or process, later.

    ``folder``   the queue's.
    ``project``  what a relative one is below; the current folder by default.
    ``syncing``  threads that help to sync what waits together; without them one does it all.
    """

    def __init__(
        self, folder: str, project: Path | None = None, syncing: Threads | None = None
    ) -> None:
        self._folder = folder
        # A handler may change the folder of the process.
        self._place = Path(project or Path.cwd(), Path(folder).expanduser())
        self._queue: Any = None
        self._syncing = syncing

    def deliver(
        self,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        trace: bytes,
        content: bytes | memoryview,
    ) -> Reply:
        """Store a message (bytes, LF line ends) for one recipient, synced to disk."""
        [reply] = self.keep([(recipient, self.write(envelope, recipient, trace, content))])
        return reply

    def write(
        self, envelope: Envelope, recipient: str, trace: bytes, content: bytes | memoryview
    ) -> Unsynced | Reply:
        """Write a message, which is safe after :meth:`keep`; or the reply that says why not."""
        lines = stored_envelope(envelope, recipient)
        try:
            return Unsynced(self._opened(), lines, trace, content, b"\n")
        except OSError as error:
            return self._not_stored(recipient, error)

    def spool(
        self, envelope: Envelope, recipient: str, trace: Callable[[bytes], bytes]
    ) -> QueueSpool:
        """Where a large message goes while it comes, for a recipient.  ``trace`` is given its first
        lines, and returns what goes before them below the envelope."""
        lines = stored_envelope(envelope, recipient)
        return QueueSpool(recipient, self._begin, lambda begun: lines + trace(begun))

    def _begin(self) -> Begun:
        return Begun(self._opened())

    def write_spooled(
        self, envelope: Envelope, recipient: str, trace: bytes, spool: QueueSpool
    ) -> Unsynced | Reply:
        """:meth:`write` a message from where it went while it came, for another recipient."""
        try:
            copy = self._begin()
            try:
                copy.append(stored_envelope(envelope, recipient), trace)
                for piece in spool.lines():
                    copy.append(piece)
            except BaseException:
                copy.drop()
                raise
            return copy.finish()
        except OSError as error:
            return self._not_stored(recipient, error)

    def whole(self, spool: QueueSpool) -> bytes | Reply:
        """All of it, in memory; or the reply that says why it is not there."""
        try:
            return b"".join(spool.lines())
        except OSError as error:
            return self._not_stored(spool.recipient, error)

    def finish(self, spool: QueueSpool) -> Unsynced | Reply:
        """The same for the recipient for whom it went there.  It is there no more then."""
        try:
            return spool.finish()
        except OSError as error:
            return self._not_stored(spool.recipient, error)

    def _opened(self) -> Any:
        if self._queue is None:
            self._queue = open_queue(self._place)
        return self._queue

    def keep(self, written: Sequence[tuple[str, Unsynced | Reply]]) -> Sequence[Reply]:
        """Make safe what :meth:`write` has returned for these recipients; the reply for each."""
        unsynced = [one for _, one in written if not isinstance(one, Reply)]
        kept = iter(keep_together(unsynced, self._syncing))
        replies = []
        for recipient, one in written:
            if isinstance(one, Reply):
                replies.append(one)
            elif isinstance(key := next(kept), str):
                replies.append(Reply(250, f"queued as {key}", "2.6.0"))
            else:
                replies.append(self._not_stored(recipient, key))
        return replies

    def _not_stored(self, recipient: str, error: BaseException) -> Reply:
        text = "queue=%s recipient=%s not stored: %s"
        log_safely(log, logging.ERROR, text, self._folder, angle(recipient), error)
        return disk_reply(error) if isinstance(error, OSError) else BUG
