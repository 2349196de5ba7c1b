"""The dialogue of a collection: for who asked the server to run it, as far as it is read; and in
outline, for who asks afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from salmon_revsmtp.foreign import shortened
from salmon_revsmtp.net.trace import ENOUGH, Hearer

__all__ = ["Outline", "Overheard", "hear_both"]

# Lines that are kept until they are read, and characters of a line: 300 KB for a reader that is
# slow.  The dialogue of some hundred messages in 0.2 s fits.
MOST_LINES = 500
LINE = 600

# Lines that an outline has of the beginning and of the end, and characters of a line: 20 KB at
# most, as a rule 3.  A login with TLS and the first messages fit.
HEAD, TAIL = 60, 20
OUTLINE_LINE = 200


class Overheard:
    """Hears a dialogue; it never waits for who reads it.  What there is no room for is counted, and
    said in its place."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._left_out = 0
        self._closed = False

    def __call__(self, line: str) -> None:
        """A line was said."""
        if self._closed:
            return
        if self._left_out or len(self._lines) >= MOST_LINES:
            self._left_out += 1
        else:
            self._lines.append(shortened(line, LINE))

    def taken(self) -> Iterator[str]:
        """The lines since this was last asked, which are kept no longer."""
        while self._lines:
            yield self._lines.popleft()
        if self._left_out:
            left_out, self._left_out = self._left_out, 0
            yield f"[{left_out} lines are left out: they came faster than they were read]"

    def close(self) -> None:
        """No one reads it any more."""
        self._closed = True
        self._lines.clear()
        self._left_out = 0


class Outline:
    """Hears the dialogue of an agent's last collection, and keeps its beginning and its end.

    Of a session it hears no more when it has the beginning, so that mail costs no more than it did;
    what follows is the login of a further session, or the end.
    """

    def __init__(self) -> None:
        self._head: list[str] = []
        self._tail: deque[str] = deque(maxlen=TAIL)

    def __call__(self, line: str) -> object:
        """A line was said."""
        line = shortened(line, OUTLINE_LINE)
        if len(self._head) < HEAD:
            self._head.append(line)
            return None
        self._tail.append(line)
        return ENOUGH

    def lines(self) -> list[str]:
        """What it has kept; where there is a gap it says so."""
        gap = "[here more was said, which is not kept]"
        return [*self._head, *([gap] if self._tail else []), *self._tail]


def hear_both(outline: Outline, other: Hearer | None) -> Hearer:
    """Who hears what two hear."""
    if other is None:
        return outline

    def both(line: str) -> None:
        outline(line)
        other(line)

    return both
