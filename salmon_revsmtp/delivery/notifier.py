"""Tells a sender of recipients that failed, or keeps the message.

When this is asked, the client hears 250, or has heard it, and forgets the message.  So either the
notification is safe on disk, or the message is in the undeliverable queue.  One exception: a sender
who said ``NOTIFY=NEVER`` (RFC 3461 4.1) does not want to know, and gets that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from salmon_revsmtp.delivery.dsn import RecipientStatus
from salmon_revsmtp.delivery.maildir import disk_reply
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.reporter import Notice, Reporter
from salmon_revsmtp.delivery.router import undeliverable_queue
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Notifier"]

log = logging.getLogger(__name__)


class Notifier:
    """Has notifications sent.

    ``reporter``  makes them.
    ``outbox``    where they wait until the relay takes them.
    """

    def __init__(self, reporter: Reporter, outbox: Outbox) -> None:
        self._reporter = reporter
        self._outbox = outbox

    def notify(
        self, envelope: Envelope, failed: Mapping[str, Reply], message: bytes
    ) -> Reply | None:
        """Tell the sender about the failed recipients of a message (LF line ends), or keep it.

        Returns ``None`` when either is safe on disk, or neither is wanted; else the 4yz with which
        to answer the message.
        """
        statuses = [RecipientStatus.failed(*one) for one in failed.items()]
        notice = self._reporter.report(envelope, statuses, message)
        try:
            if notice.message is not None:
                self._outbox.put(envelope.reverse_path, notice.message)
            elif notice.about:
                self._keep(envelope, notice, failed, message)
        except OSError as error:
            self._reporter.take_back(envelope, notice)
            self._say(logging.ERROR, envelope, "the notification was not kept: %s", error)
            return disk_reply(error)
        if notice.message is not None:
            self._outbox.send_soon()
            self._say(logging.INFO, envelope, "is told of %d failed recipients", len(notice.about))
        elif not notice.about:
            self._say(logging.INFO, envelope, "wants no notification of %d failures", len(failed))
        return None

    def _keep(
        self, envelope: Envelope, notice: Notice, failed: Mapping[str, Reply], message: bytes
    ) -> None:
        """Once for all recipients, however large it is.  Raises :class:`OSError`."""
        recipients = [one.recipient for one in notice.about]
        said = failed[recipients[0]]
        reason = f"refused with {said}, and its sender is not told: {notice.why_not}"
        key = undeliverable_queue().keep(envelope, recipients, message, reason)
        self._say(
            logging.INFO if notice.limited else logging.WARNING,
            envelope,
            "is not told of %d failed recipients (%s); the message is kept as undeliverable %s",
            *(len(notice.about), notice.why_not, key),
        )

    def _say(self, level: int, envelope: Envelope, text: str, *arguments: object) -> None:
        log_safely(log, level, f"to=%s {text}", angle(envelope.reverse_path), *arguments)
