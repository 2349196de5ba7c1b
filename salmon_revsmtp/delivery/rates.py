"""How many notifications go out, so that a forged sender is not flooded with ours.

Notifications are counted for each address, each domain and all together, in windows of an hour, in
messages and in octets.  What is over a limit is held back until the window is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from salmon_revsmtp.journal.counts import Change, Window
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.replies import without_surrogates

__all__ = ["ADDRESS", "ALL", "DOMAIN", "HOUR", "Counts", "Limit", "RateLimit", "Suppressed"]

HOUR = 3600.0

KIB = 1024
MIB = 1024 * KIB


class Limit(NamedTuple):
    """What goes through in a window: notifications, and octets of them."""

    messages: int
    octets: int


# A person who mistypes addresses gets a few, and one who reads them learns nothing from more.
ADDRESS = Limit(10, 256 * KIB)
# A forged sender may have another local part each time.  Of a large mail host that is many people.
DOMAIN = Limit(100, 2 * MIB)
# A relay that has a bad name for what it sends is worse than notifications that come late or never.
ALL = Limit(500, 10 * MIB)


class Counts(Protocol):
    """Where the counts are: a :class:`~salmon_revsmtp.journal.counts.CountJournal`, or any other
    that several processes share."""

    def update(self, names: Iterable[str], change: Change) -> None:
        """Call ``change`` with the counts of these names, as far as there are any, and the time in
        seconds; keep what it returns.  No one else changes them meanwhile.  If it is called more
        than once, the last call counts."""


@dataclass(frozen=True)
class Suppressed:
    """A notification that is over a limit.

    ``whose``    the address or the domain whose limit it is, or "all".
    ``limit``    the limit.
    ``seconds``  until the window is over.
    ``first``    it is the first in this window.
    """

    whose: str
    limit: Limit
    seconds: float
    first: bool


class RateLimit:
    """The limits, on counts that survive the process.  Safe to use from several threads if the
    counts are.

    ``what``  begins the names of the counts, which others may use, too.
    """

    def __init__(
        self,
        counts: Counts,
        what: str = "notifications",
        *,
        address: Limit = ADDRESS,
        domain: Limit = DOMAIN,
        everyone: Limit = ALL,
        window: float = HOUR,
    ) -> None:
        self._counts = counts
        self._what = what
        self._address, self._domain, self._everyone = address, domain, everyone
        self._window = window

    def admit(self, to: str, octets: int) -> Suppressed | None:
        """Count a notification to this mailbox, with so many octets.  ``None``: it may go out."""
        limits = self._limits(to)
        decision: list[Suppressed | None] = []

        def change(counts: Mapping[str, Window], now: float) -> Mapping[str, Window]:
            windows = {name: self._current(counts.get(name), now) for name in limits}
            for name, (whose, limit) in limits.items():
                one = windows[name]
                if one.messages >= limit.messages or one.octets + octets > limit.octets:
                    left = one.began + self._window - now
                    decision.append(Suppressed(whose, limit, left, not one.suppressed))
                    # No rows for what is held back by a wider limit: there may be any number.
                    return {name: one._replace(suppressed=one.suppressed + 1)}
            decision.append(None)
            return {
                name: one._replace(messages=one.messages + 1, octets=one.octets + octets)
                for name, one in windows.items()
            }

        self._counts.update(limits, change)
        return decision[-1]

    def take_back(self, to: str, octets: int) -> None:
        """One that was admitted came to nothing, and may be tried again: it does not count."""

        def change(counts: Mapping[str, Window], now: float) -> Mapping[str, Window]:
            return {
                name: one._replace(
                    messages=max(0, one.messages - 1), octets=max(0, one.octets - octets)
                )
                for name, one in counts.items()
            }

        self._counts.update(self._limits(to), change)

    def _limits(self, to: str) -> dict[str, tuple[str, Limit]]:
        """By the name of the count, the widest first: whose it is, and the limit."""
        local, _, spelled = to.rpartition("@")
        domain = domain_of(to) or spelled.lower()
        # Quotes, case and a tag make no other mailbox of it, for most who have one.
        local = local.strip('"').lower().partition("+")[0]
        ours = {
            "": ("all", self._everyone),
            domain: (domain, self._domain),
            f"{local}@{domain}": (to, self._address),
        }
        return {without_surrogates(f"{self._what} {name}"): one for name, one in ours.items()}

    def _current(self, window: Window | None, now: float) -> Window:
        if window is None or not 0 <= now - window.began < self._window:
            return Window(now)
        return window
