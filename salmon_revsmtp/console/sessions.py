"""Who has logged in: sessions, in memory, so that a restart ends them all."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Session", "Sessions"]

# Seconds after which who logged in has to do so again, however busy.
LONGEST = 86400.0
# Sessions at a time; the one that was idle longest gives way.
MOST = 200
# Octets of an id, and of a token of its forms: no one guesses 256 bits.
RANDOM = 32


@dataclass(eq=False)
class Session:
    """One browser that is logged in.

    ``user``   who that is, as the reverse proxy says; empty: who has the password.
    ``csrf``   the token that its forms have.
    ``began``, ``used``  when, in seconds on a steady clock.
    """

    user: str
    csrf: str
    began: float
    used: float


class Sessions:
    """Those that are open.  ``idle``: seconds after which one is over.  On one thread."""

    def __init__(self, idle: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle, self._clock = idle, clock
        self._open: dict[bytes, Session] = {}  # by the digest of the id

    def begin(self, user: str = "") -> tuple[str, Session]:
        """A new one, and its id."""
        self._forget()
        if len(self._open) >= MOST:
            oldest = min(self._open, key=lambda key: self._open[key].used)
            del self._open[oldest]
        identity, now = secrets.token_urlsafe(RANDOM), self._clock()
        session = Session(user, secrets.token_urlsafe(RANDOM), now, now)
        self._open[_digest(identity)] = session
        return identity, session

    def find(self, identity: str, *, use: bool = True) -> Session | None:
        """That of an id, if it is not over.  ``use``: someone is there."""
        session = self._open.get(_digest(identity))
        if session is None:
            return None
        if self._over(session):
            del self._open[_digest(identity)]
            return None
        if use:
            session.used = self._clock()
        return session

    def alive(self, session: Session) -> bool:
        """Whether it is still open."""
        return not self._over(session) and session in self._open.values()

    def end(self, identity: str) -> None:
        """Log out."""
        self._open.pop(_digest(identity), None)

    def _over(self, session: Session) -> bool:
        now = self._clock()
        return now - session.used >= self._idle or now - session.began >= LONGEST

    def _forget(self) -> None:
        self._open = {key: one for key, one in self._open.items() if not self._over(one)}


def _digest(identity: str) -> bytes:
    # A look-up in a dict takes a time that says something of its keys: of a digest that is nothing.
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()
