"""A customer's connection, through both of its halves.

Before the reversal ``smtp.turn`` speaks, after it ``smtp.sender``, and the account's mail is handed
over as ``provider.handover`` has it.  What every connection needs is in ``net.driver``.

A session that its customer wants to keep (XHOLD) stays open for what comes later.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Coroutine
from typing import Any, Protocol, cast

from salmon_revsmtp.net.driver import DEAD_AFTER, Driver
from salmon_revsmtp.net.listener import Admit
from salmon_revsmtp.provider.accounts import Account, Accounts, AccountsUnavailableError
from salmon_revsmtp.provider.handover import HandOver
from salmon_revsmtp.provider.hold.store import HoldStore
from salmon_revsmtp.provider.logins import LoginGuard
from salmon_revsmtp.provider.settling import Settler
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Sender
from salmon_revsmtp.smtp.turn import AtrnRequest, LoggedIn, LoginFailed, StartTls, Turn, WhoIs

__all__ = ["Connection", "Host"]

log = logging.getLogger(__name__)

# Seconds until a customer has to have said ATRN, whatever else it says.
LOGIN_PATIENCE = 180.0
# A session that is replaced by a newer one may finish what is under way for so many seconds.
REPLACED_GRACE = 5.0

# RFC 2645 5.2.1.
NO_MAIL = Reply(453, "you have no mail", "4.2.0")
# RFC 4954 6.
CANNOT_TELL = Reply(454, "it cannot be told now who you are, try again later", "4.7.0")
CHANGED = Reply(450, "your account has changed since you logged in", "4.7.1")
UNAVAILABLE = Reply(451, "your mail cannot be read now, try again later", "4.3.0")


class Host(Protocol):
    """The provider, as a connection sees it."""

    accounts: Accounts
    store: HoldStore
    settler: Settler
    logins: LoginGuard
    hostname: str
    needs_tls: bool
    timeout: float
    keepalive: float

    def tls(self) -> ssl.SSLContext | None:
        """What to do TLS with."""

    async def take_over(self, connection: Connection, account: Account) -> None:
        """The account's mail goes down this connection from now on: older ones end."""


