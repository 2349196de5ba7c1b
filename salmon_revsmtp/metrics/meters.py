"""The metrics themselves: what is counted as it happens, and what is read when someone asks.

A message, an account, a reply: all of it comes through the hooks.  Labels are bounded: agents,
services and queues are those of the settings, and of accounts no more than ``accounts`` have a
label of their own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from salmon_revsmtp import hookimpl

if TYPE_CHECKING:
    from salmon_revsmtp import Agent, Envelope, Reply, Report, Server

__all__ = ["Meters"]

# Seconds: a handler that stores takes milliseconds, and one is given up after minutes.
HANDLER: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
HANDLER += (1, 2.5, 5, 10, 30, 60, 300)
# Seconds from the provider's 250 to home's: a push session takes less than one, a machine that is
# off has its mail held for days.
HANDOVER: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600, 1800, 3600)
HANDOVER += (6 * 3600, 86400, 7 * 86400, 30 * 86400)

OTHER = "other"

Row = Mapping[str, Any]
#: What counts under these labels, which are bounded.
Labelled = Callable[..., Counter]


class Meters:
    """Counts what the hooks tell, and reads the rest of ``server`` when someone asks.

    ``accounts``  those that have a label of their own, at most.
    """

    def __init__(self, server: Server, accounts: int) -> None:
        self.registry = CollectorRegistry()
        self._named = _Named(accounts)
        self._before = threading.local()

        def counter(name: str, text: str, *labels: str) -> Labelled:
            # Looked up by prometheus_client once for the same labels: each delivery has three.
            return functools.cache(Counter(name, text, labels, registry=self.registry).labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self._collections = counter(
            "revsmtp_collections",
            "Collections that have ended, by agent and outcome.",
            "agent",
            "protocol",
            "outcome",
        )
        self._messages = counter(
            "revsmtp_messages",
            "Messages that were delivered to at least one recipient, by agent.",
            "agent",
        )
        self._octets = counter(
            "revsmtp_message_bytes",
            "Octets of the messages that were delivered, by agent.",
            "agent",
        )
        self._deliveries = counter(
            "revsmtp_deliveries",
            "Deliveries, one for each recipient, by agent and class of the reply.",
            "agent",
            "reply",
        )
        self._handler = histogram(
            "revsmtp_handler_seconds",
            "Seconds that handlers had a delivery, or the queue.",
            HANDLER,
        )
        self._held = counter(
            "revsmtp_held_messages_taken",
            "Messages that the provider has held, by account.",
            "account",
        )
        self._held_octets = counter(
            "revsmtp_held_bytes_taken",
            "Octets of the messages that the provider has held, by account.",
            "account",
        )
        self._handed_over = counter(
            "revsmtp_handed_over",
            "Recipients of which the customer has answered, by account, class of the reply, and "
            "way: held or live.",
            "account",
            "reply",
            "way",
        )
        self._handover = histogram(
            "revsmtp_handover_seconds",
            "Seconds from the provider's 250 to the customer's 250, of held messages.",
            HANDOVER,
        )
        self._expired = counter(
            "revsmtp_expired_messages",
            "Held messages that were given up after hold_days, by account.",
            "account",
        )
        self._full = counter(
            "revsmtp_quota_exceeded",
            "Times that a quota was used up, once an hour at most for each account.",
            "account",
        )
        self.registry.register(ProcessCollector(registry=None))
        self.registry.register(_Readings(server, self._named))

    def exposition(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type.  Blocks."""
        return generate_latest(self), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """The metrics, without a series more for each that says since when it counts: that is
        ``revsmtp_start_time_seconds`` for all."""
        for metric in self.registry.collect():
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric

    # -- hooks ----------------------------------------------------------------------------------

    @hookimpl
    def collection_finished(self, agent: Agent, report: Report) -> None:
        self._collections(report.agent, report.protocol, str(report.outcome)).inc()

    @hookimpl
    def message_delivered(
        self, agent: Agent | None, envelope: Envelope, reply: Reply, octets: int, seconds: float
    ) -> None:
        name = agent.name if agent is not None else ""
        self._deliveries(name, _class(reply)).inc()
        if seconds:
            self._handler.observe(seconds)
        # The recipients of a message come one after another, in one thread.
        if reply.positive and getattr(self._before, "envelope", None) is not envelope:
            self._before.envelope = envelope
            self._messages(name).inc()
            self._octets(name).inc(octets)

    @hookimpl
    def message_held(self, account: str, octets: int) -> None:
        label = self._named.label(account)
        self._held(label).inc()
        self._held_octets(label).inc(octets)

    @hookimpl
    def message_handed_over(self, account: str, reply: Reply, seconds: float | None) -> None:
        way = "live" if seconds is None else "held"
        self._handed_over(self._named.label(account), _class(reply), way).inc()
        if reply.positive and seconds is not None:
            self._handover.observe(seconds)

    @hookimpl
    def message_expired(self, account: str) -> None:
        self._expired(self._named.label(account)).inc()

    @hookimpl
    def quota_exceeded(self, account: str) -> None:
        self._full(self._named.label(account)).inc()


