"""One message for one recipient into a Salmon Queue: handlers run later, in another process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from salmon_revsmtp.delivery.maildir import disk_reply, open_queue, push_safely
from salmon_revsmtp.delivery.trace import stored_envelope
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["QueueDelivery"]

log = logging.getLogger(__name__)


class QueueDelivery:
    """Into a Salmon Queue: handlers run in another thread or process, later.

    ``folder``   the queue's.
    ``project``  what a relative one is below; the current folder by default.
    """

    def __init__(self, folder: str, project: Path | None = None) -> None:
        self._folder = folder
        # A handler may change the folder of the process.
        self._place = Path(project or Path.cwd(), Path(folder).expanduser())
        self._queue: Any = None

    def deliver(
        self,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        trace: bytes,
        content: bytes | memoryview,
    ) -> Reply:
        """Store a message (bytes, LF line ends) for one recipient, synced to disk."""
        lines = stored_envelope(envelope, recipient)
        try:
            if self._queue is None:
                self._queue = open_queue(self._place)
            key = push_safely(self._queue, lines, trace, content, b"\n")
        except OSError as error:
            log_safely(
                log,
                logging.ERROR,
                "queue=%s recipient=%s not stored: %s",
                *(self._folder, angle(recipient), error),
            )
            return disk_reply(error)
        return Reply(250, f"queued as {key}", "2.6.0")
