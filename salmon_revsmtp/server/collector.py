"""What a process needs to run collections: services, the threads that deliver, plugins.

Handlers run one at a time by default, because Salmon wants that: ``Router.RELOAD`` re-imports the
handlers at each delivery and loses routes when two threads do it, and ``MemoryStorage`` is not
thread safe.  So there is one delivery thread, and one for queue mode, which runs no handlers.  A
service with ``delivery_threads`` has as many of its own (``delivery.turns`` says when they are of
no use).  A plugin's hooks for messages may block as long as they like; where there are any, each
agent and each listening service has delivery threads of its own, and these take turns at the
handlers.  Notifications have a thread, for a relay may take its time, the journal has some, and so
has each hook of a collection.  The event loop never waits for any of them.

Every path is absolute from the start, for a handler may change the folder of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from salmon_revsmtp.customer import run
from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.locks import AgentLocks
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.batches import BatchWorker
from salmon_revsmtp.delivery.dispatcher import (
    Deliverer,
    Delivery,
    Dispatcher,
    PendingDelivery,
    SharedWork,
)
from salmon_revsmtp.delivery.notifier import Notifier
from salmon_revsmtp.delivery.outbox import UNSENT, Outbox
from salmon_revsmtp.delivery.queue import QueueDelivery
from salmon_revsmtp.delivery.rates import RateLimit
from salmon_revsmtp.delivery.reporter import Reporter
from salmon_revsmtp.delivery.retry import Retry
from salmon_revsmtp.delivery.router import (
    DEFAULT_UNDELIVERABLE,
    RouterDelivery,
    undeliverable_queue,
)
from salmon_revsmtp.delivery.turns import Turns
from salmon_revsmtp.journal.claims import CLAIMS, Claims, SharedClaims
from salmon_revsmtp.journal.collections import AgentState, Entry, Journal
from salmon_revsmtp.journal.connection import JournalConnection
from salmon_revsmtp.journal.counts import CountJournal
from salmon_revsmtp.journal.deliveries import DeliveryJournal
from salmon_revsmtp.journal.file import DEFAULT_JOURNAL

# The client is loaded now: at the first collection the process may have dropped its privileges, or
# another version may have been installed.
from salmon_revsmtp.net import client as client
from salmon_revsmtp.net.listener import Listener
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.intake import Intake
from salmon_revsmtp.server.configuration import Configuration
from salmon_revsmtp.server.failing import Failing
from salmon_revsmtp.server.providing import Providing
from salmon_revsmtp.service.listening import listeners
from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.recipients import (
    MOST_THREADS,
    Decider,
    PluginsDecide,
    Recipients,
    RoutesDecide,
)
from salmon_revsmtp.service.session import AnswerEtrn
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.threads import Threads

__all__ = ["GRACE", "Collector"]

# Seconds that a stop waits for the messages in hand.
GRACE = 10.0

# Where the agents' locks are.
LOCKS = "run"

# Threads for the record of collections.  Each waits for a journal that another process holds.
JOURNAL_THREADS = 4

# Seconds that a command waits at its end for the relay to take notifications; what it has not taken
# by then goes out another time.
RELAY_PATIENCE = 60.0


class _Signalled(Exception):
    """A signal has come while handlers were waited for."""


class Collector:
    """Runs collections of a configuration; a context manager that waits for its threads.

    ``relay``        asked for Salmon's relay when a notification has to go out.
    ``project``      the folder that relative paths are below; the current one by default.
    """

    def __init__(
        self,
        configuration: Configuration,
        plugins: Plugins,
        relay: Callable[[], Any],
        project: Path | None = None,
    ) -> None:
        self.configuration = configuration
        self.project = project or Path.cwd()
        self._plugins = plugins
        self._locks = AgentLocks(self.project / LOCKS)
        self.journal = Journal(self.project / DEFAULT_JOURNAL)
        self._records = Threads("journal", JOURNAL_THREADS)
        self.failing = Failing()
        self._deliveries = DeliveryJournal(JournalConnection(self.project / DEFAULT_JOURNAL))
        self._dispatchers: dict[tuple[str, str | None], Dispatcher] = {}
        self._workers: dict[tuple[str, str | None], BatchWorker[PendingDelivery]] = {}
        self._intakes: dict[str, Intake] = {}
        self._deciding: dict[tuple[str, str | None], Threads] = {}
        # Which deliveries of a mode may be made at the same time, where services have one thread,
        # and of a service where it has several.
        self._turns: dict[tuple[str, str | None], AbstractContextManager[object]] = {}
        self._one_at_a_time = {"router": threading.Lock(), "queue": threading.Lock()}
        self._shared: dict[str, SharedWork] = {}
        # Of all handlers, if some of them may run at the same time.
        several = [one for one in configuration.services.values() if one.delivery_threads > 1]
        self._beside = Turns() if any(one.delivery == "router" for one in several) else None
        self._outbox = Outbox(relay, self.project / UNSENT)
        self._counts = CountJournal(JournalConnection(self.project / DEFAULT_JOURNAL))
        self._rates = RateLimit(self._counts)
        self.providing = Providing(configuration, plugins, self._outbox, self._rates, self.project)
        self._signals: tuple[int, ...] = ()
        self._interrupted_at: float | None = None
        with contextlib.suppress(OSError):  # it is tried again with each message
            undeliverable_queue(self.project / DEFAULT_UNDELIVERABLE)

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        self.wait()

    def close(self) -> None:
        """Deliver no more than what is under way."""
        for worker in self._workers.values():
            worker.close()
        for shared in self._shared.values():
            shared.in_hand.close()
        for threads in self._deciding.values():
            threads.close()
        self.providing.close()

    def wait(self) -> None:
        """Wait for what is under way: for handlers however long they take, or, once one of the
        signals of :meth:`collect` has come, for what is left of :data:`GRACE` seconds."""
        if not self.interrupted:
            with contextlib.suppress(_Signalled), self._hearing():
                for worker in self._workers.values():
                    worker.wait()
                self.providing.wait()
                self._outbox.wait(RELAY_PATIENCE)
        if self.interrupted:
            for worker in self._workers.values():
                worker.wait(self._left())
            self.providing.wait(self._left())
            self._outbox.wait(self._left())
        self.providing.close_store()
        self._deliveries.close()
        self._counts.close()
        Claims(self.project / CLAIMS).close()

    @property
    def interrupted(self) -> bool:
        """A signal has ended :meth:`collect`, or the wait after it."""
        return self._interrupted_at is not None

    def _left(self) -> float:
        """Seconds of the grace."""
        return max(0.0, (self._interrupted_at or 0.0) + GRACE - time.monotonic())

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        """While this lasts, a signal is raised as :class:`_Signalled`; the second one does what it
        does elsewhere."""

        def hear(number: int, frame: object) -> None:
            self._interrupted_at = time.monotonic()
            raise _Signalled

        before = {number: signal.signal(number, hear) for number in self._signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def outbox(self) -> Outbox:
        """Where notifications wait for the relay."""
        return self._outbox

    @cached_property
    def retry(self) -> Retry:
        """What takes undeliverable mail through the handlers again."""
        again = Retry(self.project, self._deliveries, self._outbox, self._one_at_a_time["router"])
        if self._beside is not None:
            again.beside = self._beside.within(again.beside)
        return again

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

    def _deliverer(self, name: str, agent: str | None) -> Deliverer:
        """What takes the messages of a service, for an agent or for what comes to its listening
        socket."""
        if self.services[name].settings.delivery == "hold":
            return self._intake(name)
        return self._dispatcher(name, agent)

    def _senders(self, service: str) -> list[str]:
        """The hosts from which a service's agents have mail sent to it."""
        agents = self.configuration.agents
        return [host for one in agents if one.settings.service == service for host in one.senders]

    def _intake(self, name: str) -> Intake:
        if name not in self._intakes:
            self._intakes[name] = self.providing.intake(self.services[name])
        return self._intakes[name]

    def _dispatcher(self, name: str, agent: str | None) -> Dispatcher:
        """That of a service, for an agent or for what comes to its listening socket."""
        hooks = ("message_received", "message_delivered")
        lane = name if self.services[name].settings.delivery_threads > 1 else None
        if any(map(self._plugins.implemented, hooks)):
            lane = f"{name} {agent or ''}"
        if (name, lane) not in self._dispatchers:
            self._dispatchers[name, lane] = self._new_dispatcher(self.services[name], lane)
        return self._dispatchers[name, lane]

    def _new_dispatcher(self, service: Service, lane: str | None) -> Dispatcher:
        mode, threads = service.settings.delivery, service.settings.delivery_threads
        worker = self._workers.setdefault(
            (mode, lane), BatchWorker(f"{mode} {lane or 'all'}", threads)
        )
        claims: Claims | SharedWork = Claims(self.project / CLAIMS)
        if threads > 1:
            shared = SharedWork(SharedClaims(self.project / CLAIMS))
            claims = self._shared.setdefault(service.name, shared)
        delivery: Delivery = RouterDelivery(self.project)
        if mode == "queue":
            delivery = QueueDelivery(service.settings.queue, self.project)
        told = service.settings.notifications
        reporter = Reporter(lambda: service.hostname, self._rates, enabled=told)
        return Dispatcher(
            service.name,
            delivery,
            self._deliveries,
            claims,
            self._plugins,
            Notifier(reporter, self._outbox),
            worker,
            turn=self._turn(service),
            spell=service.spell,
            handler_timeout=service.settings.handler_timeout,
            repeat_seconds=service.settings.repeat_seconds,
            share=self._locks.share,
        )

    def _turn(self, service: Service) -> AbstractContextManager[object]:
        """What is held while a message of a service is handed over."""
        mode, threads = service.settings.delivery, service.settings.delivery_threads
        which = (mode, service.name if threads > 1 else None)
        if which not in self._turns:
            turn: AbstractContextManager[object] = threading.Semaphore(threads)
            if threads == 1:
                turn = self._one_at_a_time[mode]
            if mode == "router" and self._beside is not None:
                turn = self._beside.within(turn)
                if threads > 1:
                    self._beside.say(threads)
            self._turns[which] = turn
        return self._turns[which]

    async def listeners(self) -> list[Listener]:
        """One for each service that has ``listen``; not started."""
        listening = [one for one in self.services.items() if one[1].settings.listen]
        for _, service in listening:
            await service.find_hostname()
        return [
            one
            for name, service in listening
            for one in listeners(
                service,
                self._recipients(name, self._policy(name)),
                self._deliverer(name, None),
                etrn=self._etrn(service),
            )
        ]

    def _etrn(self, service: Service) -> AnswerEtrn | None:
        """What answers ETRN on a listening service."""
        if service.settings.delivery != "hold":
            return None
        etrn = self.providing.etrn
        return lambda name: etrn.answer(name, service.hostname)

    def _policy(self, name: str) -> Callable[[str], Reply | None]:
        """Accepts or refuses the recipients of a listening service."""
        service = self.services[name]
        if service.settings.delivery != "hold":
            return service.recipient_policy(self.configuration.asked_for(name))
        intake = self._intake(name)
        if not service.settings.domains:
            return intake.policy
        ours = service.recipient_policy(())
        return lambda mailbox: ours(mailbox) or intake.policy(mailbox)

    def _recipients(
        self, name: str, policy: Callable[[str], Reply | None], agent: Agent | None = None
    ) -> Recipients:
        """Whom a service accepts of those whom ``policy`` accepts, for an agent or for what comes
        to its listening socket."""
        lane = (name, agent.name if agent is not None else None)
        threads = self._deciding.setdefault(lane, Threads("recipients", MOST_THREADS))
        service = self.services[name]
        deciders: list[Decider] = [PluginsDecide(self._plugins, agent, service.spell, threads)]
        if service.settings.unknown_recipients == "refuse":
            deciders.insert(0, RoutesDecide(service.spell, threads))
        if service.settings.delivery == "hold":
            deciders.append(self.providing.live)
            if self.providing.accounts.lookups is not None:
                deciders.insert(0, self._intake(name))
        return Recipients(policy, *deciders)

    def collection(self, agent: Agent) -> Collection:
        """A new collection of an agent, to be run with ``customer.run.run``."""
        name = agent.settings.service
        service, deliverer = self.services[name], self._deliverer(name, agent.name)
        recipients = self._recipients(name, service.recipient_policy(agent.domains), agent)
        return Collection(agent, service, deliverer, self._plugins, recipients)

    async def state(self, agent: str) -> AgentState:
        """What the journal keeps of an agent."""
        return await self._records.call(self.journal.state, agent)

    async def recovered(self, agent: str) -> None:
        """Note, and say, that an agent does not fail any more, although its collection goes on."""
        self.failing.recovered(agent)
        await self._records.call(self.journal.recovered, agent)

    async def enabled(self, agent: Agent) -> bool:
        """What ``enable`` or ``disable`` said, else what the settings say."""
        kept = (await self.state(agent.name)).enabled
        return bool(agent.settings.enabled if kept is None else kept)

    async def run(self, agent: Agent, current: Collection) -> Report:
        """Run one collection, if its agent is enabled, and write it down, also if it is
        cancelled."""
        started = time.time()
        if not await self.enabled(agent):
            current.report.outcome = Outcome.DISABLED
            return current.report
        try:
            report = await run.run(agent, current, self._locks)
        except asyncio.CancelledError:
            report = current.report
            ended = report.outcome.good  # and only plugins were still being told
            if not ended:
                report.error = report.error or run.INTERRUPTED
            await self._write_down(report, started, interrupted=not ended)
            raise
        if report.outcome is not Outcome.BUSY:
            interrupted = current.stopping and not report.outcome.good
            await self._write_down(report, started, interrupted)
        return report

    async def _write_down(self, report: Report, started: float, interrupted: bool) -> None:
        """In the journal; and if its agent begins to fail, or recovers, in the log."""
        good, before = None if interrupted else report.outcome.good, None
        try:
            before = await self._records.call(self.journal.record, _entry(report, started), good)
        finally:  # a stop does not wait for the journal, which is written all the same
            if not interrupted:
                self.failing.note(report, before)

    async def collect(
        self,
        agents: Iterable[Agent],
        watch: Callable[[Collection], None] = lambda collection: None,
        done: Callable[[Report], None] = lambda report: None,
        signals: Iterable[int] = (),
    ) -> list[Report]:
        """Collect from several agents at the same time; returns their reports in order.

        ``watch`` gets each collection before it runs, ``done`` each report as it comes.  One of the
        ``signals`` ends each collection at its next message boundary, but after :data:`GRACE`
        seconds in any case; the second one does what it does elsewhere.
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
            self._interrupted_at = time.monotonic()
            hear_no_more()
            for task, current in running.items():
                if not current.stop():
                    task.cancel()
            loop.call_later(GRACE, break_off)

        def break_off() -> None:
            for task in running:
                task.cancel()

        def hear_no_more() -> None:
            for number in signals:
                loop.remove_signal_handler(number)

        loop = asyncio.get_running_loop()
        signals = self._signals = tuple(signals)
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
