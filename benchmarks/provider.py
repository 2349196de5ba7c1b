"""The provider: what it takes in, what it hands over, and how soon, beside other servers.

All of it is in the clear but for the moments, which are of sessions under TLS.
"""

from __future__ import annotations

import atexit
import shlex
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks import peers, serving
from benchmarks.crowd import open_files
from benchmarks.feeding import RECIPIENT, SENDER
from benchmarks.home import connected, until
from benchmarks.intake import BOUND
from benchmarks.processes import Failure, module
from benchmarks.project import DOMAIN, PASSWORD
from benchmarks.serving import running
from benchmarks.table import Case, Section, Target

__all__ = ["SECTIONS", "Run", "by_source", "median_of", "targets", "times"]

OCTETS = 4_000
OURS, POSTFIX, EXIM = "ours", "Postfix, into its hold queue", "Exim, queue_only"
OUR_CHUNKS = "ours, from a sender that pipelines and chunks"

# Sessions of smtp-source at a time -> messages; then of the others: some seconds.
INTAKE = {1: 1500, 10: 5000, 100: 5000}
QUICK_INTAKE = {1: 40, 10: 100}
CHUNKED = 10_000
HAND_OVER, EXIM_HAND_OVER = 10_000, 400
MOMENTS = 500
BURST, BURST_OCTETS = 100, 25_000_000
HELD = (1_000, 1_000_000)
OF_HELD = 5_000


#: What ``--only`` may name.
SECTIONS: dict[str, Callable[[bool], list[Section]]] = {
    "provider-intake": lambda quick: [
        _intake(*one, quick) for one in (QUICK_INTAKE if quick else INTAKE).items()
    ],
    "provider-handover": lambda quick: [_hand_over(quick)],
    "provider-moments": lambda quick: _moments(quick),
    "provider-memory": lambda quick: _burst(quick),
    "provider-held": lambda quick: _held(quick),
}


def targets() -> list[Target]:
    """What is to be reached."""
    one, many = INTAKE_TITLE.format("1 session"), "Hand-over to a customer that answers at once"
    of = [
        Target(
            f"intake of the provider from {_sessions(number)}, times {other}",
            times(INTAKE_TITLE.format(_sessions(number)), OURS, other),
            lambda _: 1.0,
        )
        for number in INTAKE
        for other in (POSTFIX, EXIM)
    ]
    of += [
        Target(f"{OUR_CHUNKS}, times {other}", times(one, OUR_CHUNKS, other), lambda _: 3.0)
        for other in (POSTFIX, EXIM)
    ]
    of.append(Target("hand-over, times Exim", times(many, OURS, "Exim"), lambda _: 20.0))
    return of + _moment_targets() + _size_targets()


def times(title: str, ours: str, theirs: str) -> Callable[[dict[str, Section]], float | None]:
    """One median divided by another of the same section."""

    def figure(sections: dict[str, Section]) -> float | None:
        section = sections.get(title)
        mine, other = (section.median(one) if section else None for one in (ours, theirs))
        return mine / other if mine and other else None

    return figure


def _sessions(number: int) -> str:
    return "1 session" if number == 1 else f"{number:,} sessions"


class Run(ABC):
    """One measurement gives all figures of a round, each of which is asked for once."""

    def __init__(self) -> None:
        self._figures: dict[str, float] = {}
        self._failure: str | None = None

    def figure(self, name: str) -> float:
        """One of them; a measurement that failed is not tried again."""
        if self._failure is not None:
            raise Failure(self._failure)
        if name not in self._figures:
            try:
                self._figures = self._measure()
            except Failure as error:
                self._failure = str(error)
                raise
        return self._figures.pop(name)

    @abstractmethod
    def _measure(self) -> dict[str, float]:
        """All of them."""


# -- intake ---------------------------------------------------------------------------------------

INTAKE_TITLE = "Intake of the provider, synced, 4 KB messages, {} of smtp-source"


def _intake(number: int, messages: int, quick: bool) -> Section:
    missing = peers.missing
    cases = [
        Case(OURS, lambda: _ours(by_source, number, messages), missing("smtp-source")),
        Case(
            POSTFIX,
            lambda: _by_server(peers.postfix_server, by_source, number, messages),
            missing("postfix", "smtp-source"),
        ),
        Case(
            EXIM,
            lambda: _by_server(peers.exim_server, by_source, number, messages),
            missing("exim", "smtp-source"),
        ),
    ]
    if number == 1:
        chunked = 40 if quick else CHUNKED
        way = "from a sender that pipelines and chunks"
        cases += [
            Case(OUR_CHUNKS, lambda: _ours(_by_chunks, number, chunked)),
            Case(
                f"Postfix, {way}",
                lambda: _by_server(peers.postfix_server, _by_chunks, number, messages),
                missing("postfix"),
            ),
            Case(
                f"Exim, {way}",
                lambda: _by_server(peers.exim_server, _by_chunks, number, messages),
                missing("exim"),
            ),
        ]
    return Section(INTAKE_TITLE.format(_sessions(number)), "messages/s", cases, ours=OURS)


