"""The server: listeners, the schedule and the control socket on one event loop.

``salmon-revsmtp run`` has it in the foreground, ``attach`` in a thread beside Salmon's receiver.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import os
import random
import sqlite3
import time
from collections.abc import Callable, Coroutine, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from salmon_revsmtp.customer.agent import Agent
from salmon_revsmtp.customer.collection import Collection
from salmon_revsmtp.customer.report import Report, iso
from salmon_revsmtp.customer.schedule import VARIED, Schedule
from salmon_revsmtp.delivery.sample import sample_warning
from salmon_revsmtp.foreign import shortened
from salmon_revsmtp.net.listener import Listener
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.net.trace import Hearer, hearing
from salmon_revsmtp.plugins.facade import Server
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider.connection import Connection
from salmon_revsmtp.provider.expiry import CHECK_EVERY
from salmon_revsmtp.provider.server import Provider
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.server.collector import GRACE, Collector
from salmon_revsmtp.server.control import SOCKET, Answers, Control
from salmon_revsmtp.server.health import Deferring, Findings, Health, Holding, Live
from salmon_revsmtp.server.holding import Holder, provide
from salmon_revsmtp.server.overheard import Overheard
from salmon_revsmtp.server.provider_requests import ProviderRequests
from salmon_revsmtp.server.waiting_requests import WaitingRequests
from salmon_revsmtp.smtp.replies import without_surrogates

__all__ = ["Daemon", "Planned"]

log = logging.getLogger(__name__)

# The schedule is looked at this often at least: a machine that slept is noticed that soon.
TICK = 15.0
# And no oftener than this, however near the next time is.
BLINK = 0.01
# Seconds until notifications that the relay did not take are tried again.
NOTIFY_EVERY = 300.0
# Seconds between two looks at what needs a person.
LOOK_EVERY = 60.0
# Seconds that a plugin waits for one.
LOOK_PATIENCE = 60.0
# Seconds between two lines of progress to who asked for a collection.
PROGRESS = 0.2


def awake_or_asleep() -> float:
    """Seconds since boot, on a clock that no one sets and that counts a suspended machine's sleep,
    too, where the system has one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@functools.cache
def version() -> str:
    """Of salmon-revsmtp."""
    try:
        return metadata.version("salmon-revsmtp")
    except metadata.PackageNotFoundError:
        return "unknown"