class Connection(Driver):
    """A customer's connection.

    ``account``   who it is, once that is known.
    ``push``      it stays open for what comes later.
    ``leaving``   it has to end, and soon does.
    ``reversed_at``  since when it is reversed, on the event loop's clock; ``None`` before.
    """

    __slots__ = (
        "_admit",
        "_hand_over",
        "_provider",
        "_sender",
        "_waiting",
        "_work",
        "account",
        "leaving",
        "push",
        "reversed_at",
    )

    WE, THEY = "provider", "customer"

    def __init__(self, provider: Host, admit: Admit, implicit_tls: bool) -> None:
        starttls = not implicit_tls and provider.tls() is not None
        turn = Turn(
            provider.hostname,
            provider.accounts,
            starttls=starttls,
            tls=implicit_tls,
            needs_tls=provider.needs_tls,
        )
        super().__init__(turn, provider.timeout, LOGIN_PATIENCE)
        self.account: Account | None = None
        self.push = self.leaving = False
        self.reversed_at: float | None = None
        self._provider, self._admit = provider, admit
        self._sender: Sender | None = None
        self._hand_over: HandOver | None = None
        self._work: list[asyncio.Task[None]] = []
        self._waiting = False  # the customer does, for us

    @property
    def _turn(self) -> Turn:
        """Who speaks before the reversal, and is of no use after it."""
        return cast(Turn, self.machine)

    @property
    def sent(self) -> int:
        """Messages that the customer has answered, held or live."""
        done = self._hand_over
        return done.sent + done.passed_on if done is not None else 0

    @property
    def live(self) -> HandOver | None:
        """What passes transactions on, in a session that stays open."""
        return self._hand_over if self.push else None

    @property
    def busy(self) -> bool:
        return self._waiting

    @property
    def unfinished(self) -> bool:
        return bool(self._work) or (self._hand_over is not None and self._hand_over.resting)

    @property
    def tls_version(self) -> str | None:
        """Such as "TLSv1.3"; ``None`` in the clear."""
        found = self._transport.get_extra_info("ssl_object") if self._transport else None
        return found.version() if found is not None else None

    def connected(self) -> None:
        refusal = self._provider.logins.refusal(self.peer[0])
        if refusal := self._admit(self) or refusal:
            self._turn.refuse_session(refusal)

    def encrypted(self) -> None:
        self._turn.tls_started()

    def disconnected(self) -> None:
        if self._hand_over is not None:
            self._hand_over.lost()

    def end_soon(self) -> None:
        """Finish what is under way, and say QUIT; before the reversal, 421."""
        if self._sender is not None and self._hand_over is not None:
            self._hand_over.stop()
        elif self._work:
            for task in self._work:
                task.cancel()
            self.abort("the provider is shutting down")
        else:
            self._turn.shut_down()
            self.flush()

    def send_away(self, reply: Reply) -> None:
        """Before the reversal it hears why."""
        if self._sender is not None or self._handshake is not None:
            super().send_away(reply)
            return
        self._turn.send_away(reply)
        self.flush()

    def replace(self, why: str = "a newer session of the account takes its place") -> None:
        """It has to end: when what is under way is answered, or soon."""
        if self.leaving:
            return
        self.leaving = True
        if self._hand_over is not None:
            self._hand_over.stop()
        asyncio.get_running_loop().call_later(REPLACED_GRACE, self.abort, why)

    def wake(self) -> None:
        """Mail has come."""
        if self._hand_over is not None:
            self._hand_over.wake()

    def start_over(self) -> None:
        """Mail that was another session's may be anyone's now."""
        if self._hand_over is not None:
            self._hand_over.start_over()

    # -- events ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._hand_over is not None:
            self._hand_over.heard()
        super().data_received(data)

    def handle(self, event: object) -> None:
        if isinstance(event, StartTls):
            context = self._provider.tls()
            assert context is not None
            self.start_tls(context)
        elif isinstance(event, LoggedIn):
            log_safely(
                log,
                logging.INFO,
                "account=%s peer=%s mechanism=%s tls=%s logged in",
                *(event.account, self.peer[0], event.mechanism, self.tls),
            )
        elif isinstance(event, WhoIs):
            self._waiting = True
            self._start(self._look_up(event.name))
        elif isinstance(event, LoginFailed):
            self._waiting = True
            self._start(self._refuse_login(event))
        elif isinstance(event, AtrnRequest):
            self._waiting = True
            self._start(self._atrn(event))
        elif self._hand_over is not None:
            self._hand_over.handle(event)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._work.append(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.remove(task)
        if not task.cancelled() and (error := task.exception()):
            if not isinstance(error, ConnectionError):
                log_safely(log, logging.ERROR, "a hand-over failed: %s", error, error=True)
            self.abort(f"handing over: {error}")
        self.finish()

    async def _look_up(self, name: str) -> None:
        refusal = None
        try:
            await self._provider.accounts.look_up(name)
        except AccountsUnavailableError:
            refusal = CANNOT_TELL
        self._waiting = False
        self._turn.looked_up(refusal)
        self.advance()

    async def _refuse_login(self, failed: LoginFailed) -> None:
        guard = self._provider.logins
        await asyncio.sleep(guard.failed(self.peer[0], failed.name, failed.mechanism))
        self._waiting = False
        self._turn.refuse_login(guard.refusal(self.peer[0]))
        self.advance()

    # -- the reversal ---------------------------------------------------------------------------

    async def _atrn(self, request: AtrnRequest) -> None:
        provider = self._provider
        try:
            account = await self._still(request)
        except AccountsUnavailableError:
            self._refuse_atrn(UNAVAILABLE)
            return
        if account is None:
            self._refuse_atrn(CHANGED)
            return
        self.account = account
        push = account.settings.push
        self.push = push == "always" or (request.push and bool(push))
        domains = None if set(request.domains) == set(account.domains) else request.domains
        hand_over = HandOver(self, provider.store, provider.settler, account.name)
        self._hand_over = hand_over
        try:
            await provider.take_over(self, account)
            try:
                first = await hand_over.open(domains)
            except OSError as error:
                log_safely(log, logging.ERROR, "account=%s %s", account.name, error)
                self._refuse_atrn(UNAVAILABLE)
                return
            if not first and not self.push:
                self._refuse_atrn(NO_MAIL)
                return
            self._reverse(account, hand_over)
            await hand_over.run(first)
            self._say_goodbye(hand_over)
        finally:
            await hand_over.close()

    async def _still(self, request: AtrnRequest) -> Account | None:
        """The account that has logged in, unless it could not do so any more.  Raises
        :class:`AccountsUnavailableError`."""
        before = self._turn.customer
        account = await self._provider.accounts.look_up(request.account)
        if account is None or before is None or not account.lets_in(before.account):
            return None
        return account

    async def _go_on(self, hand_over: HandOver) -> None:
        """A session that rested has something to do."""
        try:
            await hand_over.resume()
            self._say_goodbye(hand_over)
        finally:
            await hand_over.close()

    def _say_goodbye(self, hand_over: HandOver) -> None:
        if self.broken is None and self._sender is not None and not hand_over.resting:
            self.happened(self._sender.quit())

    def _refuse_atrn(self, reply: Reply) -> None:
        self._waiting = False
        self._turn.answer(reply)
        self.advance()

    def _reverse(self, account: Account, hand_over: HandOver) -> None:
        provider = self._provider
        log_safely(
            log,
            logging.INFO,
            "account=%s peer=%s push=%s the connection is reversed",
            *(account.name, self.peer[0], self.push),
        )
        self._waiting, self._patience = False, None
        self.reversed_at = asyncio.get_running_loop().time()
        self._sender = sender = Sender(provider.hostname)
        self._turn.answer(Reply(250, "now reversing the connection", "2.0.0"))
        timeout = max(provider.timeout, DEAD_AFTER * provider.keepalive)
        hand_over.begin(sender, timeout)
        if self.push:
            hand_over.stay(provider.keepalive, lambda: self._start(self._go_on(hand_over)))
            self.keep_alive(provider.keepalive)
        self.change_roles(sender)
