"""What a provider's operator does with held mail: has it tried again, returns it, drops it.

Each message is claimed first, so that no session sends it meanwhile.  One that a session is sending
is left alone: its customer's answer decides what becomes of it.  The order for one that is returned
is as for a refusal: its sender's notification is safe on disk, then the message goes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from salmon_revsmtp.foreign import angle
from salmon_revsmtp.provider.hold.store import Held, HoldStore, Settled
from salmon_revsmtp.provider.notices import Notices
from salmon_revsmtp.safelog import log_safely

__all__ = ["Treated", "Upkeep"]

log = logging.getLogger(__name__)

GONE = "it is not held any more"
UNDER_WAY = "it is being handed over now, and its customer's answer decides what becomes of it"
# Recipients that a log line names.
NAMED = 20


@dataclass(frozen=True)
class Treated:
    """What became of one message.

    ``done``    it is as the operator wants it; otherwise it is as it was, or gone already.
    ``remark``  why it was not done, or what else there is to say; for a person.
    """

    key: int
    done: bool
    remark: str = ""


class Upkeep:
    """Works on ``store``; ``notices`` tell senders.  Its methods block, and treat each message by
    itself: what cannot be done with one does not keep the others."""

    def __init__(self, store: HoldStore, notices: Notices) -> None:
        self._store, self._notices = store, notices

    def retry(self, keys: Sequence[int]) -> list[Treated]:
        """What was set aside waits again, and its customer's open sessions hear of it.  What waits
        already is tried at once where a session is open."""
        held = [one for one in map(self._store.find, keys) if one is not None]
        self._store.retry([one.key for one in held])
        for one in held:
            _log(one, "to be tried again", "")
        known = {one.key for one in held}
        return [Treated(key, True) if key in known else Treated(key, False, GONE) for key in keys]

    def bounce(self, keys: Sequence[int]) -> list[Treated]:
        """Return messages: the sender is told that the message was not delivered, and it goes.

        Where the sender is not to be told, as with the null sender, it goes all the same, and the
        remark says so."""
        return self._treat(keys, "returned", self._return)

    def drop(self, keys: Sequence[int]) -> list[Treated]:
        """Delete messages without a word to anyone."""
        return self._treat(keys, "dropped", lambda held: "")

    def _return(self, held: Held) -> str:
        remark = self._notices.returned(held, self._store.load([held.key]).get(held.key, b""))
        return f"its sender is not told: {remark}" if remark else ""

    def _treat(
        self, keys: Sequence[int], what: str, before: Callable[[Held], str]
    ) -> list[Treated]:
        """Have messages go, each after ``before`` has returned a remark, or raised."""
        claimed = self._store.claim(keys)
        done: list[Treated] = []
        try:
            for key in keys:
                held = claimed.get(key)
                if held is None:
                    why = GONE if self._store.find(key) is None else UNDER_WAY
                    done.append(Treated(key, False, why))
                    continue
                done.append(self._end(held, before))
                if done[-1].done:
                    _log(held, what, done[-1].remark)
        finally:
            self._store.release(claimed)
        return done

    def _end(self, held: Held, before: Callable[[Held], str]) -> Treated:
        try:
            remark = before(held)
            self._store.settle([Settled(held.key, held.envelope.recipients)])
        except OSError as error:
            return Treated(held.key, False, str(error))
        return Treated(held.key, True, remark)


def _log(held: Held, what: str, remark: str) -> None:
    recipients = held.envelope.recipients
    log_safely(
        log,
        logging.INFO,
        "account=%s key=%d from=%s to=%s recipients=%d bytes=%d %s, the operator says%s",
        *(held.account, held.key, angle(held.envelope.reverse_path)),
        " ".join(map(angle, recipients[:NAMED])),
        *(len(recipients), held.size, what),
        f": {remark}" if remark else "",
    )