class Planned(NamedTuple):
    """What becomes of an agent when the server starts.  ``seconds``: until it runs first; ``None``:
    only when it is asked for."""

    agent: Agent
    enabled: bool
    seconds: float | None


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
        self._scheduled: set[asyncio.Task[Any]] = set()
        self._held: dict[str, str] = {}
        self._disabled: set[str] = set()
        self._notify_at = self._expire_at = self._look_at = clock()
        self._started = time.time()
        self._looking, self._blind = asyncio.Lock(), False
        self._look: asyncio.Task[Findings] | None = None
        self._health = Health(collector.configuration, collector.project, memory=True)
        self._facade: Server | None = None
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()
        self.listeners: list[Listener] = []
        self.provider: Provider | None = None
        self._waiting = WaitingRequests(collector)
        self._control = Control(self._answer, collector.project / SOCKET)
        self._schedule = Schedule(
            {
                name: agent.settings.every * 60
                for name, agent in self._agents.items()
                if agent.settings.every is not None
            },
            clock(),
            lambda wait: wait * random.uniform(*VARIED),
        )

    @property
    def sessions(self) -> list[Connection]:
        """The customers' reversed sessions that are open."""
        return self.provider.sessions if self.provider is not None else []

    def plan(self) -> list[Planned]:
        """What becomes of each agent, as it is known when the server starts."""
        now, plan = self._clock(), []
        for name, agent in self._agents.items():
            at = self._schedule.next_run(name)
            seconds = None if at is None else at - now
            plan.append(Planned(agent, name not in self._disabled, seconds))
        return plan

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
            self._control.be_alone()
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
            self._tell_plugins()
            while not self._stop.is_set():
                self._start_due()
                self._send_waiting()
                await self._end_disabled()
                await self._note_sessions()
                self._give_up_old_mail()
                self._look_after()
                await self._sleep()
        finally:
            await self._shut_down()

    # -- the schedule ---------------------------------------------------------------------------

    async def _recall(self) -> None:
        """Who was failing when the last process ended, for its recovery is news; and who is
        disabled."""
        for name, agent in self._agents.items():
            state = await self._collector.state(name)
            if not (agent.settings.enabled if state.enabled is None else state.enabled):
                self._disabled.add(name)
            if state.failing_since is not None:
                self._collector.failing.recall(name, state.failing_since)

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

    async def _note_sessions(self) -> None:
        """Who has a push session works again, although its collection may go on for weeks."""
        for name, _ in self._pushing():
            if name in self._collector.failing.since:
                await self._collector.recovered(name)

    def _give_up_old_mail(self) -> None:
        """At a provider, and who has not called for long."""
        if self._collector.configuration.holds and self._clock() >= self._expire_at:
            self._expire_at = self._clock() + CHECK_EVERY
            check = asyncio.to_thread(self._collector.providing.expiry.check)
            self._spawn(check)
            if self.provider is not None:
                self.provider.name_the_unseen()

    # -- what needs a person --------------------------------------------------------------------

    def _tell_plugins(self) -> None:
        """Have the plugins hear that the server runs."""
        loop = asyncio.get_running_loop()

        def look() -> Findings:
            looking = self._look_together()
            try:
                asked = asyncio.run_coroutine_threadsafe(looking, loop)
                return asked.result(LOOK_PATIENCE)
            except (RuntimeError, concurrent.futures.CancelledError) as error:
                looking.close()
                raise RuntimeError("the server has stopped") from error
            except concurrent.futures.TimeoutError:
                asked.cancel()  # the look goes on; no one waits for it without end
                raise RuntimeError(f"no answer in {LOOK_PATIENCE:g} seconds") from None

        def send(to: str, message: bytes) -> None:
            self._collector.outbox.put(to, message)
            self._collector.outbox.send_soon()

        module = self._collector.configuration.module or ModuleType("settings")
        place = self._collector.project
        self._facade = Server(module, place, version(), self._started, look=look, send=send)
        self._spawn(self._plugins.call_each_apart("server_started", server=self._facade))

    def _look_after(self) -> None:
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + LOOK_EVERY
            if self._look is None or self._look.done():  # a disk may answer no more
                self._spawn(self._look_and_remember())

    async def _look_and_remember(self) -> None:
        try:
            await self._look_together()
            self._blind = False
        except Exception:
            level = logging.DEBUG if self._blind else logging.ERROR
            self._blind = True  # one line tells of all that follow
            log_safely(log, level, "looking for what needs a person", error=True)

    async def look(self) -> Findings:
        """What there is, and what needs a person."""
        async with self._looking:
            live = await self._live()
            return await asyncio.to_thread(self._health.look, live)

    async def _look_together(self) -> Findings:
        """The same; who asks while one looks has what that one finds."""
        if self._look is None or self._look.done():
            self._look = asyncio.ensure_future(self.look())
            self._scheduled.add(self._look)
            self._look.add_done_callback(self._scheduled.discard)
        return await asyncio.shield(self._look)

    async def _live(self) -> Live:
        ahead = time.time() - self._clock()
        times = {name: self._schedule.next_run(name) for name in self._agents}
        held: Mapping[str, Holding] = {}
        hold_error = ""
        if self._collector.configuration.holds:
            requests = ProviderRequests(self._collector.providing, self.provider)
            try:
                held = await requests.holdings()
            except (OSError, sqlite3.Error) as error:
                hold_error = str(error)
        return Live(
            os.getpid(),
            version(),
            self._started,
            running=set(self._running),
            push={name: one.push_since or time.time() for name, one in self._pushing()},
            failing=self._collector.failing.since,
            deferring={
                name: Deferring(one.tally.deferring, str(one.tally.deferred))
                for name, one in self._pushing()
                if one.tally.deferring is not None
            },
            next={name: at + ahead for name, at in times.items() if at is not None},
            held=held,
            undeliverable=await asyncio.to_thread(self._undeliverable),
            hold_error=hold_error,
        )

    def _undeliverable(self) -> Path | None:
        with contextlib.suppress(OSError):
            return self._collector.retry.folder
        return None

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
            self._collector.failing.note(_broken(agent, error))
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
            return await task
        except asyncio.CancelledError:
            if not self._stop.is_set():
                raise
            return collection.report
        finally:
            del self._running[agent.name]

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
        elif request.get("do") == "look":
            await self._end_disabled()
            yield {"end": True}
        elif request.get("do") == "status":
            # First of all that there is an answer: what follows may have to wait for a slow disk.
            yield {"pid": os.getpid(), "version": version(), "since": self._started}
            for row in (await self.look()).rows:
                yield {"row": row}
            yield {"end": True}
        elif self._waiting.knows(request):
            async for answer in self._waiting.answer(request):
                yield answer
        elif request.get("do") == "collect":
            names, verbose = request.get("agents", []), bool(request.get("verbose"))
            async with contextlib.aclosing(self._answer_collect(names, verbose)) as answers:
                async for answer in answers:
                    yield answer
        else:
            yield {"error": "no such request"}

    async def _answer_collect(self, names: list[str], verbose: bool) -> Answers:
        if verbose:
            yield {"verbose": True}
        # Salmon may be loading the handlers again.
        routed = self._collector.configuration.routed
        if warning := await asyncio.to_thread(sample_warning, routed):
            yield {"warning": warning}
        for name in names:
            if name not in self._agents:
                yield {"error": f"the running server has no agent {name!r}; restart it"}
        wanted = [agent for name, agent in self._agents.items() if name in names]
        unheard = {
            agent.name: _why_unheard(self._running[agent.name][0])
            for agent in wanted
            if verbose and agent.name in self._running
        }
        heard = {one.name: Overheard() for one in wanted if verbose and one.name not in unheard}
        agents = {self._begin(agent, heard.get(agent.name)): agent for agent in wanted}
        tasks = set(agents)
        try:
            for name, why in unheard.items():
                yield {"agent": name, "unheard": why}
            while tasks:
                done, tasks = await asyncio.wait(
                    tasks, timeout=PROGRESS, return_when=asyncio.FIRST_COMPLETED
                )
                for name, one in heard.items():
                    for line in one.taken():
                        yield {"agent": name, "dialogue": line}
                for task in done:
                    yield {"report": _report(agents[task], task).as_dict()}
                for name in names:
                    if running := self._running.get(name):
                        yield _progress(name, running[0])
        finally:
            for one in heard.values():
                one.close()
        yield {"end": True}

    def _begin(self, agent: Agent, heard: Hearer | None) -> asyncio.Task[Report]:
        """A task that collects; ``heard`` hears its dialogue."""
        before = hearing.set(heard)
        try:
            return asyncio.get_running_loop().create_task(self._collect(agent))
        finally:
            hearing.reset(before)

    # -- the end ----------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """Everything at once, and nothing longer than the grace."""
        for collection, task in self._running.values():
            if not collection.stop():
                task.cancel()
        telling: list[Coroutine[Any, Any, None]] = []
        if self._facade is not None:
            telling = [self._plugins.call_each_apart("server_stopping", server=self._facade)]
        ending: list[asyncio.Future[Any]] = [*map(asyncio.ensure_future, telling)]
        ending += [task for _, task in self._running.values()]
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


def _why_unheard(collection: Collection) -> str:
    """Why who asks now is not shown the dialogue of one that is running."""
    if collection.pushing and collection.push_since is not None:
        since = iso(collection.push_since)
        return f"its push session is open since {since}, and what is said in it is not kept"
    return "it began before this command, and what was said is not kept"


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
