"""Notifications on their way to the relay: on disk first, sent from there, deleted then.

So a sender is told although the relay is down, and 250 does not wait for the relay.  A crash
between sent and deleted sends one twice, and loses none.
"""

from __future__ import annotations

import contextlib
import email
import logging
import smtplib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salmon_revsmtp.delivery.maildir import by_age, open_queue, push_safely
from salmon_revsmtp.delivery.router import undeliverable_queue
from salmon_revsmtp.delivery.trace import split_envelope, with_envelope
from salmon_revsmtp.locks import only_one

__all__ = ["UNSENT", "Unsent"]

UNSENT = Path("run/unsent")

# RFC 5321 4.5.4.1: the give-up time is generally at least four or five days.
GIVE_UP = 5 * 86400.0

log = logging.getLogger(__name__)


class Unsent:
    """The Salmon Queue in which notifications wait.

    ``relay``   asked for Salmon's relay when one is needed: ``settings.relay`` may be set late.
    ``wake``    called when one has been put in, from the thread that did.
    """

    def __init__(
        self,
        relay: Callable[[], Any],
        wake: Callable[[], None] = lambda: None,
        folder: Path = UNSENT,
    ) -> None:
        self._relay = relay
        self._wake = wake
        self._folder = folder
        self._down = False

    def put(self, to: str, message: bytes) -> None:
        """Take a notification; it is safe on disk when this returns.  Raises :class:`OSError`."""
        push_safely(open_queue(self._folder), with_envelope("", to, message))
        self._wake()

    @property
    def waiting(self) -> bool:
        """Whether anything is to be sent."""
        return any(self._new.iterdir()) if self._new.is_dir() else False

    @property
    def _new(self) -> Path:
        return self._folder / "new"

    def send(self) -> None:
        """Send all that wait, oldest first, until the relay cannot be reached.  Blocks; never
        raises.  Two processes never send at once."""
        if not self.waiting:
            return
        with only_one(Path(f"{self._folder}.lock")) as ours:
            if not ours:
                return
            try:
                waiting = open_queue(self._folder)
                for key in by_age(waiting.keys()):
                    if not self._send(waiting, key):
                        return
            except (OSError, KeyError) as error:  # KeyError: somebody has taken it away
                log.error("queue=%s cannot be read: %s", self._folder, error)

    def _send(self, waiting: Any, key: str) -> bool:
        """One of them; ``False`` when the relay takes none just now."""
        stored = waiting.mbox.get_bytes(key)
        _, to, message = split_envelope(stored)
        try:
            self._relay().deliver(email.message_from_bytes(message), To=to, From="<>")
        except Exception as error:
            if _for_good(error) or self._age(key) > GIVE_UP:
                log.error("to=<%s> the notification cannot be sent, given up: %s", to, error)
                undeliverable_queue().keep(stored)
                waiting.remove(key)
                return True
            if not self._down:
                log.warning(
                    "to=<%s> the notification was not sent: %s: %s; it waits in %s",
                    *(to, type(error).__name__, error, self._folder),
                )
            self._down = True
            # What was said of one recipient may be otherwise for the next.
            return isinstance(error, smtplib.SMTPRecipientsRefused)
        self._down = False
        log.info("to=<%s> the notification was sent", to)
        waiting.remove(key)
        return True

    def _age(self, key: str) -> float:
        with contextlib.suppress(OSError):
            return time.time() - (self._new / key).stat().st_mtime
        return 0.0


def _for_good(error: Exception) -> bool:
    """The relay said 5yz to this notification."""
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(code >= 500 for code, _ in error.recipients.values())
    # A 5yz to EHLO or AUTH is about us, and may be mended.
    about_us = smtplib.SMTPHeloError | smtplib.SMTPAuthenticationError | smtplib.SMTPConnectError
    if isinstance(error, about_us):
        return False
    return isinstance(error, smtplib.SMTPResponseException) and error.smtp_code >= 500
