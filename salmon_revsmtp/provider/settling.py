"""Customers' answers, on their way into the hold store.

An answer that was heard is never lost: what cannot be settled now, as on a full disk, is settled
when it can be, and until then no one is sent that message again.  The answers of all sessions that
come at the same time are settled together.

The order for a recipient that was refused: its sender's notification is safe on disk, then the
recipient is struck off.  A crash between the two tells a sender twice, and loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from salmon_revsmtp.foreign import angle
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.provider.hold.store import Held, HoldStore, Settled
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.content import Content
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply, is_about_mail

__all__ = ["CUSTOMER_SAYS", "Answered", "Notify", "Settler", "is_for_later"]

log = logging.getLogger(__name__)

#: Begins the reason of what a customer has deferred.
CUSTOMER_SAYS = "the customer says "

# Seconds until a hold store that could not settle is tried again.
RETRY = 5.0

#: Tells a message's sender of recipients that have not got it: its envelope, the replies by
#: recipient, its octets.  ``None`` when that is safe on disk, or none is owed; else why not.
Notify = Callable[[Envelope, dict[str, Reply], bytes | Content], Reply | None]


def is_for_later(reply: Reply) -> bool:
    """A held message stays held after this reply of its customer."""
    return reply.transient or not is_about_mail(reply)


@dataclass(eq=False)
class Answered:
    """What the customer said of a held message.

    ``replies``  one per recipient, in order.
    ``told``     the sender has been told of those that refused.
    """

    held: Held
    replies: Sequence[Reply]
    told: bool = False

    @property
    def by_recipient(self) -> dict[str, Reply]:
        """The replies by recipient."""
        return dict(zip(self.held.envelope.recipients, self.replies, strict=True))


class Settler:
    """Settles answers in ``store``; ``notify`` tells senders of those that refuse."""

    def __init__(self, store: HoldStore, notify: Notify, hooks: HookCaller) -> None:
        self._store, self._notify, self._hooks = store, notify, hooks
        self._waiting: list[Answered] = []
        self._task: asyncio.Task[None] | None = None
        self._failing = False

    def settle(self, answered: Answered) -> None:
        """Have an answer settled."""
        self._waiting.append(answered)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def wait(self, seconds: float) -> None:
        """Wait for what is to be settled, but no longer than that."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=seconds)

    async def finish(self, seconds: float) -> None:
        """The same, and settle no more after that."""
        await self.wait(seconds)
        if self._waiting:
            log.error(
                "answers=%d could not be settled; these messages go out again", len(self._waiting)
            )
        if self._task is not None:
            self._task.cancel()

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch = list(self._waiting)
                try:
                    left = await asyncio.to_thread(self._settle_all, batch)
                except RuntimeError as error:  # the machine has no thread to spare
                    self._log_failure(error)
                    left = batch
                # Until then they are waiting: an answer that was heard is not forgotten.
                self._waiting[: len(batch)] = left
                if left:
                    await asyncio.sleep(RETRY)
        finally:
            self._task = None

    # -- in a thread ----------------------------------------------------------------------------

    def _settle_all(self, answers: Sequence[Answered]) -> list[Answered]:
        """Returns those that could not be settled."""
        failed: dict[Answered, Exception] = {}
        for one in answers:
            try:
                self._notify_of(one)
            except Exception as error:
                failed[one] = error
        done = [one for one in answers if one not in failed]
        try:
            self._store.settle([_settled(one) for one in done])
        except Exception as error:
            failed.update(dict.fromkeys(done, error))
            done = []
        for one in done:
            self._tell(one)
        self._log_failure(next(iter(failed.values()), None))
        return [one for one in answers if one in failed]

    def _notify_of(self, answered: Answered) -> None:
        """Have the sender told of those that refused."""
        held = answered.held
        refused = {
            one: reply
            for one, reply in answered.by_recipient.items()
            if reply.permanent and not is_for_later(reply)
        }
        if refused and not answered.told:
            # One whose file is lost meanwhile is told of, too, without its header.
            content = self._store.load([held.key]).get(held.key, b"")
            if failure := self._notify(held.envelope, refused, content):
                sender = angle(held.envelope.reverse_path)
                raise OSError(f"the notification for {sender}: {failure}")
            answered.told = True

    def _log_failure(self, error: Exception | None) -> None:
        if error is not None and not self._failing:
            text = "answers cannot be settled, tried again until they can: %s"
            log_safely(log, logging.ERROR, text, error)
        if error is None and self._failing:
            log.warning("answers can be settled again")
        self._failing = error is not None

    def _tell(self, answered: Answered) -> None:
        held = answered.held
        for recipient, reply in answered.by_recipient.items():
            log_safely(
                log,
                logging.INFO if reply.positive else logging.WARNING,
                "account=%s key=%d from=%s to=%s bytes=%d reply=%r",
                held.account,
                held.key,
                angle(held.envelope.reverse_path),
                angle(recipient),
                held.size,
                str(reply),
            )
            if self._hooks.implemented("message_handed_over"):
                self._hooks.call(
                    "message_handed_over",
                    account=held.account,
                    envelope=held.envelope,
                    recipient=recipient,
                    reply=reply,
                    seconds=max(0.0, time.time() - held.arrived),
                )


def _settled(answered: Answered) -> Settled:
    """What an answer comes to: 2yz and 5yz are done with, unless they are for later."""
    replies = answered.by_recipient
    later = [reply for reply in replies.values() if is_for_later(reply)]
    done = [one for one, reply in replies.items() if not is_for_later(reply)]
    return Settled(answered.held.key, done, f"{CUSTOMER_SAYS}{later[-1]}" if later else "")
