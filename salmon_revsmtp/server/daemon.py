"""The server: listeners, the schedule and the control socket on one event loop.

``salmon-revsmtp run`` has it in the foreground, ``attach`` in a thread beside Salmon's receiver.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.customer.schedule import Schedule
from salmon_revsmtp.foreign import shortened
from salmon_revsmtp.net.listener import Listener
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.connection import Connection
from salmon_revsmtp.provider.expiry import CHECK_EVERY
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.server.collector import GRACE, Collector
from salmon_revsmtp.server.control import SOCKET, Answers, Control
from salmon_revsmtp.server.holding import Holder, provide
from salmon_revsmtp.server.provider_requests import ProviderRequests
from salmon_revsmtp.smtp.replies import without_surrogates

__all__ = ["Daemon"]

log = logging.getLogger(__name__)

# The schedule is looked at this often at least: a machine that slept is noticed that soon.
TICK = 15.0
# And no oftener than this, however near the next time is.
BLINK = 0.01
# Seconds until notifications that the relay did not take are tried again.
NOTIFY_EVERY = 300.0
# Seconds between two lines of progress to who asked for a collection.
PROGRESS = 0.2


def awake_or_asleep() -> float:
    """Seconds since boot, on a clock that no one sets and that counts a suspended machine's sleep,
    too, where the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Daemon:
    """Runs until it is stopped.

    ``grace``      seconds for the messages in hand when it stops.
    ``listeners``  those of the services, once they listen.
    ``provider``   what customers call, if the settings have one.
    """

    def __init__(
        self,
        collector: Collector,
        plugins: Plugins,
        grace: float = GRACE,
        clock: Callable[[], float] = awake_or_asleep,
    ) -> None:
        self._collector = collector
        self._plugins = plugins
        self._grace = grace
        self._clock = clock
        self._agents = {agent.name: agent for agent in collector.configuration.agents}
        self._running: dict[str, tuple[Collection, asyncio.Task[Report]]] = {}
        self._scheduled: set[asyncio.Task[None]] = set()
        self._held: dict[str, str] = {}
        self._failing: dict[str, float] = {}
        self._notify_at = self._expire_at = clock()
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        self.listeners: list[Listener] = []
        self.provider: Provider | None = None
        self._control = Control(self._answer, collector.project / SOCKET)
        self._schedule = Schedule(
            {
                name: agent.settings.every * 60
                for name, agent in self._agents.items()
                if agent.settings.every is not None
            },
            clock(),
            lambda wait: wait * random.uniform(0.8, 1.2),
        )

    @property
    def sessions(self) -> list[Connection]:
        """The customers' reversed sessions that are open."""
        return self.provider.sessions if self.provider is not None else []

    def stop(self) -> None:
        """End :meth:`run` at the next message boundary."""
        self._stop.set()
        self._wake.set()

    async def run(self, started: Callable[[], None] = lambda: None) -> None:
        """Listen, collect on schedule and answer the control socket, until :meth:`stop`.

        ``started`` is called when everything listens.  Raises :class:`OSError` when an address or
        the hold store cannot be had.
        """
        try:
            if self._collector.configuration.holds:
                await asyncio.to_thread(provide, self._collector.providing)
            for listener in await self._collector.listeners():
                await listener.start()
                self.listeners.append(listener)
            self.provider = await asyncio.to_thread(self._collector.providing.provider)
            if self.provider is not None:
                await self.provider.start()
            await self._control.start()
            await self._recall()
            started()
            while not self._stop.is_set():
                self._start_due()
                self._send_waiting()
                await self._end_disabled()
                self._give_up_old_mail()
                await self._sleep()
        finally:
            await self._shut_down()

    # -- the schedule ---------------------------------------------------------------------------

    async def _recall(self) -> None:
        """Who was failing when the last process ended: its recovery is news."""
        for name in self._agents:
            state = await self._collector.state(name)
            if state.failing_since is not None:
                self._failing[name] = state.failing_since

    def _start_due(self) -> None:
        while name := self._schedule.due(self._clock()):
            self._spawn(self._on_schedule(self._agents[name]))

    def _send_waiting(self) -> None:
        if self._clock() >= self._notify_at:
            self._notify_at = self._clock() + NOTIFY_EVERY
            try:
                self._collector.send_waiting()
            except Exception:
                log_safely(log, logging.ERROR, "notifications were not sent", error=True)

    async def _end_disabled(self) -> None:
        """Close the push sessions of agents that someone has disabled since."""
        for name, collection in self._pushing():
            if not await self._collector.enabled(self._agents[name]):
                log.info("agent=%s it is disabled, its push session ends", name)
                collection.stop()

    def _give_up_old_mail(self) -> None:
        """At a provider, and who has not called for long."""
        if self._collector.configuration.holds and self._clock() >= self._expire_at:
            self._expire_at = self._clock() + CHECK_EVERY
            check = asyncio.to_thread(self._collector.providing.expiry.check)
            self._spawn(check)
            if self.provider is not None:
                self.provider.name_the_unseen()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._scheduled.add(task)
        task.add_done_callback(self._scheduled.discard)

    def _pushing(self) -> list[tuple[str, Collection]]:
        """Agents with a push session that is open."""
        return [(name, one) for name, (one, _) in self._running.items() if one.pushing]

    async def _sleep(self) -> None:
        self._wake.clear()
        if self._stop.is_set():
            return
        until = self._schedule.next_time()
        seconds = TICK if until is None else min(TICK, max(BLINK, until - self._clock()))
        with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    async def _on_schedule(self, agent: Agent) -> None:
        may_run, good, collection, began = True, False, None, self._clock()
        try:
            may_run = await self._may_run(agent)
            if may_run:
                collection = self._collector.collection(agent)
                collection.may_push = True
                good = (await self._collect(agent, collection)).outcome.good
        except Exception as error:
            # Our own bug, or no thread to be had; the next run comes all the same.
            log_safely(log, logging.ERROR, "agent=%s the collection broke", agent.name, error=True)
            self._note(_broken(agent, error))
        finally:
            if collection is not None and collection.push_since is not None:
                self._schedule.dropped(agent.name, self._clock() - began, self._clock())
            elif may_run:
                self._schedule.finished(agent.name, good, self._clock())
            else:
                self._schedule.defer(agent.name, self._clock())
            self._wake.set()

    async def _may_run(self, agent: Agent) -> bool:
        if not await self._collector.enabled(agent):
            return False
        reason = await self._plugins.call_apart("may_collect", agent)
        if reason and self._held.get(agent.name) != reason:
            log_safely(log, logging.INFO, "agent=%s held back: %s", agent.name, reason)
        if not reason and self._held.get(agent.name):
            log.info("agent=%s is not held back any more", agent.name)
        self._held[agent.name] = reason or ""
        return not reason

    # -- collections ----------------------------------------------------------------------------

    async def _collect(self, agent: Agent, collection: Collection | None = None) -> Report:
        """Run an agent now; ``busy`` if it is running."""
        if running := self._running.get(agent.name):
            if running[0].pushing:
                return running[0].so_far()
            return Report(agent.name, agent.protocol, Outcome.BUSY, error="it is running already")
        if collection is None:
            collection = self._collector.collection(agent)
        task = asyncio.get_running_loop().create_task(self._collector.run(agent, collection))
        self._running[agent.name] = (collection, task)
        try:
            report = await task
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise
            report = collection.report
        finally:
            del self._running[agent.name]
        self._note(report)
        return report

    def _note(self, report: Report) -> None:
        """One line when an agent begins to fail and one when it recovers, not one a try."""
        if report.outcome in (Outcome.BUSY, Outcome.DISABLED):
            return
        since = self._failing.get(report.agent)
        if report.outcome.good and since is not None:
            del self._failing[report.agent]
            minutes = (time.time() - since) / 60
            log.warning("agent=%s recovered after %.0f minutes", report.agent, minutes)
        elif not (report.outcome.good or since is not None or self._stop.is_set()):
            self._failing[report.agent] = time.time()
            reason = f"{report.outcome}: {report.error}"
            log_safely(log, logging.WARNING, "agent=%s fails: %s", report.agent, reason)

    # -- the control socket ---------------------------------------------------------------------

    async def _answer(self, request: dict[str, Any]) -> Answers:
        if request.get("do") == "state":
            ahead = time.time() - self._clock()
            times = {name: self._schedule.next_run(name) for name in self._agents}
            yield {
                "next": {name: at + ahead for name, at in times.items() if at is not None},
                "push": {name: one.push_since for name, one in self._pushing()},
            }
        elif request.get("do") == "hold" and self._collector.configuration.holds:
            yield await asyncio.to_thread(Holder(self._collector.providing).take, request)
        elif str(request.get("do")).startswith("provider ") and self._collector.configuration.holds:
            requests = ProviderRequests(self._collector.providing, self.provider)
            async for answer in requests.answer(request):
                yield answer
        elif request.get("do") == "collect":
            async for answer in self._answer_collect(request.get("agents", [])):
                yield answer
        else:
            yield {"error": "no such request"}

    async def _answer_collect(self, names: list[str]) -> Answers:
        unknown = [name for name in names if name not in self._agents]
        for name in unknown:
            yield {"error": f"the running server has no agent {name!r}; restart it"}
        agents = {
            asyncio.get_running_loop().create_task(self._collect(self._agents[name])): agent
            for name, agent in self._agents.items()
            if name in names
        }
        tasks = set(agents)
        while tasks:
            done, tasks = await asyncio.wait(
                tasks, timeout=PROGRESS, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                yield {"report": _report(agents[task], task).as_dict()}
            for name in names:
                if running := self._running.get(name):
                    yield _progress(name, running[0])
        yield {"end": True}

    # -- the end ----------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """Everything at once, and nothing longer than the grace."""
        for collection, task in self._running.values():
            if not collection.stop():
                task.cancel()
        ending: list[asyncio.Future[Any]] = [task for _, task in self._running.values()]
        ending += [asyncio.ensure_future(one.stop(self._grace)) for one in self.listeners]
        if self._collector.configuration.holds:
            ending.append(asyncio.ensure_future(self._collector.providing.stop(self._grace)))
        if self.provider is not None:
            ending.append(asyncio.ensure_future(self.provider.stop(self._grace)))
        if ending:
            _, late = await asyncio.wait(ending, timeout=self._grace)
            for one in late:
                one.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for waiting in self._scheduled:
            waiting.cancel()
        await asyncio.gather(*self._scheduled, return_exceptions=True)
        await self._control.stop()
        provide(None)
        leaving = asyncio.ensure_future(asyncio.to_thread(self._collector.providing.leave_store))
        await asyncio.wait([leaving], timeout=self._grace)
        log.info("stopped")


def _progress(name: str, collection: Collection) -> dict[str, Any]:
    doing, seconds = collection.doing
    return {
        "agent": name,
        "messages": collection.tally.messages,
        "bytes": collection.tally.bytes,
        "doing": doing,
        "seconds": round(seconds, 1),
    }


def _report(agent: Agent, task: asyncio.Task[Report]) -> Report:
    """What a collection that has ended reports; also one that broke."""
    error = task.exception()
    return task.result() if error is None else _broken(agent, error)


def _broken(agent: Agent, error: BaseException) -> Report:
    """The report of a collection that broke before it could make one."""
    text = shortened(without_surrogates(f"{type(error).__name__}: {error}"))
    return Report(agent.name, agent.protocol, Outcome.FAILED, error=text)
