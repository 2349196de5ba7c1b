"""One message for one recipient through Salmon's Router: the project's own handlers.

What Salmon does with a message that its handlers cannot take is: put it into
``Router.UNDELIVERABLE_QUEUE``.  That queue is the last safe place, and Salmon's way there has
holes: there may be no such queue; what is pushed is the message as Salmon's parser wrote it anew,
which fails for a message that the parser rejected; the same message is pushed once per handler
that raised; the envelope is gone; and the folder is not synced.  So the queue is wrapped: while a
message of ours is being delivered, a push of that message stores our own bytes, envelope on top,
once, synced to disk.  Every other push goes through as it was.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salmon import mail, queue
from salmon.routing import Router
from salmon.server import SMTPError

from salmon_revsmtp.delivery.trace import with_envelope
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["DEFAULT_UNDELIVERABLE", "RouterDelivery", "disk_reply", "push_safely"]

DEFAULT_UNDELIVERABLE = "run/undeliverable"

log = logging.getLogger(__name__)


class RouterDelivery:
    """Runs handlers before the 250."""

    def deliver(
        self, peer: tuple[str, int], envelope: Envelope, recipient: str, content: bytes
    ) -> Reply:
        """Hand a message (bytes, LF line ends) to the handlers that match ``recipient``.

        Returns 250 when they have returned or the message is in the undeliverable queue; a
        handler's ``SMTPError`` as its reply; 452 or 451 when the message could be kept nowhere.
        """
        undeliverable = _undeliverable_queue()
        stored = with_envelope(envelope.reverse_path, recipient, content)
        with undeliverable.keeping(stored) as kept:
            try:
                request = mail.MailRequest(peer, envelope.reverse_path or "<>", recipient, content)
                if recipient:  # Salmon takes the To header where it cannot read the envelope
                    request.To = recipient.lower()
                kept.request = request
                Router.deliver(request)
            except SMTPError as error:
                return reply_to_error(error)
            except Exception:
                log.exception("recipient=%s delivery raised", recipient)
                if not kept.done:
                    kept.push_quietly()
            except SystemExit:
                log.exception("recipient=%s a handler tried to end the process", recipient)
                kept.push_quietly()
            if kept.failure is not None:
                return disk_reply(kept.failure)
        if kept.done:
            return Reply(250, "kept, no handler took it", "2.0.0")
        return Reply(250, "delivered", "2.0.0")


def reply_to_error(error: SMTPError) -> Reply:
    """A handler's ``SMTPError`` as the reply that it means."""
    text = " ".join(str(error.message).split())
    try:
        code = int(error.code)
    except (TypeError, ValueError):
        code = 0
    if 200 <= code < 300 or 400 <= code < 600:
        return Reply(code, text)
    log.error("a handler raised SMTPError(%r), which is no final reply; answered 451", error.code)
    return Reply(451, f"handler error: {text}", "4.3.0")


def disk_reply(error: OSError) -> Reply:
    """The reply when a message could not be written; the provider keeps it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Reply(452, "no room on the disk, try again later", "4.3.1")
    return Reply(451, "could not be written to disk, try again later", "4.3.0")


def push_safely(target: Any, message: bytes) -> str:
    """Push onto a Salmon Queue and return its key when the message would survive a power cut:
    Salmon syncs the file, the folder that names it is synced here."""
    key = str(target.push(message))
    folder = getattr(target, "dir", None)
    if folder is not None:
        descriptor = os.open(Path(folder, "new"), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return key


@dataclass
class _Kept:
    """The message that a thread is delivering, and whether it has gone into the queue."""

    queue: Any
    stored: bytes
    request: Any = None
    done: bool = False
    failure: OSError | None = None

    def push(self) -> str:
        if self.done:
            return ""
        try:
            key = push_safely(self.queue, self.stored)
        except OSError as error:
            self.failure = error
            raise
        self.done, self.failure = True, None
        log.error("undeliverable, kept with key %s; the log has the reason above", key)
        return key

    def push_quietly(self) -> None:
        try:
            self.push()
        except OSError as error:
            log.error("undeliverable, and not kept either: %s", error)


class _Undeliverable:
    """Stands before the project's undeliverable queue."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self._thread = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __len__(self) -> int:
        return len(self.original)

    def push(self, message: Any) -> Any:
        kept: _Kept | None = getattr(self._thread, "kept", None)
        if kept is not None and message is kept.request:
            return kept.push()
        return self.original.push(message)

    @contextmanager
    def keeping(self, stored: bytes) -> Iterator[_Kept]:
        """While this lasts, a push of ``request`` by this thread stores ``stored``."""
        kept = _Kept(self.original, stored)
        self._thread.kept = kept
        try:
            yield kept
        finally:
            self._thread.kept = None


_wrapping = threading.Lock()


def _undeliverable_queue() -> _Undeliverable:
    """The Router's undeliverable queue, made and wrapped where it is not yet."""
    with _wrapping:
        current = Router.UNDELIVERABLE_QUEUE
        if not isinstance(current, _Undeliverable):
            if current is None:
                Path(DEFAULT_UNDELIVERABLE).parent.mkdir(parents=True, exist_ok=True)
                current = queue.Queue(DEFAULT_UNDELIVERABLE)
            current = Router.UNDELIVERABLE_QUEUE = _Undeliverable(current)
        return current
