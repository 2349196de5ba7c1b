"""How far an account's mail has been read, so that one reads on from there.

While an old transaction is open, the remains of all messages that have gone since are still in the
index.  Whoever looks for the oldest message from the beginning goes past them each time.  So it is
kept in mind up to which key everything is known, and which messages below that still wait: those
that were someone else's, were shown already, or are set aside.  Who reads on looks at these, and at
what has a higher key.

It is only an aid: what is wrong here delays a message, until all is read from the beginning again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from salmon_revsmtp.journal.clock import since_boot

__all__ = ["Reading"]

# Messages that are kept in mind; with more, one reads from the beginning when they are wanted.
MOST = 1000
# Seconds after which all is read from the beginning, whatever we believe to know.
AFRESH = 600.0


class Reading:
    """How far a feed, and the one of the account before it, has read.

    ``after``  up to this key everything is known.
    ``left``   the keys up to there of what may be there to be taken.
    ``done``   the keys above it that need not be looked at again.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.after = 0
        self.left: set[int] = set()
        self.done: set[int] = set()
        self._until = since_boot() + AFRESH

    def prepare(self) -> None:
        """One reads on now."""
        if since_boot() > self._until:
            self._begin()

    def note(self, keys: Iterable[int]) -> None:
        """These may be there to be taken, whatever was known of them."""
        for key in keys:
            self.done.discard(key)
            if key <= self.after:
                self.left.add(key)
        if len(self.left) > MOST:
            self._begin()

    def read(self, upto: int, horizon: int, shown: Collection[int], there: Collection[int]) -> None:
        """All that is ``there`` up to a key has been seen; of that, ``shown`` need not be looked at
        again.  Only up to the ``horizon`` nothing can come any more."""
        shown = set(shown)
        self.left = {key for key in there if key <= self.after and key not in shown}
        self.done.update(key for key in shown if key > self.after)
        if (upto := min(upto, horizon)) > self.after:
            self.left.update(key for key in there if self.after < key <= upto and key not in shown)
            self.after = upto
            self.done = {key for key in self.done if key > upto}
        if len(self.left) > MOST:
            # What is above the last of them is read again.
            self.after = sorted(self.left)[MOST] - 1
            self.left = {key for key in self.left if key <= self.after}
