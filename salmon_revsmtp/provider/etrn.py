"""ETRN at the provider (RFC 1985): held mail is sent to the address that its account has for that.

Any stranger may ask, and nothing comes of it but a delivery to the address in the settings.  An
account has one delivery at a time, and the next begins a minute after the last one began, at the
earliest.  What is asked for meanwhile waits for that: a domain that a delivery has not sent yet
goes down its connection, too, but none goes twice.  Otherwise a stranger could have what the
customer defers sent again and again, as fast as the line allows.

Only mail for the domains that were asked for is sent.  The customer's host may refuse mail for the
others, and then their senders would be told that it cannot be delivered.

Whoever asks for a domain that is not ours, that has no address for ETRN, or whose account is
disabled, hears the same 459.  Queues have no names here: the names of accounts are what customers
log in with.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import ssl
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from salmon_revsmtp.net.address import host_and_port
from salmon_revsmtp.net.dial import dial
from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.outcome import Failed
from salmon_revsmtp.provider.accounts import Account, Accounts
from salmon_revsmtp.provider.handover import HandOver
from salmon_revsmtp.provider.hold.store import Held, HoldStore, State
from salmon_revsmtp.provider.settling import Settler
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.addresses import AddressError, domain_of, to_ascii
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import BeginTls, Broken, Closed, Ready, Sender

__all__ = ["Etrn"]

log = logging.getLogger(__name__)

# Seconds between the beginnings of two deliveries for an account.
EVERY = 60.0
# Seconds that a delivery stays after its last message: a customer asks for one domain after the
# other, and what it asks for next goes down the same connection.
LINGER = 2.0
# Deliveries at a time; others wait.
MOST_DELIVERIES = 100
# Accounts whose mail one request may start.
MOST_ACCOUNTS = 10
# Octets of a name that an answer repeats; no domain is longer (RFC 1035 2.3.4).
LONGEST_NAME = 253
# Messages, and recipients of them, that are looked at to answer a request: a stranger's question
# must not cost more, and a stranger may have sent the mail, too.
LOOKED_AT, LOOKED_AT_RECIPIENTS = 256, 4096
# Messages that are read for that at a time.
LOOK = 16
# Requests for which this is done at a time: the threads are for those who hand mail over, too.
LOOKS = 1

# Seconds for finding the addresses of a host, and for connecting to each.
CONNECT_TIMEOUT = 60.0
# Seconds that its server may take for its greeting, EHLO and STARTTLS (RFC 5321 4.5.3.2.1), and for
# the answer to a message (4.5.3.2.6).
GREETING_TIMEOUT, TIMEOUT = 300.0, 600.0
# Seconds of silence after which the system sees whether its host is still there.
KEEPALIVE = 60.0
# Seconds for the answer to QUIT, and for a full disk to take the last answers.
GOODBYE, SETTLING = 10.0, 10.0


class _Waiting(NamedTuple):
    """What waits for an account in some domains.

    ``messages``  those that were seen.
    ``all_seen``  there are no more.
    """

    messages: int
    all_seen: bool


@dataclass(eq=False)
class _Order:
    """What was asked for of an account's mail.

    ``asked``     the domains that no delivery has begun to send yet.
    ``sending``   those whose mail is being sent.
    ``sent``      those whose mail the delivery under way has sent, or is sending.
    ``since``     those that were asked for since the delivery under way began: if it fails, it may
                  have been on its way to where the customer was before, and there is another.
    ``hostname``  what we call ourselves.
    ``began``     when the last delivery did, on the event loop's clock.
    ``call``      the connection of the delivery under way, once mail may be sent on it.
    ``hand_over`` what goes down it, while anything does.
    """

    account: Account
    asked: set[str] = field(default_factory=set)
    sending: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    since: set[str] = field(default_factory=set)
    hostname: str = "localhost"
    began: float = -math.inf
    call: _Call | None = None
    hand_over: HandOver | None = None
    task: asyncio.Task[None] | None = None
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def next(self) -> set[str]:
        """The domains that the delivery under way may send next."""
        return self.asked - self.sent

    @property
    def address(self) -> str:
        """Where the mail goes."""
        assert self.account.settings.etrn is not None
        return self.account.settings.etrn


class Etrn:
    """Answers ETRN for ``accounts``, and sends what it asks for from ``store``.

    ``settler``  takes the customers' answers.
    ``served``   told the name of an account when a delivery has let its mail go: what it did not
                 take is anyone's.
    """

    def __init__(
        self,
        accounts: Accounts,
        store: HoldStore,
        settler: Settler,
        served: Callable[[str], None] = lambda account: None,
    ) -> None:
        self._store, self._settler, self._served = store, settler, served
        self._all = accounts
        self._accounts = {
            domain: account
            for account in accounts
            if _is_sent(account)
            for domain in account.domains
        }
        self._below: dict[str, list[str]] = {}
        for domain in self._accounts:
            for parent in _parents(domain):
                self._below.setdefault(parent, []).append(domain)
        self._orders: dict[str, _Order] = {}
        self._slots = asyncio.Semaphore(MOST_DELIVERIES)
        self._looks = asyncio.Semaphore(LOOKS)
        self._stopping = False

    # -- what a client hears --------------------------------------------------------------------

    async def answer(self, name: str, hostname: str) -> Reply:
        """The answer to ``ETRN name`` (RFC 1985 5.3).  What it starts goes on by itself.

        ``hostname``  what we call ourselves where the mail goes.
        """
        try:
            asked = self._asked_for(name)
        except AddressError:
            return Reply(501, "ETRN takes a domain, or @ and a domain", "5.5.4")
        name = name[:LONGEST_NAME]
        try:
            asked = await self._asked_elsewhere(name, asked)
        except OSError:
            return Reply(458, f"unable to queue messages for node {name}, try later", "4.3.0")
        if not 0 < len(asked) <= MOST_ACCOUNTS:
            reason = "its mail is not sent on request here"
            return Reply(459, f"node {name} not allowed: {reason}", "4.7.1")
        if self._stopping:
            return Reply(458, f"unable to queue messages for node {name}: shutting down", "4.3.2")
        try:
            found = [await self._order(*one, hostname) for one in asked.items()]
        except OSError as error:
            log_safely(log, logging.ERROR, "etrn=%s looking for its mail: %s", name, error)
            return Reply(458, f"unable to queue messages for node {name}, try later", "4.3.0")
        return _answer(name, found)

    def _asked_for(self, name: str) -> dict[Account, set[str]]:
        """The accounts of a node, with their domains, or more than may be of them.  Raises
        :class:`AddressError` for what is no name of one (RFC 1985 5.2)."""
        if name.startswith("#"):
            if name == "#":
                raise AddressError("a queue has a name")
            return {}
        node = to_ascii(name.removeprefix("@"))
        below = self._below.get(node, []) if name.startswith("@") else []
        found: dict[Account, set[str]] = {}
        for domain in (node, *below):
            if (account := self._accounts.get(domain)) is not None:
                found.setdefault(account, set()).add(domain)
                if len(found) > MOST_ACCOUNTS:
                    break
        return found

    async def _asked_elsewhere(
        self, name: str, asked: dict[Account, set[str]]
    ) -> dict[Account, set[str]]:
        """The same with an account that the settings do not have.  Of those, only the one that has
        the domain itself is known: with "@" its subdomains are sent, too.  Raises
        :class:`OSError`."""
        if name.startswith("#") or self._all.lookups is None:
            return asked
        node = to_ascii(name.removeprefix("@"))
        account = await self._all.look_up_domain(node)
        if account is None or self._all.in_settings(account.name) or not _is_sent(account):
            return asked
        below = f".{node}" if name.startswith("@") else None
        domains = {one for one in account.domains if one == node or (below and one.endswith(below))}
        return {**asked, account: domains}

    async def _order(self, account: Account, domains: set[str], hostname: str) -> _Waiting | None:
        """Have an account's mail sent, if any waits.  Returns what does; ``None`` if it has been
        asked for already."""
        order = self._orders.setdefault(account.name, _Order(account))
        order.account = account
        async with self._looks:
            if order.task is not None and domains <= order.asked | order.sending:
                order.since |= domains
                if order.hand_over is not None:
                    order.hand_over.ask_again()
                return None
            waiting = await asyncio.to_thread(self._look, account, domains)
        if waiting != _Waiting(0, True) and not self._stopping:
            order.hostname = hostname
            order.asked |= domains - order.sending
            order.since |= domains
            order.news.set()
            if order.task is None:
                order.task = asyncio.get_running_loop().create_task(self._work(order))
        return waiting

    def _look(self, account: Account, domains: Collection[str]) -> _Waiting:
        """In a thread: what waits."""
        wanted = _filter(account, domains)
        found = looked_at = recipients = after = 0
        if not self._store.usage(account.name).messages:
            return _Waiting(0, True)
        while looked_at < LOOKED_AT and recipients < LOOKED_AT_RECIPIENTS:
            most = min(LOOK, LOOKED_AT - looked_at)
            page = self._store.listing(account.name, after, most, State.WAITING)
            found += sum(wanted is None or _is_for(held, wanted) for held in page)
            if len(page) < most:
                return _Waiting(found, True)
            looked_at, after = looked_at + len(page), page[-1].key
            recipients += sum(len(held.envelope.recipients) for held in page)
        return _Waiting(found, False)

    # -- deliveries -----------------------------------------------------------------------------

    async def stop(self, grace: float) -> None:
        """Finish what is under way, within ``grace`` seconds, and begin no more."""
        self._stopping = True
        orders = [one for one in self._orders.values() if one.task is not None]
        tasks = [one.task for one in orders if one.task is not None]
        for one in orders:
            one.news.set()
            if one.hand_over is not None:
                one.hand_over.stop()
            elif one.call is None and one.task is not None:
                one.task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace / 2)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._settler.finish(grace / 2)

    async def _work(self, order: _Order) -> None:
        """Send an account's mail as long as there are requests."""
        loop = asyncio.get_running_loop()
        try:
            while order.asked and not self._stopping:
                await asyncio.sleep(max(0.0, order.began + EVERY - loop.time()))
                async with self._slots:
                    order.began = loop.time()
                    order.since.clear()
                    await self._try_to_deliver(order)
        finally:
            order.task = None

    async def _try_to_deliver(self, order: _Order) -> None:
        account, address = order.account.name, order.address
        try:
            messages, tls = await self._deliver(order)
        except Exception as error:
            order.asked = set(order.since)
            expected = isinstance(error, Failed | OSError)
            log_safely(
                log,
                logging.WARNING if expected else logging.ERROR,
                "account=%s to=%s sending its mail, as ETRN asked: %s; what is left is still held",
                *(account, address, error),
                error=not expected,
            )
        else:
            log_safely(
                log,
                logging.INFO,
                "account=%s to=%s tls=%s messages=%d answered in a delivery that ETRN asked for",
                *(account, address, tls, messages),
            )

    async def _deliver(self, order: _Order) -> tuple[int, bool]:
        """Send what is asked for over a connection of our own.  Returns how many messages were
        answered, and whether it was encrypted.  Raises :class:`Failed` or :class:`OSError`."""
        order.call = call = await _reach(order)
        order.sent.clear()
        messages = 0
        try:
            while order.next:
                messages += await self._send(order, call)
                await self._linger(order)
                if call.broken is not None or self._stopping:
                    break
            await call.leave()
        finally:
            order.call = None
            call.abort("the delivery is over")
        return messages, call.tls

    async def _send(self, order: _Order, call: _Call) -> int:
        """Send what has been asked for up to now; returns how many messages were answered."""
        account = order.account
        hand_over = HandOver(call, self._store, self._settler, account.name)
        order.hand_over = call.hand_over = hand_over
        order.sending = order.next
        order.asked -= order.sending
        order.sent |= order.sending
        try:
            first = await hand_over.open(_filter(account, order.sending))
            hand_over.begin(call.sender, TIMEOUT)
            await hand_over.run(first)
        finally:
            order.hand_over = None
            order.sending = set()
            await hand_over.close()
            await self._settler.wait(SETTLING)
            self._served(account.name)
        return hand_over.sent

    async def _linger(self, order: _Order) -> None:
        """Wait a moment for a request for another domain."""
        order.news.clear()
        if not (order.next or self._stopping):
            with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(order.news.wait(), LINGER)


