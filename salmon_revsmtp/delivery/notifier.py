"""Tells a sender of recipients that failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from salmon_revsmtp.delivery.dsn import RecipientStatus, notification
from salmon_revsmtp.delivery.maildir import disk_reply
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Notifier"]

log = logging.getLogger(__name__)


class Notifier:
    """Makes notifications, and has them sent.

    ``hostname``  asked for our name.
    ``outbox``    where they wait until the relay takes them.
    """

    def __init__(self, hostname: Callable[[], str], outbox: Outbox) -> None:
        self._hostname = hostname
        self._outbox = outbox

    def notify(
        self, envelope: Envelope, failed: Mapping[str, Reply], content: bytes
    ) -> Reply | None:
        """Tell the sender about the failed recipients.

        Nothing goes to a null sender, and nothing about a recipient with ``NOTIFY=NEVER``.
        Returns ``None`` when the notification is safe on disk or none is owed, else the 4yz with
        which to answer the message.
        """
        wanted = [
            RecipientStatus.failed(recipient, reply)
            for recipient, reply in failed.items()
            if envelope.wants(recipient, "failed")
        ]
        if not envelope.reverse_path or not wanted:
            return None
        message = notification(self._hostname(), envelope, wanted, content)
        try:
            self._outbox.put(envelope.reverse_path, message)
        except OSError as error:
            to = angle(envelope.reverse_path)
            log_safely(log, logging.ERROR, "to=%s the notification was not kept: %s", to, error)
            return disk_reply(error)
        self._outbox.send_soon()
        to = angle(envelope.reverse_path)
        log_safely(log, logging.INFO, "to=%s is told of %d failed recipients", to, len(wanted))
        return None
