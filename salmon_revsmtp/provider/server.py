"""The provider: listens for customers, and knows which of their sessions are open."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import ssl
import time
from collections.abc import Callable, Collection, Container, Sequence
from functools import partial
from types import TracebackType

from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.net.address import HostAndPort
from salmon_revsmtp.net.certificate import Certificate
from salmon_revsmtp.net.listener import Admit, Listener
from salmon_revsmtp.net.places import Places
from salmon_revsmtp.provider.accounts import Account, Accounts, AccountsUnavailableError
from salmon_revsmtp.provider.connection import REPLACED_GRACE, Connection
from salmon_revsmtp.provider.handover import HandOver
from salmon_revsmtp.provider.hold.store import HoldStore
from salmon_revsmtp.provider.logins import LoginGuard
from salmon_revsmtp.provider.nodes import Nodes, NodeSession
from salmon_revsmtp.provider.settling import Notify, Settler
from salmon_revsmtp.safelog import log_safely

__all__ = ["Provider"]

log = logging.getLogger(__name__)

# RFC 5321 4.5.3.2: the longest that either half has to wait.
IDLE_TIMEOUT = 600.0
# Seconds that a stop waits for answers that were heard to be settled.
GRACE = 10.0
# Seconds without a session after which an account that has mail is named in the log.
UNSEEN = 86400.0
# Seconds between two looks whether accounts with sessions are what they were, where plugins have
# them, and how many are asked for at a time: each costs a plugin a question.
ASK_AGAIN, ASKED_AGAIN = 1.0, 200
# Seconds between two looks whether a session at another host has given way.
GIVEN_WAY = 0.1


class Provider:
    """Hands held mail over to customers that call.

    ``accounts``     who they are.
    ``store``        where their mail is held; whoever made it closes it.
    ``notify``       tells a sender of what a customer refuses.
    ``hostname``     what we call ourselves.
    ``certificate``  offers STARTTLS, and TLS from the start where an address has that.
    ``needs_tls``    AUTH and ATRN only under TLS.
    ``addresses``    where to listen, and whether TLS is from the start.
    ``timeout``      seconds without a byte from the customer.
    ``keepalive``    seconds of silence in a push session.
    ``nodes``        the other hosts, if there may be any.
    ``balancers``    addresses whose connections begin with a PROXY header.
    ``listeners``    one for each address, once they listen.
    """

    def __init__(
        self,
        accounts: Accounts,
        store: HoldStore,
        notify: Notify,
        hooks: HookCaller,
        hostname: str = "localhost",
        *,
        certificate: Certificate | None = None,
        needs_tls: bool = False,
        addresses: Sequence[tuple[HostAndPort, bool]] = ((HostAndPort("127.0.0.1", 0), False),),
        timeout: float = IDLE_TIMEOUT,
        keepalive: float = 60.0,
        max_sessions: int = 10_000,
        max_sessions_per_address: int = 10_000,
        nodes: Nodes | None = None,
        balancers: Container[str] | None = None,
    ) -> None:
        self.accounts, self.store, self.hostname = accounts, store, hostname
        self.needs_tls, self.timeout, self.keepalive = needs_tls, timeout, keepalive
        self.settler = Settler(store, notify, hooks)
        self.nodes = nodes
        self.logins = LoginGuard(lambda: asyncio.get_running_loop().time(), self._tell_of_login)
        self._numbers: dict[int, Connection] = {}  # as the other hosts know our sessions
        self._next = itertools.count(1)
        self._asking_again: asyncio.Task[None] | None = None
        self._asked_again: dict[str, None] = {}  # accounts with sessions, the next one first
        self._rechecks: set[asyncio.Task[None]] = set()
        self._rechecking = asyncio.Semaphore(ASKED_AGAIN)
        self._certificate = certificate
        self._addresses = addresses
        self._most, self._most_per_address = max_sessions, max_sessions_per_address
        self._balancers = balancers
        self.listeners: list[Listener] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sessions: dict[str, list[Connection]] = {}
        self._seen: dict[str, float] = {}  # when an account had a session the last time
        self._last: dict[str, float] = {}  # the same, in seconds since the epoch
        self._said: dict[str, float] = {}  # after how many seconds its absence was logged
        store.watch(self._woken)

    @property
    def port(self) -> int:
        """The TCP port of the first address."""
        return self.listeners[0].port

    def tls(self) -> ssl.SSLContext | None:
        return self._certificate.context() if self._certificate is not None else None

    def _context(self) -> ssl.SSLContext:
        context = self.tls()
        assert context is not None, "TLS from the start needs a certificate"
        return context

    @property
    def sessions(self) -> list[Connection]:
        """The reversed sessions that are open, the oldest first."""
        return [one for sessions in self._sessions.values() for one in sessions]

    def live(self, account: str, domain: str) -> HandOver | None:
        """The newest session that passes on what a sender has for this domain of an account."""
        for one in reversed(self._sessions.get(account, ())):
            if one.live is not None and one.live.passes(domain):
                return one.live
        return None

    async def start(self) -> None:
        """Listen.  Raises :class:`OSError` when an address cannot be had."""
        self._loop = asyncio.get_running_loop()
        places = Places(self._most, self._most_per_address)
        for address, implicit in self._addresses:
            listener = Listener(
                "provider",
                lambda admit, implicit=implicit: self._connect(admit, implicit),  # type: ignore[misc]
                *address,
                tls=self._context if implicit else None,
                places=places,
                balancers=self._balancers,
            )
            await listener.start()
            self.listeners.append(listener)
        if self.nodes is not None:
            await asyncio.to_thread(self.nodes.watch, self)
        if self.accounts.lookups is not None:
            self._asking_again = self._loop.create_task(self._ask_again())

    def _connect(self, admit: Admit, implicit: bool) -> Connection:
        return Connection(self, admit, implicit)

    async def stop(self, grace: float = GRACE) -> None:
        """Close the listeners and every connection; what was not answered with 2yz stays."""
        await asyncio.gather(*(one.stop(grace) for one in self.listeners))
        await self.settler.finish(grace)
        for task in (self._asking_again, *self._rechecks):
            if task is not None:
                task.cancel()
        self._loop = None
        if self.nodes is not None:
            await asyncio.to_thread(self.nodes.close)

    async def __aenter__(self) -> Provider:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    # -- sessions -------------------------------------------------------------------------------

    async def take_over(self, connection: Connection, account: Account) -> None:
        """A connection takes its place among the sessions of its account: the newest win."""
        self._note_seen(account.name)
        sessions = self._sessions.setdefault(account.name, [])
        too_many = sessions[: len(sessions) + 1 - account.settings.sessions]
        sessions.append(connection)
        connection.ended.add_done_callback(partial(self._ended, connection, account))
        for one in too_many:
            log_safely(
                log,
                logging.WARNING,
                "account=%s peer=%s its session gives way to a newer one from %s",
                *(account.name, one.peer[0], connection.peer[0]),
            )
            one.replace()
        elsewhere = await self._begin_at_nodes(connection, account)
        if connection.push:
            return
        # What they have under way is not "no mail".
        if too_many:
            await asyncio.wait([one.ended for one in too_many], timeout=2 * REPLACED_GRACE)
        if elsewhere:
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError, OSError):
                await asyncio.wait_for(self._gone(elsewhere), 2 * REPLACED_GRACE)

    async def _begin_at_nodes(self, connection: Connection, account: Account) -> Sequence[object]:
        """Have the other hosts know of a session; returns those that give way to it there."""
        if self.nodes is None:
            return ()
        number = next(self._next)
        self._numbers[number] = connection
        connection.ended.add_done_callback(lambda _: self._ended_at_nodes(number))
        host, port = connection.peer
        session = NodeSession(
            account.name,
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            time.time(),
            connection.push,
            connection.tls_version,
            account.settings.sessions,
        )
        try:
            return await asyncio.to_thread(self.nodes.begin, number, session)
        except OSError:  # it is told later; until then they are this host's alone
            return ()

    def _ended_at_nodes(self, number: int) -> None:
        self._numbers.pop(number, None)
        if self.nodes is not None:
            self.nodes.end(number)

    async def _gone(self, replaced: Sequence[object]) -> None:
        assert self.nodes is not None
        while await asyncio.to_thread(self.nodes.still_there, replaced):
            await asyncio.sleep(GIVEN_WAY)

    def last_seen(self, name: str) -> float | None:
        """When a session of an account began or ended the last time (seconds since the epoch);
        ``None`` if none has since we started."""
        return self._last.get(name)

    def _note_seen(self, name: str) -> None:
        self._seen[name] = asyncio.get_running_loop().time()
        self._last[name] = time.time()
        self._said.pop(name, None)

    def _ended(self, connection: Connection, account: Account, _: object) -> None:
        self._note_seen(account.name)
        sessions = self._sessions.get(account.name, [])
        if connection in sessions:
            sessions.remove(connection)
        if not sessions:
            self._sessions.pop(account.name, None)
        # What it had under way is anyone's now.
        for one in sessions:
            one.start_over()

    def served(self, name: str) -> None:
        """An account has got mail in another way, by ETRN; what it did not take is anyone's."""
        self._note_seen(name)
        for one in self._sessions.get(name, ()):
            one.start_over()

    def name_the_unseen(self) -> None:
        """Log, once a day, which accounts have mail and have not called for a day."""
        now = asyncio.get_running_loop().time()
        for name, used in self.store.usages().items():
            since = self._seen.setdefault(name, now)
            if name not in self._sessions and now - since >= UNSEEN + self._said.get(name, 0.0):
                self._said[name] = now - since
                log_safely(
                    log,
                    logging.WARNING,
                    "account=%s messages=%d octets=%d it has not called for %.0f hours",
                    *(name, used.messages, used.octets, (now - since) / 3600),
                )

    def _woken(self, accounts: Collection[str]) -> None:
        """In any thread: mail has come."""
        loop = self._loop
        if loop is None or not any(name in self._sessions for name in accounts):
            return
        try:
            loop.call_soon_threadsafe(self._wake, tuple(accounts))
        except RuntimeError:  # it is closed
            return

    def _wake(self, accounts: Sequence[str]) -> None:
        for name in accounts:
            for one in self._sessions.get(name, ()):
                one.wake()

    # -- what other hosts tell ------------------------------------------------------------------

    def _tell_of_login(self, network: str) -> None:
        if self.nodes is not None:
            self.nodes.login_failed(network)

    def _soon(self, function: Callable[..., None], *arguments: object) -> None:
        """In any thread: have the event loop do it."""
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(function, *arguments)

    def accounts_changed(self, names: Collection[str] | None) -> None:
        """In any thread: these accounts are not what they were, or any may be."""
        if self.accounts.lookups is not None:
            self.accounts.lookups.forget()
        self._soon(self._recheck_soon, names)

    def accounts_seen(self, at: float) -> None:
        """In any thread: until then no others had changed."""
        if self.accounts.lookups is not None:
            self.accounts.lookups.still(at)

    def gave_way(self, numbers: Collection[int]) -> None:
        """In any thread: these sessions have to end."""
        self._soon(self._give_way, numbers)

    def _give_way(self, numbers: Collection[int]) -> None:
        for number in numbers:
            if (one := self._numbers.pop(number, None)) is not None and one.account is not None:
                log_safely(
                    log,
                    logging.WARNING,
                    "account=%s peer=%s its session gives way to a newer one at another host",
                    *(one.account.name, one.peer[0]),
                )
                one.replace()

    def logins_failed(self, network: str, number: int, ago: float) -> None:
        """In any thread: logins have failed at another host."""
        self._soon(self.logins.heard, network, number, ago)

    # -- accounts that change -------------------------------------------------------------------

    async def _ask_again(self) -> None:
        """See now and then whether accounts with sessions are what they were."""
        while True:
            await asyncio.sleep(ASK_AGAIN)
            waiting = [name for name in self._asked_again if name in self._sessions]
            others = [name for name in self._sessions if name not in self._asked_again]
            turn = [one for one in (*waiting, *others) if not self.accounts.in_settings(one)]
            some, rest = turn[:ASKED_AGAIN], turn[ASKED_AGAIN:]
            self._asked_again = dict.fromkeys([*rest, *some])
            await asyncio.gather(*map(self._recheck, some))

    def _recheck_soon(self, names: Collection[str] | None) -> None:
        for name in list(self._sessions) if names is None else names:
            if name in self._sessions and not self.accounts.in_settings(name):
                task = asyncio.get_running_loop().create_task(self._recheck(name))
                self._rechecks.add(task)
                task.add_done_callback(self._rechecks.discard)

    async def _recheck(self, name: str) -> None:
        """End the sessions of an account that could not have them any more."""
        try:
            async with self._rechecking:
                account = await self.accounts.look_up(name)
        except AccountsUnavailableError:
            return
        for one in list(self._sessions.get(name, ())):
            if one.leaving or one.account is None:
                continue
            if why := _why_not(one, one.account, account):
                log_safely(
                    log,
                    logging.WARNING,
                    "account=%s peer=%s its session ends: %s",
                    *(name, one.peer[0], why),
                )
                one.replace(why)


def _why_not(session: Connection, before: Account, now: Account | None) -> str:
    """Why a session cannot go on; ``""`` if it can."""
    if now is None:
        return "the account is gone"
    if not now.settings.enabled:
        return "the account is disabled"
    if not now.lets_in(before):
        return "the account has another password"
    if session.push and not now.settings.push:
        return "the account has no push sessions any more"
    return ""