def _parents(domain: str) -> Iterator[str]:
    """The domains that a domain is below."""
    while domain := domain.partition(".")[2]:
        yield domain


def _filter(account: Account, domains: Collection[str]) -> frozenset[str] | None:
    """What a feed is given: ``None`` for all that an account has, also for the postmaster of this
    host, who has no domain (RFC 5321 4.5.1)."""
    return None if set(account.domains) <= set(domains) else frozenset(domains)


def _is_for(held: Held, domains: Collection[str]) -> bool:
    return any(domain_of(one) in domains for one in held.envelope.recipients)


def _is_sent(account: Account) -> bool:
    """Whether its mail is sent when someone asks for that."""
    return account.settings.etrn is not None and account.settings.enabled


def _answer(name: str, found: Sequence[_Waiting | None]) -> Reply:
    """RFC 1985 5.3."""
    seen = [one for one in found if one is not None]
    messages = sum(one.messages for one in seen)
    if len(seen) < len(found) or not (messages or all(one.all_seen for one in seen)):
        return Reply(250, f"OK, queuing for node {name} started", "2.0.0")
    if not messages:
        return Reply(251, f"OK, no messages waiting for node {name}", "2.0.0")
    if not all(one.all_seen for one in seen):
        return Reply(252, f"OK, pending messages for node {name} started", "2.0.0")
    return Reply(253, f"OK, {messages} pending messages for node {name} started", "2.0.0")