_Way = Callable[[int, int, int], float]


def _ours(way: _Way, sessions: int, messages: int) -> float:
    with serving.host() as folder, running(folder) as provider:
        return way(provider.smtp, sessions, messages)


def _by_server(
    server: Callable[[], peers.Server], way: _Way, sessions: int, messages: int
) -> float:
    with server() as running_server:
        return way(running_server.port, sessions, messages)


def by_source(port: int, sessions: int, messages: int, kept: bool = True) -> float:
    """Messages per second of smtp-source.  Its connections are ``kept``, or each message has one of
    its own."""
    arguments = f"-s {sessions} -m {messages} -l {OCTETS} -f {SENDER} -t {RECIPIENT}"
    way = "-d" if kept else ""
    command = shlex.split(f"{peers.smtp_source()} {way} {arguments} 127.0.0.1:{port}")
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BOUND)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise Failure(f"smtp-source: {done.stderr[-300:]}")
    return messages / seconds


def _by_chunks(port: int, sessions: int, messages: int) -> float:
    """Messages per second over one connection, whole and without a wait for an answer."""
    arguments = ("--port", port, "--messages", messages, "--octets", OCTETS)
    with module("feeding", "client", *arguments) as client:
        said = client.says(BOUND)
        return float(said["messages"] / said["seconds"])


# -- hand-over ------------------------------------------------------------------------------------


def _hand_over(quick: bool) -> Section:
    ours, exim = (40, 10) if quick else (HAND_OVER, EXIM_HAND_OVER)
    cases = [
        Case(OURS, lambda: _handed_over_by_us(ours)),
        Case("Exim", lambda: _handed_over_by_exim(exim), peers.missing("exim", "smtp-source")),
    ]
    title = "Hand-over to a customer that answers at once"
    return Section(title, "messages/s", cases, ours=OURS)


def _handed_over_by_us(messages: int) -> float:
    with serving.host() as folder:
        serving.fill(folder, messages, OCTETS, BOUND)
        with running(folder) as provider:
            return _taken(provider.odmr, messages, PASSWORD)


def _handed_over_by_exim(messages: int) -> float:
    with peers.exim_server() as server:
        by_source(server.port, 10, messages)
        return _taken(server.port, messages, peers.EXIM_PASSWORD)


def _taken(port: int, messages: int, password: str) -> float:
    """Messages per second of a customer that answers at once."""
    arguments = ("--port", port, "--messages", messages, "--password", password)
    with module("feeding", "customer", *arguments) as customer:
        said = customer.says(BOUND)
        return float(said["messages"] / said["seconds"])


# -- from the 250 to the handler ------------------------------------------------------------------

NEAR, FAR = "Moments from the provider's 250 to the handler, live off, {}", 200


class _Moments(Run):
    """``sessions`` are held under TLS, and each message is for one of them, and held before it goes
    there; ``milliseconds`` is the round trip to the customer."""

    def __init__(self, sessions: int, messages: int = MOMENTS, milliseconds: int = 0) -> None:
        self.sessions, self.messages, self.milliseconds = sessions, messages, milliseconds
        self.name = f"{_sessions(sessions)} held"
        if milliseconds:
            self.name += f", {milliseconds} ms round trip"
        super().__init__()

    def _measure(self) -> dict[str, float]:
        names = [f"{number}.{DOMAIN}" for number in range(self.sessions)]
        accounts = [serving.account(f"customer-{one}", one, live=False) for one in names]
        far = self.milliseconds
        with (
            serving.host(*accounts, tls=True) as folder,
            running(folder) as provider,
            connected(provider, accounts, True, far, handler="arrivals") as customers,
        ):
            arguments = (provider.smtp, self.messages, OCTETS, self.sessions)
            with module("moments", *arguments) as sender:
                answered = sender.says(BOUND)
            arrived = _arrived(customers / "run/arrivals", self.messages)
        waits = sorted(1000 * (arrived[one] - at) for one, at in answered.items())
        return {"p50": statistics.median(waits), "p99": waits[int(0.99 * (len(waits) - 1))]}


def _arrived(file: Path, messages: int) -> dict[str, float]:
    """When each message was in the handler."""
    until(lambda: file.read_text().count("\n") >= messages)
    pairs = (line.split(" ") for line in file.read_text().splitlines())
    return {name: float(at) for name, at in pairs}