class _Named:
    """The accounts that have a label of their own: the first that are seen."""

    def __init__(self, most: int) -> None:
        self._most, self._names = most, set[str]()
        self._lock = threading.Lock()

    def label(self, account: str) -> str:
        if account in self._names:
            return account
        with self._lock:
            if len(self._names) >= self._most:
                return OTHER
            self._names.add(account)
        return account


class _Readings(Collector):
    """What there is now: read when someone asks, of what any plugin may ask the server."""

    def __init__(self, server: Server, named: _Named) -> None:
        self._server, self._named = server, named

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering it is no time to ask the server."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Of a server that does not answer there is only that: ``revsmtp_up 0``."""
        info = InfoMetricFamily("revsmtp_build", "What runs.")
        info.add_metric([], {"version": self._server.version})
        yield info
        yield _one("revsmtp_start_time_seconds", "When the server started.", self._server.started)
        try:
            rows, accounts = self._server.status(), self._accounts()
        except RuntimeError:
            yield _one("revsmtp_up", "Whether the server answers.", 0)
            return
        yield _one("revsmtp_up", "Whether the server answers.", 1)
        yield from _of_server(rows)
        yield from _of_agents([row for row in rows if row["status"] == "agent"])
        yield from _of_queues([row for row in rows if row["status"] == "queue"])
        yield from _of_services([row for row in rows if row["status"] == "service"])
        yield from _of_provider([row for row in rows if row["status"] == "provider"])
        yield from _of_accounts(accounts, self._named)

    def _accounts(self) -> Sequence[Row]:
        """None while they cannot be read, as without their database; all else is there then."""
        try:
            return self._server.accounts()
        except OSError:
            return ()


def _of_server(rows: Sequence[Row]) -> Iterator[Metric]:
    lag = GaugeMetricFamily(
        "revsmtp_event_loop_lag_seconds",
        "Seconds by which the event loop was late, the worst of the last half minute.",
    )
    troubles = GaugeMetricFamily(
        "revsmtp_troubles", "What needs a person, by kind.", labels=["kind"]
    )
    ends = GaugeMetricFamily(
        "revsmtp_certificate_end_timestamp_seconds",
        "When a certificate ends that is shown to who connects.",
        labels=["certificate"],
    )
    counts = dict.fromkeys(KINDS, 0)
    for row in rows:
        if row["status"] == "server":
            lag.add_metric([], row["lag"] or 0.0)
        elif row["status"] == "trouble":
            kind = row["trouble"].partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
        elif row["status"] == "certificate" and row["ends"]:
            ends.add_metric([row["certificate"]], _seconds(row["ends"]))
    for kind, number in counts.items():
        troubles.add_metric([kind], number)
    yield from (lag, troubles, ends)


#: The kinds of trouble: there is a number of each, so that an alert sees the end of one, too.
KINDS: tuple[str, ...] = ("account", "agent", "certificate", "disk", "hold", "queue", "server")
KINDS += ("undeliverable", "unsent")


def _of_agents(rows: Sequence[Row]) -> Iterator[Metric]:
    enabled = GaugeMetricFamily("revsmtp_agent_enabled", "Whether it is.", labels=["agent"])
    running = GaugeMetricFamily("revsmtp_agent_running", "It collects now.", labels=["agent"])
    failing = GaugeMetricFamily(
        "revsmtp_agent_failing", "Its last collection has failed.", labels=["agent"]
    )
    push = GaugeMetricFamily(
        "revsmtp_push_sessions", "Push sessions that are open, by agent.", labels=["agent"]
    )
    last = GaugeMetricFamily(
        "revsmtp_agent_last_collection_timestamp_seconds",
        "When its last collection ended.",
        labels=["agent"],
    )
    for row in rows:
        label = [row["agent"]]
        enabled.add_metric(label, bool(row["enabled"]))
        running.add_metric(label, bool(row["running"]))
        failing.add_metric(label, bool(row["failing_since"]))
        push.add_metric(label, bool(row["push"]))
        if row["ended"]:
            last.add_metric(label, _seconds(row["ended"]))
    yield from (enabled, running, failing, push, last)