class _Call(Driver):
    """A connection of our own to a customer's server.

    ``sender``     speaks on it.
    ``tls_failed`` it broke in the TLS handshake.
    ``hand_over``  what goes down it now.
    """

    WE, THEY = "provider", "customer"

    def __init__(self, hostname: str, server: str, starttls: bool) -> None:
        self.sender = Sender(hostname, starttls=starttls)
        super().__init__(self.sender, GREETING_TIMEOUT)
        self.tls_failed = False
        self.hand_over: HandOver | None = None
        self._server = server
        self._greeted = asyncio.Event()  # or it never will be

    def connected(self) -> None:
        self.keep_alive(KEEPALIVE)

    def encrypted(self) -> None:
        self.tls_failed = False
        self.sender.tls_started()

    def disconnected(self) -> None:
        self._greeted.set()
        if self.hand_over is not None:
            self.hand_over.look()

    def handle(self, event: object) -> None:
        if isinstance(event, BeginTls):
            self.tls_failed = not self.sender.pending  # until it has not
            self.start_tls(_unverified(), self._server)
        elif isinstance(event, Closed):
            self.clean = True
        elif self.hand_over is not None:
            self.hand_over.handle(event)
        elif isinstance(event, Broken):
            self.broken, self.tls_failed = self.broken or event.reason, False
            self._greeted.set()
        elif isinstance(event, Ready):
            self._greeted.set()

    async def ready(self) -> None:
        """Wait until mail may be sent.  Raises :class:`ConnectionError` when it never may."""
        try:
            await self._greeted.wait()
        except asyncio.CancelledError:
            self.abort("we are shutting down")
            raise
        if self.broken is not None:
            raise ConnectionError(self.broken)

    async def leave(self) -> None:
        """Say QUIT, and wait a little for the answer."""
        if self.broken is None:
            self.happened(self.sender.quit())
            await asyncio.wait([self.ended], timeout=GOODBYE)


async def _reach(order: _Order) -> _Call:
    """A connection to an account's server that is ready for mail.  Raises :class:`Failed` or
    :class:`OSError`."""
    call = await _call(order, starttls=True)
    try:
        await call.ready()
    except ConnectionError as error:
        if not call.tls_failed:
            raise
        # RFC 7435 5: without TLS is better than not at all.
        log_safely(
            *(log, logging.INFO, "account=%s to=%s %s; calling again in the clear"),
            *(order.account.name, order.address, error),
        )
        call = await _call(order, starttls=False)
        await call.ready()
    return call


async def _call(order: _Order, starttls: bool) -> _Call:
    host, port = host_and_port(order.address)
    connection = await dial(host, port, CONNECT_TIMEOUT, "etrn")
    _, call = await asyncio.get_running_loop().create_connection(
        lambda: _Call(order.hostname, host.rstrip("."), starttls), sock=connection
    )
    return call


@functools.cache
def _unverified() -> ssl.SSLContext:
    """RFC 7435: encrypted is better than not, whoever is at the other end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
