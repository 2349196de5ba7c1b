"""One message at a time: senders that wait for the answer to each command, into a service that
listens, beside Salmon's own receivers; from one session and from ten.  Exim in the clear, Postfix
and fetchmail send so.  smtp-source of Postfix is the sender for all.

And the processor time that a message costs us where it comes by itself and in the fastest way,
beside that of ``MailRequest`` and ``Router.deliver`` alone, which we cannot do without.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.feeding import RECIPIENT, SENDER
from benchmarks.intake import LMTP, Load, spent_bare, spent_by_us
from benchmarks.processes import Child, Failure, wait_for_port
from benchmarks.project import project
from benchmarks.table import Case, Section, Target

__all__ = ["sections", "targets"]

OCTETS = 4_000
# Messages of one round, and with --quick.
MESSAGES, QUICK = 6_000, 60
SESSIONS = (1, 10)

OURS, QUEUE, SMTP = "ours, router", "ours, queue", "Salmon's SMTPReceiver"
COST, ROUTER = "ours, pipelined", "the bare loop: MailRequest, Router.deliver"

# Octets of a message -> how many in two runs: their difference is what more messages cost, and
# nothing of what a process costs by itself.
COUNTS = {4_000: (2_000, 10_000), 100_000: (100, 1_000), 10_000_000: (2, 20)}
QUICK_COUNTS = {4_000: (20, 500)}

# The longest that one case may take, in seconds.
BOUND = 300.0


def _title(sessions: int) -> str:
    many = "one session" if sessions == 1 else f"{sessions} sessions"
    return f"One message at a time, 4 KB, {many}"


def _cost_title(octets: int) -> str:
    return f"Processor time of a {octets // 1000:,} KB message"


def sections(quick: bool) -> list[Section]:
    """For each number of sessions one, and one of processor time for each size."""
    messages = QUICK if quick else MESSAGES
    counts = QUICK_COUNTS if quick else COUNTS
    return [
        *(_section(sessions, messages) for sessions in SESSIONS),
        *(_cost(octets, *few_and_many) for octets, few_and_many in counts.items()),
    ]


def _section(sessions: int, messages: int) -> Section:
    missing = peers.missing("smtp-source")
    cases: list[tuple[str, Callable[[], float]]] = [
        (OURS, lambda: _into_us(sessions, messages)),
        (QUEUE, lambda: _into_us(sessions, messages, delivery="queue")),
        (LMTP, lambda: _into_salmon("lmtp", sessions, messages)),
        (SMTP, lambda: _into_salmon("smtp", sessions, messages)),
    ]
    return Section(
        _title(sessions),
        "messages/s",
        [Case(name, measure, missing) for name, measure in cases],
        ours=OURS,
    )


def _cost(octets: int, few: int, many: int) -> Section:
    def ours() -> float:
        """What one message more costs: nothing of what a process costs by itself."""
        spent = [spent_by_us(Load(messages, octets)) for messages in (few, many)]
        return 1e6 * (spent[1] - spent[0]) / (many - few)

    def alone() -> float:
        return 1e6 * spent_bare("router", Load(many, octets)) / many

    cases = [Case(COST, ours), Case(ROUTER, alone)]
    return Section(_cost_title(octets), "µs", cases, ours=COST, higher=False)


def targets() -> list[Target]:
    """What the issue asks for."""

    def times(sessions: int, other: str) -> Callable[[dict[str, Section]], float | None]:
        return lambda sections: _ratio(sections, _title(sessions), OURS, other)

    def cost(sections: dict[str, Section]) -> float | None:
        """What we do beyond the bare loop."""
        all_of_it = _ratio(sections, _cost_title(OCTETS), COST, ROUTER)
        return None if all_of_it is None else all_of_it - 1

    return [
        Target("one message at a time, times the LMTPReceiver", times(1, LMTP), lambda _: 1.0),
        Target("the same, ten sessions", times(10, LMTP), lambda _: 2.0),
        Target(
            "processor time beyond the bare loop, of that of the bare loop, 4 KB",
            cost,
            lambda _: 1.0,
            at_least=False,
        ),
    ]


def _ratio(sections: dict[str, Section], title: str, one: str, other: str) -> float | None:
    section = sections.get(title)
    ours = section and section.median(one)
    theirs = section and section.median(other)
    return ours / theirs if ours and theirs else None


# -- how each is measured ------------------------------------------------------------------------


def _into_us(sessions: int, messages: int, **service: Any) -> float:
    """Messages per second into a listening service of ours."""
    port = peers.free_port()
    with project(listen=[f"127.0.0.1:{port}"], **service) as folder:
        command = [str(peers.COMMAND), "--chdir", str(folder), "run"]
        with Child(command, name="salmon-revsmtp run") as child:
            wait_for_port(port, child)
            return _sent(port, sessions, messages)


def _into_salmon(kind: str, sessions: int, messages: int) -> float:
    with peers.receiver(kind) as port:
        return _sent(port, sessions, messages, *(["-L"] if kind == "lmtp" else []))


def _sent(port: int, sessions: int, messages: int, *options: str) -> float:
    """Messages per second of smtp-source, which ends with its last answer."""
    arguments = ["-d", *options, "-s", str(sessions), "-m", str(messages), "-l", str(OCTETS)]
    command = [*shlex.split(peers.smtp_source()), *arguments]
    command += ["-f", SENDER, "-t", RECIPIENT, f"127.0.0.1:{port}"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise Failure(f"smtp-source: {(done.stdout + done.stderr)[-300:]!r}")
    return messages / seconds
