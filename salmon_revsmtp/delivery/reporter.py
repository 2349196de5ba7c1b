"""Which notifications there are: for whoever has to tell a sender what became of a message, however
it is sent then.

The sender decides first (RFC 3461 4.1), then the owner, then RFC 3834, then the limits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from salmon_revsmtp.delivery.automatic import MAX_SEARCHED, why_automatic
from salmon_revsmtp.delivery.dsn import RecipientStatus, notification
from salmon_revsmtp.delivery.rates import RateLimit, Suppressed
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope

__all__ = ["Notice", "Reporter"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """What a sender is to be told, if anything.

    ``about``    the recipients of which the sender wants to be told; maybe none.
    ``message``  the notification, with LF line ends; ``None`` if there is none.
    ``why_not``  why there is none although the sender wants it, in words for the log.
    ``limited``  that is one of many, and has been logged.
    """

    about: tuple[RecipientStatus, ...]
    message: bytes | None = None
    why_not: str = ""
    limited: bool = False


class Reporter:
    """Makes notifications, or says why not.  Safe to use from several threads.

    ``hostname``  asked for our name.
    ``rates``     how many there may be.
    ``enabled``   there are any.
    """

    def __init__(
        self, hostname: Callable[[], str], rates: RateLimit, *, enabled: bool = True
    ) -> None:
        self._hostname = hostname
        self._rates = rates
        self._enabled = enabled

    def report(
        self,
        envelope: Envelope,
        recipients: Sequence[RecipientStatus],
        message: bytes | BinaryIO,
        *,
        arrived: float | None = None,
        eight_bit: bool = False,
    ) -> Notice:
        """What the sender is told of these recipients.  The arguments are those of
        :func:`~salmon_revsmtp.delivery.dsn.notification`; a file stands at its beginning."""
        about = tuple(one for one in recipients if envelope.wants(one.recipient, one.action))
        if not about:
            return Notice(about)
        if not self._enabled:
            return Notice(about, why_not="notifications are off")
        start = message if isinstance(message, bytes) else message.read(MAX_SEARCHED)
        if why := why_automatic(envelope.reverse_path, start):
            return Notice(about, why_not=why)
        made = notification(
            self._hostname(), envelope, about, start, arrived=arrived, eight_bit=eight_bit
        )
        if suppressed := self._rates.admit(envelope.reverse_path, len(made)):
            self._log_first(suppressed)
            return Notice(about, why_not="there were too many", limited=True)
        return Notice(about, made)

    def take_back(self, envelope: Envelope, notice: Notice) -> None:
        """A notification could not be kept, and will be tried again: it does not count among those
        that there may be."""
        if notice.message is not None:
            self._rates.take_back(envelope.reverse_path, len(notice.message))

    def _log_first(self, suppressed: Suppressed) -> None:
        """Once a window: of a flood there is no other line at this level."""
        if suppressed.first:
            log_safely(
                log,
                logging.WARNING,
                "to=%s no notifications for the next %.0f minutes: %d, or %d octets, are enough "
                "for an hour; what no one is told of is kept",
                angle(suppressed.whose),
                *(suppressed.seconds / 60, *suppressed.limit),
            )
