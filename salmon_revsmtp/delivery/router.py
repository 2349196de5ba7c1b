"""One message for one recipient through Salmon's Router: the project's own handlers.

What Salmon does with a message that its handlers cannot take is: put it into
``Router.UNDELIVERABLE_QUEUE``.  That queue is the last safe place, and Salmon's way there has
holes: there may be no such queue; what is pushed is the message as Salmon's parser wrote it anew,
which fails for a message that the parser rejected; the same message is pushed once per handler
that raised; the envelope is gone; and the folder is not synced.  So the queue is wrapped: while a
message of ours is being delivered, a push of that message stores our own bytes, envelope on top,
once, synced to disk, under a name that says so.  Every other push goes through as it was.

A message that the parser would take too long for (:mod:`~salmon_revsmtp.delivery.bounds`) goes
there without being parsed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salmon.routing import Router
from salmon.server import SMTPError

from salmon_revsmtp.delivery.bounds import address_excess, excess
from salmon_revsmtp.delivery.maildir import (
    disk_reply,
    folder_of,
    make_whole,
    open_queue,
    push_safely,
)
from salmon_revsmtp.delivery.request import mail_request
from salmon_revsmtp.delivery.trace import separator, undeliverable_envelope, with_reason
from salmon_revsmtp.delivery.waiting import KEPT_MARK
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.forks import end_child_of
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = [
    "BUG",
    "DEFAULT_UNDELIVERABLE",
    "Handling",
    "Retrial",
    "RouterDelivery",
    "delivery_of",
    "undeliverable_queue",
]

DEFAULT_UNDELIVERABLE = "run/undeliverable"

DELIVERED = Reply(250, "delivered", "2.0.0")
KEPT = Reply(250, "kept, no handler took it", "2.0.0")
BUG = Reply(451, "internal error, try again later", "4.3.0")

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
        message = b"".join((trace, content))
        handling = Handling(peer, envelope, recipient, message, self._place)
        handling.run()
        assert handling.reply is not None
        return handling.reply


class Handling:
    """One message on its way through the handlers, which another thread may give up.

    ``peer``     the client's address and port; the queue's name where they are not known.
    ``message``  the whole of it (bytes, LF line ends).
    ``place``    where an undeliverable queue is made if there is none.
    ``reply``    what came of it; ``None`` until that is known.
    ``ended``    what the handlers came to, also after :meth:`give_up`; ``None`` while they run.
    """

    def __init__(
        self,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        message: bytes,
        place: Path,
    ) -> None:
        self.reply: Reply | None = None
        self.ended: Reply | None = None
        self._place = place
        self._peer, self._message = peer, message
        self._envelope, self._recipient = envelope, recipient
        self._kept: _Kept | None = None
        self._settling = threading.RLock()
        self._given_up = False

    def run(self) -> None:
        """Have the message handled; ``reply`` is then what :meth:`RouterDelivery.deliver` says."""
        reply = BUG
        try:
            reply = self._handled()
        finally:
            with self._settling:
                late, self.ended = self._given_up, reply
                if not late:
                    self.reply = reply
            if late:
                self._log(logging.WARNING, f"the handler has ended after all: {reply}")

    def give_up(self, reason: str) -> Reply:
        """Wait no longer for the handlers, which may go on; keep the message as undeliverable.

        Returns what became of it: 250 when it is kept, or what the handlers have said if they were
        faster; 452 or 451 when it cannot be kept, and then this may be tried again.
        """
        with self._settling:
            if self.reply is None:
                try:
                    self._keep_given_up(reason)
                except OSError as error:
                    self._log(logging.ERROR, f"{reason}, and it cannot be kept: {error}")
                    return disk_reply(error)
                self._given_up = True
                self.reply = Reply(250, f"kept, {reason}", "2.0.0")
            return self.reply

    def _keep_given_up(self, reason: str) -> None:
        self._keeps().store(reason)

    def _keeps(self) -> _Kept:
        """Raises :class:`OSError` when no undeliverable queue can be made."""
        with self._settling:
            if self._kept is None:
                self._kept = self._keeper(undeliverable_queue(self._place))
            return self._kept

    def _keeper(self, before: _Undeliverable) -> _Kept:
        return _Kept(before, self._envelope, self._recipient, self._message)

    def _handled(self) -> Reply:
        try:
            kept = self._keeps()
        except OSError as error:
            # Without a last safe place, what a handler raises on would be gone.
            self._log(logging.ERROR, f"no undeliverable queue can be made: {error}")
            return disk_reply(error)
        with kept:
            addresses = self._envelope.reverse_path, self._recipient
            reason = address_excess(*addresses) or excess(self._message)
            if reason is not None:
                return self._unparsed(kept, reason)
            try:
                request = self._request(kept)
                try:
                    Router.deliver(request)
                finally:
                    end_child_of(kept.process)
            except SMTPError as error:
                return reply_to_error(error)
            except Exception:
                self._log(logging.ERROR, "delivery raised", error=True)
                if not kept.done:
                    kept.push_quietly(_raised())
            except SystemExit:
                self._log(logging.ERROR, "a handler tried to end the process", error=True)
                kept.push_quietly("a handler tried to end the process")
            if kept.failure is not None:
                return disk_reply(kept.failure)
            return KEPT if kept.done else DELIVERED

    def _request(self, kept: _Kept) -> Any:
        sender = self._envelope.reverse_path or "<>"
        request = mail_request(self._peer, sender, self._recipient, self._message)
        if self._recipient:  # Salmon takes the To header where it cannot read the envelope
            request.To = self._recipient.lower()
        kept.request = request
        return request

    def _unparsed(self, kept: _Kept, reason: str) -> Reply:
        """Keep a message that the parser would take too long for."""
        kept.push_quietly(f"not parsed: {reason}")
        if kept.failure is not None:
            return disk_reply(kept.failure)
        return Reply(250, f"kept, not parsed: {reason}", "2.0.0")

    def _log(self, level: int, what: str, error: bool = False) -> None:
        log_safely(log, level, "recipient=%s %s", *(angle(self._recipient), what), error=error)


class Retrial(Handling):
    """The same for a message that is in the undeliverable queue already: if no handler takes it, it
    stays where it is.

    ``reason``   why it stays; empty if it need not.
    ``handled``  its handlers have returned, be it after :meth:`give_up`, and it need not stay.
    """

    _waited = ""

    @property
    def reason(self) -> str:
        return self._waited or self._why(self.reply)

    @property
    def handled(self) -> bool:
        return self.ended is not None and not self._why(self.ended)

    def _why(self, reply: Reply | None) -> str:
        if isinstance(self._kept, _Stays) and self._kept.done:
            return self._kept.reason
        if reply is None or reply.positive:
            return ""
        return f"{'deferred' if reply.transient else 'refused'} with {reply}"

    def _keep_given_up(self, reason: str) -> None:
        # It is kept already, and the handlers may still say that it need not be.
        self._waited = reason

    def _keeper(self, before: _Undeliverable) -> _Kept:
        return _Stays(before, self._envelope, self._recipient, self._message)


def _raised() -> str:
    """Why a message is undeliverable, while Salmon pushes it: it does so where it has caught what a
    handler raised, and where no route has matched."""
    error = sys.exc_info()[1]
    if error is None:
        return "no route takes it"
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}, line {where.lineno}"
    return f"a handler raised {type(error).__name__}: {error} ({place}; the log has more)"


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
        self.envelope, self.recipient, self._message = envelope, recipient, message
        self._storing = threading.Lock()

    def __enter__(self) -> _Kept:
        self._before.delivering.kept = self
        return self

    def __exit__(self, *raised: object) -> None:
        self._before.delivering.kept = None

    def push(self, reason: str) -> str:
        """Store the message, once; returns its key.  Raises :class:`OSError`, and then ``failure``
        is what the delivery has come to."""
        if os.getpid() != self.process:
            os._exit(1)  # a child in which the handler raised; its parent has the message
        try:
            key = self.store(reason)
        except OSError as error:
            self.failure = error
            raise
        self.failure = None
        return key

    def store(self, reason: str) -> str:
        """The same from another thread, to whom the delivery owes nothing."""
        with self._storing:
            if self.done:
                return ""
            key = self._put(reason)
            self.done = True
        return key

    def _put(self, reason: str) -> str:
        key = self._before.keep(self.envelope, [self.recipient], self._message, reason)
        log_safely(
            log,
            logging.ERROR,
            "from=%s to=%s undeliverable, kept with key %s; %s",
            *(angle(self.envelope.reverse_path), angle(self.recipient), key, reason),
        )
        return key

    def push_quietly(self, reason: str) -> None:
        try:
            self.push(reason)
        except OSError as error:
            log_safely(log, logging.ERROR, "undeliverable, and not kept either: %s", error)


class _Stays(_Kept):
    """A message that is in the queue: it is not put there again, but it is known why it stays."""

    reason = ""

    def _put(self, reason: str) -> str:
        self.reason = reason
        return ""


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
            return kept.push(_raised())
        return self.original.push(message)

    def keep(
        self, envelope: Envelope, recipients: Sequence[str], message: bytes, reason: str
    ) -> str:
        """Store a message that no handler has taken, and why, synced; returns its key.  Raises
        :class:`OSError`."""
        lines = undeliverable_envelope(envelope, recipients, reason)
        return push_safely(self.original, lines, separator(message), message, mark=KEPT_MARK)

    @property
    def folder(self) -> Path | None:
        """Where it is; ``None`` for a queue of someone's own that is in no folder."""
        return folder_of(self.original)

    def keep_stored(self, stored: bytes, reason: str, mark: str = KEPT_MARK) -> str:
        """The same for a message that has its envelope on top."""
        return push_safely(self.original, with_reason(stored, reason), mark=mark)


def delivery_of(message: Any) -> tuple[Envelope, str] | None:
    """The envelope, and the recipient, of the message that this thread is delivering, if it is this
    one.  The recipient is spelled as it is routed, but for the case of its letters."""
    current = Router.UNDELIVERABLE_QUEUE
    kept: _Kept | None = getattr(getattr(current, "delivering", None), "kept", None)
    if kept is None or kept.request is not message:
        return None
    return kept.envelope, kept.recipient


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
