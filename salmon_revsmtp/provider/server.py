"""The provider: listens for customers, and knows which of their sessions are open."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Collection, Container, Sequence
from functools import partial
from types import TracebackType

from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.net.address import HostAndPort
from salmon_revsmtp.net.certificate import Certificate
from salmon_revsmtp.net.listener import Admit, Listener
from salmon_revsmtp.net.places import Places
from salmon_revsmtp.provider.accounts import Account, Accounts
from salmon_revsmtp.provider.connection import REPLACED_GRACE, Connection
from salmon_revsmtp.provider.handover import HandOver
from salmon_revsmtp.provider.hold.store import HoldStore
from salmon_revsmtp.provider.logins import LoginGuard
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
        balancers: Container[str] | None = None,
    ) -> None:
        self.accounts, self.store, self.hostname = accounts, store, hostname
        self.needs_tls, self.timeout, self.keepalive = needs_tls, timeout, keepalive
        self.settler = Settler(store, notify, hooks)
        self.logins = LoginGuard(lambda: asyncio.get_running_loop().time())
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

    def _connect(self, admit: Admit, implicit: bool) -> Connection:
        return Connection(self, admit, implicit)

    async def stop(self, grace: float = GRACE) -> None:
        """Close the listeners and every connection; what was not answered with 2yz stays."""
        await asyncio.gather(*(one.stop(grace) for one in self.listeners))
        await self.settler.finish(grace)
        self._loop = None

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
        if too_many and not connection.push:
            # What they have under way is not "no mail".
            await asyncio.wait([one.ended for one in too_many], timeout=2 * REPLACED_GRACE)

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