def _moments(quick: bool) -> list[Section]:
    open_files()
    messages = 20 if quick else MOMENTS
    runs = [_Moments(1, messages), _Moments(5 if quick else 1000, messages)]
    runs.append(_Moments(1, messages, FAR))

    def cases(figure: str) -> list[Case]:
        return [
            Case(run.name, lambda run=run: run.figure(figure))  # type: ignore[misc]
            for run in runs
        ]

    return [Section(NEAR.format(name), "ms", cases(name), higher=False) for name in ("p50", "p99")]


def _moment_targets() -> list[Target]:
    bounds = {"p50": 20.0, "p99": 250.0}
    return [
        Target(
            f"from the 250 to the handler, {run.name}, {name} in ms",
            median_of(NEAR.format(name), run.name),
            lambda _, bound=bound + run.milliseconds / 2: bound,  # type: ignore[misc]
            at_least=False,
        )
        for name, bound in bounds.items()
        for run in (_Moments(1), _Moments(1000), _Moments(1, milliseconds=FAR))
    ]


def median_of(title: str, name: str) -> Callable[[dict[str, Section]], float | None]:
    def figure(sections: dict[str, Section]) -> float | None:
        return sections[title].median(name) if title in sections else None

    return figure


# -- large messages at once -----------------------------------------------------------------------


def _burst(quick: bool) -> list[Section]:
    messages = 5 if quick else BURST
    run = _Burst(messages)
    name = f"{messages} messages of 25 MB at once"
    return [
        Section(BURST_MEMORY, "MiB", [Case(name, lambda: run.figure("peak"))], higher=False),
        Section(BURST_SECONDS, "s", [Case(name, lambda: run.figure("seconds"))], higher=False),
        Section(
            BURST_DEFERRED, "times", [Case(name, lambda: run.figure("deferred"))], higher=False
        ),
    ]


BURST_MEMORY = "Large messages at once, peak memory of the provider"
BURST_SECONDS = "Large messages at once, until all are held"
BURST_DEFERRED = "Large messages at once, how often one was deferred and sent again"


class _Burst(Run):
    def __init__(self, messages: int) -> None:
        super().__init__()
        self._messages = messages

    def _measure(self) -> dict[str, float]:
        with serving.host() as folder, running(folder) as provider:
            with module("burst", provider.smtp, self._messages, BURST_OCTETS) as clients:
                figures = clients.says(BOUND)
            return {**figures, "peak": provider.child.peak() / 2**20}


# -- many messages held ---------------------------------------------------------------------------


def _held(quick: bool) -> list[Section]:
    few, many = (100, 2_000) if quick else HELD
    holds = [_Hold(number, 40 if quick else OF_HELD) for number in (few, many)]
    return [
        Section(
            title,
            "messages/s",
            [Case(hold.name, lambda hold=hold, title=title: hold.figure(title)) for hold in holds],  # type: ignore[misc]
            ours=holds[-1].name,
        )
        for title in (HELD_INTAKE, HELD_HAND_OVER)
    ]


HELD_INTAKE, HELD_HAND_OVER = "Intake with so many held", "Hand-over with so many held"


class _Hold(Run):
    """A hold that is filled once; every round adds some messages, and takes as many."""

    def __init__(self, messages: int, some: int) -> None:
        super().__init__()
        self._messages, self._some = messages, some
        self._folder: Path | None = None
        self.name = f"{messages:,} messages held"

    def _measure(self) -> dict[str, float]:
        with running(self._filled()) as provider:
            return {
                HELD_INTAKE: _by_chunks(provider.smtp, 1, self._some),
                HELD_HAND_OVER: _taken(provider.odmr, self._some, PASSWORD),
            }

    def _filled(self) -> Path:
        if self._folder is None:
            stack = ExitStack()
            atexit.register(stack.close)
            self._folder = stack.enter_context(serving.host())
            serving.fill(self._folder, self._messages, OCTETS, BOUND)
        return self._folder


def _size_targets() -> list[Target]:
    def share(title: str) -> Callable[[dict[str, Section]], float | None]:
        few, many = (f"{number:,} messages held" for number in HELD)
        return times(title, many, few)

    return [
        Target(
            f"peak memory with {BURST} messages of 25 MB at once, in MiB",
            median_of(BURST_MEMORY, f"{BURST} messages of 25 MB at once"),
            lambda _: 200.0,
            at_least=False,
        ),
        # As fast: the spread of a round is about a tenth.
        Target("intake with 1,000,000 held, of that with 1,000", share(HELD_INTAKE), lambda _: 0.9),
        Target(
            "hand-over with 1,000,000 held, of that with 1,000",
            share(HELD_HAND_OVER),
            lambda _: 0.9,
        ),
    ]
