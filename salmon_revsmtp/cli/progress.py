"""What a person sees while collections run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from salmon_revsmtp.cli.output import STYLES, has_colours, outcome
from salmon_revsmtp.customer.report import Report, counted
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.customer.collection import Collection

__all__ = ["Progress"]

# Seconds that something takes before it is worth a number; most things are over by then.
WORTH_A_WORD = 2.0

# Times a second that a line is drawn, as often as a spinner turns.
DRAWN = 10
# The rate is that of these last seconds, looked at so often.
WINDOW = 10.0
LOOK = 0.5

AT_THE_END = "waiting for handlers that still run, and for the relay"

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


class Progress:
    """Shows collections while they run.  ``live``: on a terminal, redraw; else only the ends."""

    def __init__(self, live: bool) -> None:
        # What rich finds out about colours by itself is not all that a person may have said.
        colours = has_colours(sys.stdout)
        self._console = Console(color_system="auto" if colours else None)
        self._running: dict[str, _Running] = {}
        self._collections: dict[str, Collection] = {}
        self._spinner = "dots" if self._console.encoding.startswith("utf") else "line"
        self._live: Live | None = None
        if live and sys.stdout.isatty():
            self._live = Live(
                console=self._console,
                get_renderable=self._draw,
                refresh_per_second=DRAWN,
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def begin(self, agent: str, what: str) -> None:
        """Show a collection as soon as something is heard of it; until then, if that takes long,
        that this is done."""
        self._running[agent] = _Running(agent, what, self._spinner)

    def watch(self, collection: Collection) -> None:
        """Show a collection of this process."""
        self._collections[collection.agent.name] = collection
        self.begin(collection.agent.name, "")

    def update(self, agent: str, counts: tuple[int, int], doing: tuple[str, float]) -> None:
        """Show how far a collection of the server's is: messages and octets; what it does or waits
        for, and for how many seconds."""
        if agent in self._running:
            self._running[agent].update(counts, doing)

    def done(self, report: Report) -> None:
        """Show how a collection ended."""
        self._collections.pop(report.agent, None)
        self._running.pop(report.agent, None)
        text = Text(report.summary())
        word = report.outcome.value
        tone = getattr(outcome(word), "tone", "")
        start = len(f"{report.agent}: ")
        text.stylize(STYLES[tone]["fg"], start, start + len(word))
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def closing(self) -> None:
        """All have ended; what they leave behind is waited for."""
        self._running[""] = _Running("", AT_THE_END, self._spinner)

    def _draw(self) -> Group:
        for name, one in list(self._collections.items()):
            self.update(name, (one.tally.messages, one.tally.bytes), one.doing)
        return Group(*(one.drawn() for one in list(self._running.values()) if one.worth_a_word))


class _Running:
    """A collection that is running, and how fast mail comes.  A name that is empty is that of what
    is no collection."""

    def __init__(self, name: str, what: str, spinner: str) -> None:
        self._name = name
        self._began = time.monotonic()
        self._heard_of = False
        self._counts = (0, 0)
        self._doing = (what, 0.0)
        self._seen: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._spinner = Spinner(spinner)  # it turns by the time since it was first drawn

    def update(self, counts: tuple[int, int], doing: tuple[str, float]) -> None:
        self._heard_of, self._counts, self._doing = True, counts, doing
        now = time.monotonic()
        if now - self._seen[-1][0] >= LOOK:
            self._seen.append((now, *counts))
        while now - self._seen[0][0] > WINDOW:
            self._seen.popleft()

    @property
    def worth_a_word(self) -> bool:
        return self._heard_of or time.monotonic() - self._began >= WORTH_A_WORD

    def drawn(self) -> Spinner:
        self._spinner.update(text=Text(self._line()))
        return self._spinner

    def _line(self) -> str:
        """``isp: 12 messages, 47,110 bytes in 1:42 (3.1 messages/s, 12 KB/s); waiting for the
        provider's next message, 40 s``."""
        what, seconds = self._doing
        doing = printable(what)
        elapsed = time.monotonic() - self._began
        if not self._name:
            return f"{doing}, {elapsed:.0f} s"
        if seconds >= WORTH_A_WORD:
            doing += f", {seconds:.0f} s"
        return f"{self._name}: {counted(*self._counts)} in {_clock(elapsed)}{self._rate()}; {doing}"

    def _rate(self) -> str:
        (before, messages, octets), now = self._seen[0], time.monotonic()
        messages, octets = self._counts[0] - messages, self._counts[1] - octets
        if messages <= 0 or now <= before:
            return ""
        each = now - before
        return f" ({messages / each:.1f} messages/s, {_size(octets / each)}/s)"


def _clock(seconds: float) -> str:
    """``1:42``, or ``2:01:42``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _size(octets: float) -> str:
    for unit, name in _UNITS:
        if octets >= unit:
            return f"{octets / unit:.3g} {name}"
    return f"{octets:.0f} bytes"
