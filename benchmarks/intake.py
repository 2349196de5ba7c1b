"""Intake: how fast messages come in over one connection, for every way of taking them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import peers
from benchmarks.processes import Child, module
from benchmarks.project import agent, project
from benchmarks.table import Case, Section, Target

__all__ = [
    "BOUND",
    "LMTP",
    "OURS",
    "Load",
    "by_exim",
    "by_fetchmail",
    "by_us",
    "ceiling",
    "fed",
    "sections",
    "sent_to_salmon",
    "spent_bare",
    "spent_by_us",
    "targets",
]

OURS, QUEUE, LMTP, EXIM = "ours, router", "ours, queue", "Salmon's LMTPReceiver", "Exim"
LIMIT = "the limit: MailRequest, Router.deliver"

# The longest that one case may take, in seconds.
BOUND = 900.0

# Octets of a message -> messages: some seconds for the fast ones.
COUNTS = {1_000: 5000, 4_000: 5000, 100_000: 1000, 10_000_000: 10}
QUICK = {4_000: 60}
# Of these, what the slow ones get, so that they take no longer.
SHARES = {"fetchmail": 0.02, "exim": 0.4, "step by step": 0.4}


class Load:
    """So many messages of so many octets, and how they are sent."""

    def __init__(self, messages: int, octets: int, *options: str) -> None:
        self.messages, self.octets, self.options = max(2, messages), octets, options

    def share(self, name: str) -> Load:
        """What a slow peer gets of it."""
        return Load(int(self.messages * SHARES[name]), self.octets, *self.options)

    def sent(self, *options: str) -> Load:
        """The same, sent in another way."""
        return Load(self.messages, self.octets, *self.options, *options)

    @property
    def arguments(self) -> list[str]:
        return ["--messages", str(self.messages), "--octets", str(self.octets), *self.options]


def title(octets: int) -> str:
    """The title of a section."""
    return f"Intake, {octets // 1000:,} KB messages, one connection"


def sections(quick: bool) -> list[Section]:
    """One for each size of message."""
    counts = QUICK if quick else COUNTS
    return [_section(octets, messages) for octets, messages in counts.items()]


def _section(octets: int, messages: int) -> Section:
    load = Load(messages, octets)
    source = peers.missing("smtp-source")
    spliced = load.share("step by step")
    if source is None:
        spliced = spliced.sent("--source", peers.smtp_source())
    cases = [
        Case(OURS, lambda: by_us(load)),
        Case(QUEUE, lambda: by_us(load, delivery="queue")),
        Case("ours, router, by DATA", lambda: by_us(load.sent("--without", "CHUNKING"))),
        Case("ours, router, from smtp-source", lambda: by_us(spliced), source),
        Case("ours, queue, from smtp-source", lambda: by_us(spliced, delivery="queue"), source),
        Case(
            "fetchmail before Salmon's SMTPReceiver",
            lambda: by_fetchmail(load.share("fetchmail")),
            peers.missing("fetchmail"),
        ),
        Case(EXIM, lambda: by_exim(load.share("exim")), peers.missing("exim")),
        Case(
            "Exim, from smtp-source", lambda: by_exim(spliced), peers.missing("exim", "smtp-source")
        ),
        Case(LMTP, lambda: by_salmon("lmtp", load.share("step by step"))),
        Case("Salmon's SMTPReceiver", lambda: by_salmon("smtp", load.share("step by step"))),
        Case("the limit of queue mode: Queue.push, fsync", lambda: bare("queue", load)),
        Case(LIMIT, lambda: bare("router", load)),
        Case("the feeding side, into a sink", lambda: ceiling(load.sent())),
        Case("smtp-source, into a sink", lambda: ceiling(spliced), source),
    ]
    return Section(title(octets), "messages/s", cases, ours=OURS, limit=LIMIT)


def targets() -> list[Target]:
    """What the issue asks for."""

    def times(other: str) -> Callable[[dict[str, Section]], float | None]:
        def figure(sections: dict[str, Section]) -> float | None:
            section = sections.get(title(4_000))
            ours = section and section.median(OURS)
            theirs = section and section.median(other)
            return ours / theirs if ours and theirs else None

        return figure

    return [
        Target("intake at 4 KB, times Salmon's LMTPReceiver", times(LMTP), lambda _: 3.0),
        Target("intake at 4 KB, times Exim", times(EXIM), lambda _: 8.0),
    ]


# -- how each is measured ------------------------------------------------------------------------


@contextmanager
def fed(load: Load) -> Iterator[tuple[int, Child]]:
    """A provider with a load, and its port."""
    with module("feeding", "provider", *load.arguments) as provider:
        yield provider.says(20)["port"], provider


def _rate(said: dict[str, Any]) -> float:
    return float(said["messages"] / said["seconds"])


def by_us(load: Load, tls: bool = False, **service: Any) -> float:
    """Messages per second of ``salmon-revsmtp collect``."""
    return _by_us(load, tls, **service)[0]


def spent_by_us(load: Load, **service: Any) -> float:
    """Seconds of processor time of ``salmon-revsmtp collect``."""
    return _by_us(load, **service)[1]


def _by_us(load: Load, tls: bool = False, **service: Any) -> tuple[float, float]:
    with (
        fed(load.sent("--tls") if tls else load) as (port, provider),
        project(agent(port, tls=tls), **service) as folder,
        peers.collect(folder) as customer,
    ):
        rate = _rate(provider.says(BOUND))
        report = customer.says(60)
        if report["messages"] != load.messages:
            raise AssertionError(f"{load.messages} were sent, and the report is {report}")
        return rate, customer.processor_time()


def by_exim(load: Load) -> float:
    """Messages per second of Exim as ODMR customer."""
    with fed(load) as (port, provider), peers.exim(port):
        return _rate(provider.says(BOUND))


def by_fetchmail(load: Load) -> float:
    """Messages per second of fetchmail as ODMR customer, in front of Salmon's SMTPReceiver."""
    with fed(load) as (port, provider), peers.fetchmail(port):
        return _rate(provider.says(BOUND))


def by_salmon(kind: str, load: Load) -> float:
    """Messages per second of one of Salmon's receivers."""
    with peers.receiver(kind) as port:
        return sent_to_salmon(kind, port, load)


def sent_to_salmon(kind: str, port: int, load: Load) -> float:
    """Messages per second into a receiver that runs, in the way that is fastest for it.

    The LMTPReceiver announces PIPELINING, but writes its replies one by one to a socket with
    Nagle's algorithm, so that a client that uses it waits 40 ms for each message.
    """
    options = ["--lmtp", "--without", "PIPELINING"] if kind == "lmtp" else []
    return _sent_to(port, load, *options)


def ceiling(load: Load, *options: str) -> float:
    """Messages per second into the ideal sink."""
    with module("feeding", "sink", *options) as sink:
        return _sent_to(sink.says(20)["port"], load, *options)


def _sent_to(port: int, load: Load, *options: str) -> float:
    with module("feeding", "client", "--port", port, *load.arguments, *options) as client:
        return _rate(client.says(BOUND))


def bare(how: str, load: Load) -> float:
    """Messages per second of what Salmon and the disk do alone."""
    return load.messages / _bare(how, load)["seconds"]


def spent_bare(how: str, load: Load) -> float:
    """Seconds of processor time of the same."""
    return _bare(how, load)["processor"]


def _bare(how: str, load: Load) -> dict[str, float]:
    with (
        project() as folder,
        module("bare", how, load.messages, load.octets, cwd=folder) as child,
    ):
        return child.says(BOUND)
