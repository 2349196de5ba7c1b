"""Distance: messages per second over a link of 0, 50 and 200 ms, and round trips per message.

The provider is ours, wherever the peer is an ODMR customer.  The link of 0 ms is the same proxy
without a delay, so that what differs is the distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from tempfile import TemporaryDirectory

from benchmarks import intake, peers
from benchmarks.intake import BOUND, OURS, Load, fed
from benchmarks.processes import Child, module
from benchmarks.project import agent, project
from benchmarks.table import Case, Section, Target

__all__ = ["round_trips", "sections", "targets"]

OCTETS = 4_000
# Round trip in milliseconds -> messages for those that do not wait, and for those that do.
COUNTS = {0: (1000, 200), 50: (1000, 40), 200: (1000, 15)}
QUICK = {0: (40, 5), 20: (40, 5)}

OLD = "ours, from a provider that waits for each answer"


def title(milliseconds: int) -> str:
    """The title of a section."""
    return f"Distance, {milliseconds} ms round trip, 4 KB messages, one connection"


def sections(quick: bool) -> list[Section]:
    """One for each distance."""
    counts = QUICK if quick else COUNTS
    return [_section(milliseconds, *messages) for milliseconds, messages in counts.items()]


def _section(milliseconds: int, many: int, few: int) -> Section:
    case = partial(_collected, milliseconds=milliseconds)
    load = Load(few, OCTETS)
    cases = [
        Case(OURS, lambda: case(_customer, many)),
        Case(OLD, lambda: _waiting(milliseconds, load)),
        Case("Exim", lambda: case(peers.exim, few), peers.missing("exim")),
        Case(
            "fetchmail before Salmon's SMTPReceiver",
            lambda: case(peers.fetchmail, few),
            peers.missing("fetchmail"),
        ),
        Case("Salmon's LMTPReceiver", lambda: _direct("lmtp", milliseconds, load)),
        Case("Salmon's SMTPReceiver", lambda: _direct("smtp", milliseconds, load)),
    ]
    return Section(title(milliseconds), "messages/s", cases, ours=OURS)


def targets() -> list[Target]:
    """What the issue asks for, in seconds for 1,000 messages."""

    def seconds(milliseconds: int) -> Callable[[dict[str, Section]], float | None]:
        def figure(sections: dict[str, Section]) -> float | None:
            section = sections.get(title(milliseconds))
            rate = section and section.median(OURS)
            return 1000 / rate if rate else None

        return figure

    def bound(sections: dict[str, Section]) -> float | None:
        near = seconds(0)(sections)
        return 2 * near + 5 * 0.2 if near else None

    return [
        Target(
            "1,000 messages of 4 KB at 200 ms, in seconds: twice those at 0 ms, and 5 round trips",
            seconds(200),
            bound,
            at_least=False,
        )
    ]


def round_trips(sections: dict[str, Section]) -> Section | None:
    """Round trips per message: what the longest link adds to each message's time, in its length."""
    known = [(milliseconds, sections.get(title(milliseconds))) for milliseconds in (200, 50, 20)]
    far = next(((length, section) for length, section in known if section), None)
    near = sections.get(title(0))
    if far is None or near is None:
        return None
    length, section = far
    cases = []
    for case in section.cases:
        slow, fast = case.median, near.median(case.name)
        made = Case(case.name, lambda: 0.0, case.missing, case.failed)
        if slow and fast:
            made.figures = [max(0.0, (1 / slow - 1 / fast) / (length / 1000))]
        cases.append(made)
    return Section("Round trips per message", "round trips", cases, higher=False)


# -- how each is measured ------------------------------------------------------------------------


@contextmanager
def _link(milliseconds: int, port: int) -> Iterator[int]:
    with module("delay", milliseconds / 2000, port) as link:
        yield link.says(20)["port"]


@contextmanager
def _customer(port: int) -> Iterator[Child]:
    with project(agent(port)) as folder, peers.collect(folder) as child:
        yield child


def _collected(
    customer: Callable[[int], AbstractContextManager[Child]], messages: int, milliseconds: int
) -> float:
    """Messages per second of a customer of our own provider."""
    with (
        TemporaryDirectory(prefix="revsmtp-bench-") as folder,
        module("holding", messages, OCTETS, folder) as provider,
    ):
        port = provider.says(60)["port"]
        with _link(milliseconds, port) as far, customer(far):
            said = provider.says(BOUND)
            return float(said["messages"] / said["seconds"])


def _waiting(milliseconds: int, load: Load) -> float:
    """The way in which Exim and Postfix send: pipelined, without CHUNKING."""
    with (
        fed(load.sent("--without", "CHUNKING")) as (port, provider),
        _link(milliseconds, port) as far,
        _customer(far),
    ):
        said = provider.says(BOUND)
        return float(said["messages"] / said["seconds"])


def _direct(kind: str, milliseconds: int, load: Load) -> float:
    """Salmon's receiver at the other end of the link."""
    with peers.receiver(kind) as port, _link(milliseconds, port) as far:
        return intake.sent_to_salmon(kind, far, load)
