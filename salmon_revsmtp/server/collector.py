"""What a process needs to run collections: services, the threads that deliver, plugins.

Handlers run in one delivery thread, because Salmon wants that: ``Router.RELOAD`` re-imports the
handlers at each delivery and loses routes when two threads do it, and ``MemoryStorage`` is not
thread safe.  Queue mode, which runs no handlers, has a thread of its own, and so have
notifications, for a relay may take its time.  The event loop never waits for any of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from types import TracebackType
from typing import Any

from salmon_revsmtp.customer import run
from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.batches import BatchWorker
from salmon_revsmtp.delivery.dispatcher import Delivery, Dispatcher, PendingDelivery
from salmon_revsmtp.delivery.dsn import Notifier
from salmon_revsmtp.delivery.outbox import Outbox
from salmon_revsmtp.delivery.queue import QueueDelivery
from salmon_revsmtp.delivery.router import RouterDelivery
from salmon_revsmtp.journal.collections import Entry, Journal
from salmon_revsmtp.journal.deliveries import DeliveryJournal

# The client is loaded now: at the first collection the process may have dropped its privileges, or
# another version may have been installed.
from salmon_revsmtp.net import client as client
from salmon_revsmtp.net.listener import Listener
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.configuration import Configuration
from salmon_revsmtp.service.listening import listener
from salmon_revsmtp.service.policy import Service

__all__ = ["Collector"]

# Seconds that a command waits at its end for the relay to take notifications; what it has not taken
# by then goes out another time.
RELAY_PATIENCE = 60.0


class Collector:
    """Runs collections of a configuration; a context manager that waits for its threads.

    ``relay``        asked for Salmon's relay when a notification has to go out.
    ``interrupted``  a signal has ended :meth:`collect`.
    """

    def __init__(
        self, configuration: Configuration, plugins: Plugins, relay: Callable[[], Any]
    ) -> None:
        self.configuration = configuration
        self._plugins = plugins
        self.journal = Journal()
        self._deliveries = DeliveryJournal()
        self._handling: BatchWorker[PendingDelivery] = BatchWorker("delivery")
        self._queueing: BatchWorker[PendingDelivery] = BatchWorker("queueing")
        self._outbox = Outbox(relay)
        self.interrupted = False

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(wait=True)

    def close(self, wait: bool) -> None:
        """Deliver no more; ``wait`` for what is under way."""
        for worker in (self._handling, self._queueing):
            worker.close(wait)
        if wait:
            self._outbox.wait(RELAY_PATIENCE)
            self._deliveries.close()

    def send_waiting(self) -> None:
        """Have the notifications that wait sent to the relay, in their thread."""
        self._outbox.send_soon()

    @cached_property
    def services(self) -> dict[str, Service]:
        """The inbound services by name."""
        return {
            name: Service(
                name, settings, self.configuration.written.get(name, ()), self._senders(name)
            )
            for name, settings in self.configuration.services.items()
        }

    def _senders(self, service: str) -> list[str]:
        """The hosts from which a service's agents have mail sent to it."""
        agents = self.configuration.agents
        return [host for one in agents if one.settings.service == service for host in one.senders]

    @cached_property
    def _dispatchers(self) -> dict[str, Dispatcher]:
        return {name: self._dispatcher(service) for name, service in self.services.items()}

    def _dispatcher(self, service: Service) -> Dispatcher:
        delivery: Delivery = RouterDelivery()
        worker = self._handling
        if service.settings.delivery == "queue":
            delivery, worker = QueueDelivery(service.settings.queue), self._queueing
        notifier = Notifier(lambda: service.hostname, self._outbox)
        return Dispatcher(
            service.name,
            delivery,
            self._deliveries,
            self._plugins,
            notifier,
            worker,
            spell=service.spell,
            handler_timeout=service.settings.handler_timeout,
            repeat_seconds=service.settings.repeat_seconds,
        )

    async def listeners(self) -> list[Listener]:
        """One for each service that has ``listen``; not started."""
        listening = [one for one in self.services.items() if one[1].settings.listen]
        for _, service in listening:
            await service.find_hostname()
        return [
            listener(
                service,
                service.recipient_policy(self.configuration.asked_for(name)),
                self._dispatchers[name],
            )
            for name, service in listening
        ]

    def collection(self, agent: Agent) -> Collection:
        """A new collection of an agent, to be run with ``customer.run.run``."""
        name = agent.settings.service
        return Collection(agent, self.services[name], self._dispatchers[name], self._plugins)

    def enabled(self, agent: Agent) -> bool:
        """What ``enable`` or ``disable`` said, else what the settings say.  Reads the journal."""
        kept = self.journal.state(agent.name).enabled
        return bool(agent.settings.enabled if kept is None else kept)

    async def run(self, agent: Agent, current: Collection) -> Report:
        """Run one collection, if its agent is enabled, and write it down."""
        started = time.time()
        if not await asyncio.to_thread(self.enabled, agent):
            current.report.outcome = Outcome.DISABLED
            return current.report
        report = await run.run(agent, current)
        if report.outcome is not Outcome.BUSY:
            good = report.outcome.good
            await asyncio.to_thread(self.journal.record, _entry(report, started), good)
        return report

    async def collect(
        self,
        agents: Iterable[Agent],
        watch: Callable[[Collection], None] = lambda collection: None,
        done: Callable[[Report], None] = lambda report: None,
        signals: Iterable[int] = (),
    ) -> list[Report]:
        """Collect from several agents at the same time; returns their reports in order.

        ``watch`` gets each collection before it runs, ``done`` each report as it comes.  One of the
        ``signals`` ends each collection at its next message boundary; the second one does what it
        does elsewhere.  :attr:`interrupted` says whether one came.
        """
        running: dict[asyncio.Task[Report], Collection] = {}

        async def one(agent: Agent) -> Report:
            current = self.collection(agent)
            watch(current)
            task = asyncio.ensure_future(self.run(agent, current))
            running[task] = current
            try:
                report = await task
            except asyncio.CancelledError:
                if not self.interrupted:
                    task.cancel()
                    raise
                report = current.report
            done(report)
            return report

        def stop() -> None:
            self.interrupted = True
            hear_no_more()
            for task, current in running.items():
                if not current.stop():
                    task.cancel()

        def hear_no_more() -> None:
            for number in signals:
                loop.remove_signal_handler(number)

        loop, signals = asyncio.get_running_loop(), tuple(signals)
        for number in signals:
            loop.add_signal_handler(number, stop)
        try:
            reports = list(await asyncio.gather(*(one(agent) for agent in agents)))
        finally:
            hear_no_more()
        self.send_waiting()
        return reports


def _entry(report: Report, started: float) -> Entry:
    return Entry(
        report.agent,
        report.protocol,
        started,
        started + report.seconds,
        report.outcome.value,
        report.messages,
        report.recipients,
        report.bytes,
        report.refused,
        report.sessions,
        report.tls,
        report.auth,
        report.error,
    )
