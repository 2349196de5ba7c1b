"""One customer process that keeps many push sessions: what each costs it, and how soon all of them
have a message.

``python -m benchmarks.keeping [NUMBER]`` does it by itself, once.  The provider is another process
(``salmon-revsmtp run``), and so is the customer; all is under TLS.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import serving
from benchmarks.crowd import open_files
from benchmarks.home import Customers, connected_as, until
from benchmarks.intake import BOUND
from benchmarks.processes import module
from benchmarks.project import DOMAIN
from benchmarks.serving import running
from benchmarks.table import Case, Section, Target

__all__ = ["sections", "targets"]

SESSIONS, QUICK = 1_000, 5
OCTETS = 4_000
# Seconds in which the customer is watched while nothing comes.
WATCHED, WATCHED_QUICKLY = 60.0, 2.0
# Seconds after the last session has been opened in which the processes have done all that they do
# at once.
SETTLED = 5.0

MEMORY = "Memory of a push session in the customer, above the first"
PROCESSOR = "Processor time of a customer whose push sessions are silent"
OPENED = "Many push sessions of one customer, until all are open"
EACH = "One message to each of many push sessions, all at once"

OURS, ASYNCIO = "our customer", "asyncio's TLS, and a protocol that does nothing"
WORK = "the same, in the customer's processor time, its start included"
SLOWEST, LAST = (
    "the slowest, from its 250 to its handler",
    "the last handler, after the sender's first octet",
)


def sections(quick: bool, number: int | None = None) -> list[Section]:
    """Memory, processor time, the calls, and a message to each."""
    number = number or (QUICK if quick else SESSIONS)
    kept = _Kept(number, WATCHED_QUICKLY if quick else WATCHED)

    def figure(name: str) -> Case:
        return Case(name, lambda: kept.figure(name), kept.missing)

    memory = [figure(OURS), Case(ASYNCIO, lambda: _bare(number), kept.missing)]
    silent = Case(_share(number), lambda: kept.figure("share"), kept.missing)
    return [
        Section(MEMORY, "KiB", memory, ours=OURS, higher=False),
        Section(PROCESSOR, "% of a core", [silent], higher=False),
        Section(OPENED, "s", [figure(OPENED), figure(WORK)], higher=False),
        Section(EACH, "s", [figure(SLOWEST), figure(LAST)], higher=False),
    ]


def targets() -> list[Target]:
    """What a thousand may cost."""

    def most(text: str, title: str, case: str, bound: float) -> Target:
        return Target(
            text,
            lambda by: by[title].median(case) if title in by else None,
            lambda by: bound,
            at_least=False,
        )

    return [
        Target(
            "KiB of a push session in the customer, at most asyncio's TLS alone",
            lambda by: by[MEMORY].median(OURS) if MEMORY in by else None,
            lambda by: by[MEMORY].median(ASYNCIO) if MEMORY in by else None,
            at_least=False,
        ),
        most(
            "% of a core for silent push sessions in the customer", PROCESSOR, _share(SESSIONS), 2
        ),
        most("s until each of 1,000 push sessions has its message", EACH, SLOWEST, 1),
    ]


class _Kept:
    """One provider and its customers give all figures of a round."""

    def __init__(self, number: int, watched: float) -> None:
        self._number, self._watched = number, watched
        self._figures: dict[str, float] = {}
        self.missing = None

    def figure(self, name: str) -> float:
        """Each figure is asked for once a round; one that is gone means another round."""
        if name not in self._figures:
            self._figures = self._measure()
        return self._figures.pop(name)

    def _measure(self) -> dict[str, float]:
        open_files()
        names = [f"{number}.{DOMAIN}" for number in range(self._number)]
        accounts = [serving.account(f"customer-{one}", one, live=False) for one in names]
        with (
            serving.host(*accounts, tls=True) as folder,
            running(folder) as provider,
            ExitStack() as stack,
        ):
            with connected_as(provider, accounts[:1], True) as one:
                time.sleep(SETTLED)
                first = one.child.resident()
            # The one that has been called before, too, calls again.
            started = time.monotonic()
            many = stack.enter_context(
                connected_as(provider, accounts, True, already=1, handler="arrivals")
            )
            opened = time.monotonic() - started
            time.sleep(SETTLED)
            resident, work = many.child.resident(), many.child.processor_time()
            time.sleep(self._watched)
            idle = many.child.processor_time() - work
            each = _to_each(many, provider.smtp, self._number)
        return {
            OURS: (resident - first) / 1024 / max(1, self._number - 1),
            "share": 100 * idle / self._watched,
            OPENED: opened,
            WORK: work,
            **each,
        }


def _to_each(customers: Customers, port: int, number: int) -> dict[str, float]:
    with module("moments", port, number, OCTETS, number, "each") as sender:
        answered = sender.says(BOUND)
    began = answered.pop("began")
    file = customers.folder / "run/arrivals"
    until(lambda: file.read_text().count("\n") >= number)
    arrived = dict(_arrivals(file))
    return {
        SLOWEST: max(arrived[one] - at for one, at in answered.items()),
        LAST: max(arrived.values()) - began,
    }


def _arrivals(file: Path) -> list[tuple[str, float]]:
    pairs = (line.split(" ") for line in file.read_text().splitlines())
    return [(name, float(at)) for name, at in pairs]


def _bare(number: int) -> float:
    """KiB of a connection of a client that asyncio does the TLS of, above the first."""
    with module("idling", "ours") as server:
        port = server.says(BOUND)["port"]
        with module("dialling", port, number) as client:
            said = client.says(BOUND)
            return float(said["octets"]) / 1024


def _share(number: int) -> str:
    return f"{number:,} sessions"


if __name__ == "__main__":
    chosen = int(sys.argv[1]) if sys.argv[1:] else None
    for section in sections(False, chosen):
        print(f"\n{section.title} ({section.unit})")
        for case in section.cases:
            print(f"  {case.name}: {case.missing or f'{case.measure():.2f}'}", flush=True)
