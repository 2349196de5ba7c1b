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

import logging
import os
import threading
from pathlib import Path
from typing import Any

from salmon import mail
from salmon.routing import Router
from salmon.server import SMTPError

from salmon_revsmtp.delivery.maildir import disk_reply, make_whole, open_queue, push_safely
from salmon_revsmtp.delivery.trace import separator, stored_envelope
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.forks import end_child_of
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["DEFAULT_UNDELIVERABLE", "RouterDelivery", "envelope_of", "undeliverable_queue"]

DEFAULT_UNDELIVERABLE = "run/undeliverable"

DELIVERED = Reply(250, "delivered", "2.0.0")
KEPT = Reply(250, "kept, no handler took it", "2.0.0")

log = logging.getLogger(__name__)


class RouterDelivery:
    """Runs handlers before the 250.

    ``project``  the folder in which an undeliverable queue is made if there is none; the current
                 one by default.
    """

    def __init__(self, project: Path | None = None) -> None:
        # A handler may change the folder of the process.
        self._place = Path(project or Path.cwd(), DEFAULT_UNDELIVERABLE)

    def deliver(
        self,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        trace: bytes,
        content: bytes | memoryview,
    ) -> Reply:
        """Hand a message (bytes, LF line ends) to the handlers that match ``recipient``.

        Returns 250 when they have returned or the message is in the undeliverable queue; a
        handler's ``SMTPError`` as its reply; 452 or 451 when the message could be kept nowhere.
        """
        try:
            undeliverable = undeliverable_queue(self._place)
        except OSError as error:
            # Without a last safe place, what a handler raises on would be gone.
            log_safely(
                log,
                logging.ERROR,
                "recipient=%s no undeliverable queue can be made: %s",
                *(angle(recipient), error),
            )
            return disk_reply(error)
        message = b"".join((trace, content))
        with _Kept(undeliverable, envelope, recipient, message) as kept:
            try:
                request = mail.MailRequest(peer, envelope.reverse_path or "<>", recipient, message)
                if recipient:  # Salmon takes the To header where it cannot read the envelope
                    request.To = recipient.lower()
                kept.request = request
                try:
                    Router.deliver(request)
                finally:
                    end_child_of(kept.process)
            except SMTPError as error:
                return reply_to_error(error)
            except Exception:
                self._log_raised("delivery raised", recipient)
                if not kept.done:
                    kept.push_quietly()
            except SystemExit:
                self._log_raised("a handler tried to end the process", recipient)
                kept.push_quietly()
            if kept.failure is not None:
                return disk_reply(kept.failure)
        return KEPT if kept.done else DELIVERED

    @staticmethod
    def _log_raised(what: str, recipient: str) -> None:
        log_safely(log, logging.ERROR, "recipient=%s %s", *(angle(recipient), what), error=True)


def reply_to_error(error: SMTPError) -> Reply:
    """A handler's ``SMTPError`` as the reply that it means."""
    text = " ".join(str(error.message).split())
    try:
        code = int(error.code)
    except (TypeError, ValueError):
        code = 0
    if 200 <= code < 300 or 400 <= code < 600:
        return Reply(code, text)
    text_of = "a handler raised SMTPError(%r), which is no final reply; answered 451"
    log_safely(log, logging.ERROR, text_of, error.code)
    return Reply(451, f"handler error: {text}", "4.3.0")


class _Kept:
    """The message that a thread is delivering, and whether it has gone into the queue.

    While the context lasts, a push of ``request`` by this thread stores the message.
    """

    def __init__(
        self, before: _Undeliverable, envelope: Envelope, recipient: str, message: bytes
    ) -> None:
        self.request: Any = None
        self.done = False
        self.failure: OSError | None = None
        self._before = before
        self.process = os.getpid()
        self.envelope, self._recipient, self._message = envelope, recipient, message

    def __enter__(self) -> _Kept:
        self._before.delivering.kept = self
        return self

    def __exit__(self, *raised: object) -> None:
        self._before.delivering.kept = None

    def push(self) -> str:
        if os.getpid() != self.process:
            os._exit(1)  # a child in which the handler raised; its parent has the message
        if self.done:
            return ""
        lines = stored_envelope(self.envelope, self._recipient)
        try:
            between = separator(self._message)
            key = push_safely(self._before.original, lines, between, self._message)
        except OSError as error:
            self.failure = error
            raise
        self.done, self.failure = True, None
        log_safely(
            log,
            logging.ERROR,
            "from=%s to=%s undeliverable, kept with key %s; the log has the reason above",
            *(angle(self.envelope.reverse_path), angle(self._recipient), key),
        )
        return key

    def push_quietly(self) -> None:
        try:
            self.push()
        except OSError as error:
            log_safely(log, logging.ERROR, "undeliverable, and not kept either: %s", error)


class _Undeliverable:
    """Stands before the project's undeliverable queue."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.delivering = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __len__(self) -> int:
        return len(self.original)

    def push(self, message: Any) -> Any:
        kept: _Kept | None = getattr(self.delivering, "kept", None)
        if kept is not None and message is kept.request:
            return kept.push()
        return self.original.push(message)

    def keep(self, *pieces: bytes) -> str:
        """Store a message as it is, synced.  Raises :class:`OSError`."""
        return push_safely(self.original, *pieces)


def envelope_of(message: Any) -> Envelope | None:
    """The envelope of the message that this thread is delivering, if it is this one."""
    current = Router.UNDELIVERABLE_QUEUE
    kept = getattr(getattr(current, "delivering", None), "kept", None)
    return kept.envelope if kept is not None and kept.request is message else None


_wrapping = threading.Lock()


def undeliverable_queue(place: Path = Path(DEFAULT_UNDELIVERABLE)) -> _Undeliverable:
    """The Router's undeliverable queue, made in ``place`` and wrapped where it is not yet.  Raises
    :class:`OSError`."""
    with _wrapping:
        current = Router.UNDELIVERABLE_QUEUE
        if not isinstance(current, _Undeliverable):
            if current is None:
                current = open_queue(place)
            make_whole(current)
            current = Router.UNDELIVERABLE_QUEUE = _Undeliverable(current)
        return current