def _of_queues(rows: Sequence[Row]) -> Iterator[Metric]:
    sizes = GaugeMetricFamily(
        "revsmtp_queue_messages", "Messages that wait on this host.", labels=["queue", "folder"]
    )
    oldest = GaugeMetricFamily(
        "revsmtp_queue_oldest_timestamp_seconds",
        "When the oldest of them came.",
        labels=["queue", "folder"],
    )
    for row in rows:
        label = [row["queue"], row["folder"]]
        sizes.add_metric(label, row["messages"])
        if row["oldest"]:
            oldest.add_metric(label, _seconds(row["oldest"]))
    yield from (sizes, oldest)


def _of_services(rows: Sequence[Row]) -> Iterator[Metric]:
    replies = CounterMetricFamily(
        "revsmtp_intake_replies",
        "Replies to messages, and to recipients that were refused, by service and code.",
        labels=["service", "code"],
    )
    octets = CounterMetricFamily(
        "revsmtp_intake_bytes", "Octets of the messages that a service took.", labels=["service"]
    )
    for row in rows:
        for code, number in row["replies"].items():
            replies.add_metric([row["service"], code], number)
        octets.add_metric([row["service"]], row["bytes"])
    yield from (replies, octets)


def _of_provider(rows: Sequence[Row]) -> Iterator[Metric]:
    sessions = GaugeMetricFamily(
        "revsmtp_provider_sessions", "Reversed sessions that customers have open."
    )
    online = GaugeMetricFamily("revsmtp_accounts_online", "Accounts that have one.")
    known = GaugeMetricFamily("revsmtp_accounts", "Accounts in the settings.")
    aside = GaugeMetricFamily("revsmtp_held_messages_aside", "Held messages that are set aside.")
    for row in rows:
        sessions.add_metric([], row["sessions"])
        online.add_metric([], row["online"])
        if row["accounts"] is not None:  # else they are not only in the settings
            known.add_metric([], row["accounts"])
        aside.add_metric([], row["aside"])
    yield from (sessions, online, known, aside)


def _of_accounts(rows: Iterable[Row], named: _Named) -> Iterator[Metric]:
    messages = GaugeMetricFamily(
        "revsmtp_held_messages", "Messages that are held, by account.", labels=["account"]
    )
    octets = GaugeMetricFamily("revsmtp_held_bytes", "Octets of them.", labels=["account"])
    oldest = GaugeMetricFamily(
        "revsmtp_held_oldest_timestamp_seconds", "When the oldest came.", labels=["account"]
    )
    failed = CounterMetricFamily(
        "revsmtp_failed_logins", "Failed logins, by account.", labels=["account"]
    )
    quota = GaugeMetricFamily(
        "revsmtp_held_quota_ratio",
        "The part of its quota that an account uses, of messages or of octets, whichever is more.",
        labels=["account"],
    )
    sums: dict[str, list[float]] = {}
    for row in rows:
        one = sums.setdefault(named.label(row["account"]), [0, 0, float("inf"), 0.0, 0])
        one[0] += row["messages"]
        one[1] += row["bytes"]
        one[2] = min(one[2], _seconds(row["oldest"]) if row["oldest"] else one[2])
        one[3] = max(
            one[3],
            row["messages"] / (row["quota_messages"] or float("inf")),
            row["bytes"] / (row["quota_bytes"] or float("inf")),
        )
        one[4] += row["failed_logins"] or 0
    for label, (number, size, since, ratio, logins) in sums.items():
        messages.add_metric([label], number)
        octets.add_metric([label], size)
        quota.add_metric([label], ratio)
        failed.add_metric([label], logins)
        if since != float("inf"):
            oldest.add_metric([label], since)
    yield from (messages, octets, oldest, quota, failed)


def _one(name: str, help_: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_, value=value)


def _class(reply: Reply) -> str:
    return f"{reply.code // 100}yz"


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
