"""Memory that many sessions share: octets, counted and bounded."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["Budget"]


def _nothing() -> None:
    pass


class Budget:
    """Octets of messages that sessions hold together: those that are coming, and those that have
    come and are not answered.  It knows nothing of sessions; each gives back what it took.

    ``octets``  how many there are.
    ``within``  another budget, of which this is a part: what is taken here is taken there, too.
    ``held``    how many are taken.
    ``short``   called when octets were wanted that are not there: whoever knows the sessions may
                have one give way, later, for the one that asks is in the midst of something.
    """

    def __init__(self, octets: int = sys.maxsize, within: Budget | None = None) -> None:
        self.octets = octets
        self.held = 0
        self.short: Callable[[], None] = _nothing
        self._within = within

    @property
    def free(self) -> int:
        """How many can be taken."""
        here = self.octets - self.held
        return here if self._within is None else min(here, self._within.free)

    def room_for(self, octets: int) -> bool:
        """Whether so many can be taken."""
        if octets <= self.free:
            return True
        self.short()
        return False

    def take(self, octets: int) -> bool:
        """Take so many, or none."""
        if self._within is not None and not self._within.take(octets):
            self.short()
            return False
        if octets > self.octets - self.held:
            if self._within is not None:
                self._within.give(octets)
            self.short()
            return False
        self.held += octets
        return True

    def give(self, octets: int) -> None:
        """Give back what was taken."""
        self.held -= octets
        if self._within is not None:
            self._within.give(octets)
