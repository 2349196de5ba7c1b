"""A Maildir for each address, below one folder.

Each message is there whole, with its name, after a power cut, before the handler returns, and is
not there at all if the handler raises.  The envelope stands on top of it (RFC 5321 4.4).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from salmon.server import SMTPError

from salmon_revsmtp.delivery.handed import handed_content, handed_envelope
from salmon_revsmtp.delivery.maildir import disk_reply, open_queue, push_safely
from salmon_revsmtp.delivery.trace import envelope_lines, separator
from salmon_revsmtp.files import sync_folder, try_folder
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.handlers.names import Mailbox
from salmon_revsmtp.safelog import log_safely

if TYPE_CHECKING:
    from salmon.mail import MailRequest

__all__ = ["Mailboxes"]

log = logging.getLogger(__name__)

# Maildirs of which is remembered that their names are safe.
MOST_KNOWN = 10_000

# By device and inode of their folder "new".  They outlive Salmon's importing a handler again.
_safe: set[tuple[int, int]] = set()
# Held meanwhile: a folder that another thread has just made is there, and not yet safe.
_opening = threading.Lock()


class Mailboxes:
    """The Maildirs below ``folder``: those of ``existing``, or of every address (``None``)."""

    def __init__(self, folder: Path, existing: Iterable[Mailbox] | None) -> None:
        self._folder = folder
        self._existing = None if existing is None else frozenset(existing)

    def store(self, message: MailRequest) -> None:
        """Store a message for its recipient.  Raises :class:`~salmon.server.SMTPError`: 550 for an
        address that does not exist, 452 on a full disk, 451 where it cannot be written."""
        envelope = handed_envelope(message)
        [recipient] = envelope.recipients
        mailbox = Mailbox.of(recipient)
        if self._existing is not None and mailbox not in self._existing:
            raise SMTPError(550, "5.1.1 no such mailbox here")
        content = handed_content(message)
        lines = envelope_lines(envelope.reverse_path, recipient)
        place = self._folder / mailbox.folder
        try:
            maildir = self._open(place)
            push_safely(maildir, lines, separator(content), content)
        except OSError as error:
            text = "maildir=%s recipient=%s not stored: %s"
            log_safely(log, logging.ERROR, text, str(place), angle(recipient), error)
            reply = disk_reply(error)
            raise SMTPError(reply.code, f"{reply.status} {reply.message}") from None

    def try_folder(self) -> str:
        """Whether the folder can be written, in words.  Raises :class:`OSError` with a sentence."""
        return f"{self._folder}: {try_folder(self._folder)}"

    def _open(self, place: Path) -> object:
        """The Maildir in a folder, whose own name would survive a power cut.  Raises
        :class:`OSError`."""
        with _opening:
            missing = [one for one in (self._folder, *self._folder.parents) if not one.exists()]
            maildir = open_queue(place)
            found = (place / "new").stat()
            identity = found.st_dev, found.st_ino
            if identity not in _safe:
                for one in (place, self._folder, *(one.parent for one in missing)):
                    sync_folder(one)
                if len(_safe) >= MOST_KNOWN:
                    _safe.clear()
                _safe.add(identity)
            return maildir
