"""What senders are told of held mail: refused by the customer, delayed, given up, or returned by
the provider's operator.

A sender that is owed nothing (RFC 3461 4.1), or that is a machine (RFC 3834), or one of too many,
is not told; the log says so.  Its message is not kept for that: the customer has refused it, or has
not come for it in all the time that there was.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from salmon_revsmtp.delivery.dsn import MAX_FULL, Action, RecipientStatus
from salmon_revsmtp.delivery.maildir import disk_reply
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.reporter import Notice, Reporter
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.provider.hold.store import Held
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.content import Content, beginning
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Notices", "TooMany"]

log = logging.getLogger(__name__)

# Octets of a message that are looked at: more than of any goes back to its sender.
MOST_RETURNED = 2 * MAX_FULL


class TooMany(OSError):
    """There were so many notifications in this hour that this one cannot be among them."""


class Notices:
    """Has senders told.  Its methods block; each but the last returns ``None`` when the
    notification is safe on disk, or there is to be none, else the 4yz that says why not.

    ``reporter``  makes notifications.
    ``outbox``    where they wait until the relay takes them.
    """

    def __init__(self, reporter: Reporter, outbox: Outbox) -> None:
        self._reporter, self._outbox = reporter, outbox

    def refused(
        self, envelope: Envelope, refused: Mapping[str, Reply], content: bytes | Content
    ) -> Reply | None:
        """The customer has refused a message for these recipients."""
        statuses = [RecipientStatus.failed(*one) for one in refused.items()]
        return self._tell(envelope, statuses, content)

    def expired(self, held: Held, content: bytes | Content, days: float) -> Reply | None:
        """The customer has not come for a message."""
        why = f"it was held for {days:g} days, and its recipient's host did not collect it"
        return self._tell(held.envelope, _each(held, "failed", "5.4.7", why), content, held.arrived)

    def delayed(self, held: Held, content: bytes | Content, until: float) -> Reply | None:
        """It has not come for so long that the sender may want to know; ``until`` is when it will
        be given up (seconds since the epoch)."""
        why = "its recipient's host has not collected it yet; it is still held"
        statuses = _each(held, "delayed", "4.4.7", why, until)
        return self._tell(held.envelope, statuses, content, held.arrived)

    def returned(self, held: Held, content: bytes | Content) -> str:
        """The operator returns a message to its sender.  Returns why the sender is not told, ``""``
        if it is.  Unlike the others, this can be done another time: raises :class:`TooMany` where
        the limits are in the way, and :class:`OSError` where the notification cannot be kept."""
        why = "the operator of the host that held it for its recipient has returned it"
        statuses = _each(held, "failed", "5.0.0", why)
        start = beginning(content, MOST_RETURNED)
        notice = self._reporter.report(held.envelope, statuses, start, arrived=held.arrived)
        if notice.limited:
            raise TooMany("there were too many notifications in this hour, try it in the next")
        if failure := self._send(held.envelope, statuses, notice):
            raise OSError(f"the notification was not kept: {failure}")
        return "" if notice.message is not None else _why_not(notice)

    def _tell(
        self,
        envelope: Envelope,
        statuses: Sequence[RecipientStatus],
        content: bytes | Content,
        arrived: float | None = None,
    ) -> Reply | None:
        try:
            start = beginning(content, MOST_RETURNED)
        except OSError as error:
            return disk_reply(error)
        notice = self._reporter.report(envelope, statuses, start, arrived=arrived)
        return self._send(envelope, statuses, notice)

    def _send(
        self, envelope: Envelope, statuses: Sequence[RecipientStatus], notice: Notice
    ) -> Reply | None:
        to = angle(envelope.reverse_path)
        if notice.message is None:
            log_safely(log, logging.INFO, "to=%s no notification: %s", to, _why_not(notice))
            return None
        try:
            self._outbox.put(envelope.reverse_path, notice.message)
        except OSError as error:
            self._reporter.take_back(envelope, notice)
            log_safely(log, logging.ERROR, "to=%s the notification was not kept: %s", to, error)
            return disk_reply(error)
        self._outbox.send_soon()
        what = statuses[0].action
        log_safely(log, logging.INFO, "to=%s is told of %d %s", to, len(notice.about), what)
        return None


def _why_not(notice: Notice) -> str:
    return notice.why_not or "its sender does not want to be told"


def _each(
    held: Held, action: Action, status: str, why: str, until: float | None = None
) -> list[RecipientStatus]:
    """The same of all recipients, said by ourselves."""
    return [
        RecipientStatus(one, action, status, why, "x-salmon-revsmtp", retry_until=until)
        for one in held.envelope.recipients
    ]
