"""Undeliverable mail, taken through the handlers once more because a person says so.

The order is that of queue mode: handled, recorded, deleted.  A crash before the record leaves the
message, and the one delivery in progress may be done twice.  A crash after it leaves a file that
the next try deletes without asking a handler.  A message that some recipients do not get stays,
with its key and the new reason: its file is replaced by one that names only these.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.router import DEFAULT_UNDELIVERABLE, Retrial, undeliverable_queue
from salmon_revsmtp.delivery.trace import separator, undeliverable_envelope
from salmon_revsmtp.delivery.waiting import Message, WaitingMail, is_notification
from salmon_revsmtp.files import FolderLock, sync_folder, write_private
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.journal.deliveries import DeliveryJournal, MessageKey
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.threads import apart

__all__ = ["Retried", "Retry"]

# Seconds for the handlers of one message: as long as a client waits for them by default
# (``handler_timeout``).
PATIENCE = 300.0
# Seconds that a delivery is remembered.  It matters only until the message's file is replaced or
# deleted, which the next try does if this one died.
REMEMBERED = 365 * 86400.0

# Addresses of a To header that are named.
MOST_NAMED = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retried:
    """What became of a message: ``done``, and it is gone from the queue, or ``remark`` says why it
    is still there."""

    key: str
    done: bool
    remark: str = ""


class Retry:
    """Takes undeliverable mail through the handlers of this process.

    ``project``  its folder.
    ``journal``  where deliveries are recorded.
    ``outbox``   where notifications go, which are undeliverable, too, if the relay refuses them.
    ``turn``     held while a handler runs: they run one at a time.
    ``beside``   held then, too, where other handlers may run beside those.
    """

    def __init__(
        self,
        project: Path,
        journal: DeliveryJournal,
        outbox: Outbox,
        turn: threading.Lock,
        patience: float = PATIENCE,
    ) -> None:
        self._project, self._journal, self._outbox = project, journal, outbox
        self._turn, self._patience = turn, patience
        self.beside: AbstractContextManager[object] = contextlib.nullcontext()
        self._place = project / DEFAULT_UNDELIVERABLE

    @property
    def folder(self) -> Path | None:
        """Where undeliverable mail is; ``None`` if the project's queue is in no folder.  Raises
        :class:`OSError`."""
        return undeliverable_queue(self._place).folder

    def retry(self, keys: Sequence[str], to: str | None = None) -> Iterator[Retried]:
        """Try messages again, one after another; for ``to`` if their envelope was not kept.
        Blocks.  Two processes never do this at once.  Raises :class:`OSError`."""
        folder = self.folder
        if folder is None or not folder.is_dir():
            yield from (Retried(key, False, "it is not there") for key in keys)
            return
        for key in keys:
            # For each anew: who reads the answers may stop reading, and is not waited for.
            with FolderLock(folder).hold() as lock:
                retried = Retried(key, False, "another process is at work on this queue just now")
                if lock.had:
                    retried = self._retry(WaitingMail(folder), key, to)
            yield retried

    def _retry(self, waiting: WaitingMail, key: str, to: str | None) -> Retried:
        try:
            path = waiting.path(key)
            stored = waiting.read(key)
            if path is None or stored is None:
                return Retried(key, False, "it is not there any more")
            if not os.access(path.parent, os.W_OK):
                # What was handled could not be deleted, and would be handled again.
                return Retried(key, False, f"it is not tried, for {path.parent} cannot be written")
            return self._try(waiting, key, path, stored, to)
        except OSError as error:
            return Retried(key, False, f"reading or writing it: {error}")

    def _try(
        self, waiting: WaitingMail, key: str, path: Path, stored: bytes, to: str | None
    ) -> Retried:
        envelope, _, message = waiting.unpack(key, stored)
        if is_notification(key):
            return self._send_again(waiting, key, envelope.recipients, message)
        recipients = envelope.recipients
        if not recipients:
            found = waiting.find(key)
            if not to:
                return Retried(key, False, _unknown(found))
            recipients = (to,)
            envelope = Envelope(found.sender if found else "", recipients, client=envelope.client)
        name = MessageKey.of(f"undeliverable {path.name}", envelope.reverse_path, message)
        known = self._journal.known(name, recipients, REMEMBERED)
        left: dict[str, str] = {}
        for recipient in recipients:
            if recipient in known:
                continue
            why = self._handle(name, envelope, recipient, message)
            if why:
                left[recipient] = why
        if not left:
            waiting.drop(key)
            return Retried(key, True)
        remark = next(iter(left.values()))
        # What is not ours stays as it is: lines on top of it would be no one's.
        if waiting.is_ours(key) and path.exists():  # someone may have deleted it meanwhile
            self._replace(path, envelope, list(left), message, remark)
        return Retried(key, False, remark)

    def _handle(self, name: MessageKey, envelope: Envelope, recipient: str, message: bytes) -> str:
        """Have one recipient's handlers take it; returns why they have not, if they have not."""
        peer = envelope.peer or ("undelivered", 0)
        trial = Retrial(peer, envelope, recipient, message, self._place)

        def handle() -> None:
            try:
                with self.beside:
                    trial.run()
                if trial.handled and trial.ended is not None:
                    # Also of one that returns after all: the next try asks it no more.
                    self._journal.record(name, recipient, trial.ended, REMEMBERED)
            finally:
                # One that hangs keeps the others waiting, as in any delivery.
                self._turn.release()

        if not self._turn.acquire(timeout=self._patience):
            return f"not tried: another handler has not returned in {self._patience:g} seconds"
        try:
            running = apart("retry", handle)
        except RuntimeError as error:  # the machine has no thread to spare
            self._turn.release()
            return f"not tried: {error}"
        try:
            running.result(self._patience)
        except concurrent.futures.TimeoutError:
            trial.give_up(f"not handled in {self._patience:g} seconds; the handler still runs")
        log_safely(
            log,
            logging.WARNING if trial.reason else logging.INFO,
            "undelivered from=%s to=%s tried again: %s",
            *(angle(envelope.reverse_path), angle(recipient), trial.reason or "delivered"),
        )
        return trial.reason

    def _replace(
        self,
        path: Path,
        envelope: Envelope,
        recipients: Sequence[str],
        message: bytes,
        reason: str,
    ) -> None:
        """Have the file name these recipients, and this reason; a crash leaves one or the other."""
        lines = undeliverable_envelope(envelope, recipients, reason)
        beside = path.parent.parent / "tmp" / path.name
        write_private(path, lines, separator(message), message, beside=beside)
        sync_folder(path.parent)

    def _send_again(
        self, waiting: WaitingMail, key: str, recipients: Sequence[str], message: bytes
    ) -> Retried:
        """A notification is for a relay, not for handlers."""
        for one in recipients:
            self._outbox.put(one, message)
        waiting.drop(key)
        self._outbox.send_soon()
        return Retried(key, True, "a notification: it goes to the relay again, see unsent")


def _unknown(found: Message | None) -> str:
    """A header is no envelope: it names whom its sender likes, also where we would relay to."""
    named = ", ".join(map(angle, found.recipients[:MOST_NAMED])) if found else ""
    said = f"; its To, which anyone may have written, names {named}" if named else ""
    return f"its envelope was not kept{said}: say for whom it is with --to ADDRESS"
