"""The dialogue of a collection for who asked the server to run it, as far as it is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from salmon_revsmtp.foreign import shortened

__all__ = ["Overheard"]

# Lines that are kept until they are read, and characters of a line: 300 KB for a reader that is
# slow.  The dialogue of some hundred messages in 0.2 s fits.
MOST_LINES = 500
LINE = 600


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
