"""One message for one recipient into a Salmon Queue: handlers run later, in another process."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salmon_revsmtp.delivery.dispatcher import BUG
from salmon_revsmtp.delivery.maildir import Unsynced, disk_reply, keep_together, open_queue
from salmon_revsmtp.delivery.trace import stored_envelope
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.threads import Threads

__all__ = ["QueueDelivery"]

log = logging.getLogger(__name__)


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
            if self._queue is None:
                self._queue = open_queue(self._place)
            return Unsynced(self._queue, lines, trace, content, b"\n")
        except OSError as error:
            return self._not_stored(recipient, error)

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
