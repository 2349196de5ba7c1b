"""What a person sees while collections run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from salmon_revsmtp.customer.report import Report, counted
from salmon_revsmtp.foreign import printable

if TYPE_CHECKING:
    from salmon_revsmtp.customer.collection import Collection

__all__ = ["Progress"]

# Seconds that something takes before it is worth a word; most things are over by then.
WORTH_A_WORD = 2.0

#: Messages and octets; what goes on, and for how many seconds.
_State = tuple[tuple[int, int], tuple[str, float]]


class Progress:
    """Shows collections while they run.  ``live``: on a terminal, redraw; else only the ends."""

    def __init__(self, live: bool) -> None:
        self._console = Console()
        self._running: dict[str, _State] = {}
        self._collections: dict[str, Collection] = {}
        self._spinner = "dots" if self._console.encoding.startswith("utf") else "line"
        self._live: Live | None = None
        if live and sys.stdout.isatty():
            self._live = Live(
                console=self._console,
                get_renderable=self._draw,
                refresh_per_second=10,
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

    def watch(self, collection: Collection) -> None:
        """Show a collection of this process from now on."""
        self._collections[collection.agent.name] = collection

    def update(self, agent: str, counts: tuple[int, int], doing: tuple[str, float]) -> None:
        """Show how far a collection of the server's is: messages and octets; what it does or waits
        for, and for how many seconds."""
        self._running[agent] = counts, doing

    def done(self, report: Report) -> None:
        """Show how a collection ended."""
        self._running.pop(report.agent, None)
        self._collections.pop(report.agent, None)
        self._console.print(report.summary(), highlight=False, markup=False, soft_wrap=True)

    def _draw(self) -> Group:
        for name, one in list(self._collections.items()):
            self._running[name] = (one.tally.messages, one.tally.bytes), one.doing
        return Group(
            *(
                Spinner(self._spinner, Text(_line(name, *state)))
                for name, state in list(self._running.items())
            )
        )


def _line(name: str, counts: tuple[int, int], doing: tuple[str, float]) -> str:
    """``isp: 1 message, 4,711 bytes; waiting for the provider's next message, 40 s``."""
    line = f"{name}: {counted(*counts)}"
    what, seconds = doing
    return f"{line}; {printable(what)}, {seconds:.0f} s" if seconds >= WORTH_A_WORD else line
