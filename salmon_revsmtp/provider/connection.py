"""A customer's connection, through both of its halves.

Before the reversal ``smtp.turn`` speaks, after it ``smtp.sender``; a connection moves messages from
a feed of the hold store to the customer, and its answers to the settler.  What every connection
needs is in ``net.driver``.

After the reversal several messages are under way where the customer lets us.  What the customer has
answered is settled also when the connection breaks or is dropped, and what it has not is still
held.  When the session breaks over a message it gets a strike, and goes alone the next time, so
that it is known which of those under way is the one; after some strikes it is set aside.

A session that its customer wants to keep (XHOLD) goes on when all has been sent: it waits for the
store to tell of more, and says NOOP when it was silent for long.  What the customer deferred is
tried again in it after a while.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, cast

from salmon_revsmtp.net.driver import DEAD_AFTER, Driver
from salmon_revsmtp.net.listener import Admit
from salmon_revsmtp.provider.accounts import Account, Accounts
from salmon_revsmtp.provider.hold.store import Feed, Held, HoldStore, State
from salmon_revsmtp.provider.logins import LoginGuard
from salmon_revsmtp.provider.settling import Answered, Settler
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.content import Content
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Broken, Outgoing, Ready, Sender, Sent
from salmon_revsmtp.smtp.turn import AtrnRequest, LoggedIn, LoginFailed, StartTls, Turn

__all__ = ["Connection", "Host"]

log = logging.getLogger(__name__)

# Seconds until a customer has to have said ATRN, whatever else it says.
LOGIN_PATIENCE = 180.0
# Messages and octets that are read from the store at a time.
PAGE = 256
PAGE_OCTETS = 1024 * 1024
# A session that broke so often over a message is not the reason: the message is set aside.
MOST_STRIKES = 5
# Seconds until what was deferred is tried again in the same session: the first time, and, each time
# twice as long, at the most.
AGAIN_FIRST, AGAIN_LAST = 60.0, 900.0
# A session that is replaced by a newer one may finish what is under way for so many seconds.
REPLACED_GRACE = 5.0

# RFC 2645 5.2.1.
NO_MAIL = Reply(453, "you have no mail", "4.2.0")
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
    ``reversed_at``  since when it is reversed, on the event loop's clock; ``None`` before.
    ``sent``      messages that the customer has answered.
    """

    __slots__ = (
        "_admit",
        "_again_at",
        "_again_in",
        "_alarm",
        "_deferred",
        "_ending",
        "_excused",
        "_feed",
        "_heard_at",
        "_more",
        "_news",
        "_provider",
        "_resting",
        "_sender",
        "_under_way",
        "_waiting",
        "_work",
        "account",
        "push",
        "reversed_at",
        "sent",
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
        self.push = False
        self.reversed_at: float | None = None
        self.sent = 0
        self._provider, self._admit = provider, admit
        self._sender: Sender | None = None
        self._feed: Feed | None = None
        self._work: list[asyncio.Task[None]] = []
        self._waiting = False  # the customer does, for us
        self._ending = False
        self._news: asyncio.Future[None] | None = None  # is waited for: see _note
        self._resting = False  # no task is at work: see _rest
        self._alarm: asyncio.TimerHandle | None = None
        self._more = False  # there may be mail that the feed has not shown
        self._under_way: list[Held] = []  # in the order in which they are answered
        self._excused = False  # if the session breaks, it is not over what is under way
        self._deferred = False
        self._again_in, self._again_at = AGAIN_FIRST, 0.0
        self._heard_at = 0.0

    @property
    def _turn(self) -> Turn:
        """Who speaks before the reversal, and is of no use after it."""
        return cast(Turn, self.machine)

    @property
    def busy(self) -> bool:
        return self._waiting

    @property
    def unfinished(self) -> bool:
        return bool(self._work) or self._resting

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
        self._note()

    def end_soon(self) -> None:
        """Finish what is under way, and say QUIT; before the reversal, 421."""
        self._excused = True
        if self._sender is not None:
            self._ending = True
            self._note()
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

    def replace(self) -> None:
        """A newer session has this one's place: end when what is under way is answered, or soon."""
        self._ending = self._excused = True
        self._note()
        asyncio.get_running_loop().call_later(
            REPLACED_GRACE, self.abort, "a newer session of the account takes its place"
        )

    def wake(self) -> None:
        """Mail has come."""
        self._more = True
        self._note()

    def start_over(self) -> None:
        """Mail that was another session's may be anyone's now."""
        if self._feed is not None:
            self._feed.start_over()
        self.wake()

    # -- events ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._heard_at = asyncio.get_running_loop().time()
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
        elif isinstance(event, LoginFailed):
            self._waiting = True
            self._start(self._refuse_login(event))
        elif isinstance(event, AtrnRequest):
            self._waiting = True
            self._start(self._atrn(event))
        elif isinstance(event, Ready):
            self._note()
        elif isinstance(event, Sent):
            self._answered(event)
        elif isinstance(event, Broken):
            self._excused = self._excused or event.said_so
            self.broken = self.broken or event.reason
            self._note()

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

    async def _refuse_login(self, failed: LoginFailed) -> None:
        guard = self._provider.logins
        await asyncio.sleep(guard.failed(self.peer[0], failed.name, failed.mechanism))
        self._waiting = False
        self._turn.refuse_login(guard.refusal(self.peer[0]))
        self.advance()

    # -- the reversal ---------------------------------------------------------------------------

    async def _atrn(self, request: AtrnRequest) -> None:
        provider = self._provider
        account = provider.accounts.find(request.account)
        assert account is not None
        self.account = account
        push = account.settings.push
        self.push = push == "always" or (request.push and bool(push))
        domains = None if set(request.domains) == set(account.domains) else request.domains
        try:
            await provider.take_over(self, account)
            self._feed = await asyncio.to_thread(provider.store.feed, account.name, domains)
            try:
                first = await self._next_page()
            except OSError as error:
                log_safely(log, logging.ERROR, "account=%s %s", account.name, error)
                self._refuse_atrn(UNAVAILABLE)
                return
            if not first and not self.push:
                self._refuse_atrn(NO_MAIL)
                return
            self._reverse(account)
            await self._hand_over(first)
        finally:
            await self._give_up_feed()

    def _refuse_atrn(self, reply: Reply) -> None:
        self._waiting = False
        self._turn.answer(reply)
        self.advance()

    def _reverse(self, account: Account) -> None:
        log_safely(
            log,
            logging.INFO,
            "account=%s peer=%s push=%s the connection is reversed",
            *(account.name, self.peer[0], self.push),
        )
        loop = asyncio.get_running_loop()
        self._waiting, self._patience = False, None
        self.reversed_at = self._heard_at = loop.time()
        self._sender = Sender(self._provider.hostname)
        self._turn.answer(Reply(250, "now reversing the connection", "2.0.0"))
        if self.push:
            self.keep_alive(self._provider.keepalive)
        self.change_roles(self._sender)
        self._be_patient()

    async def _give_up_feed(self) -> None:
        """What was answered is settled, what was not is anyone's; unless the session goes on."""
        if self._feed is None or self._resting:
            return
        if self._under_way and not self._excused:
            await self._strike(self._under_way[0])
        await asyncio.to_thread(self._feed.close)
        self._feed = None

    async def _strike(self, held: Held) -> None:
        """The session broke, and this is the message that the customer was answering."""
        reason = f"the session broke over it: {self.broken}"
        store = self._provider.store
        try:
            struck = await asyncio.to_thread(store.strike, held.key, MOST_STRIKES, reason)
        except OSError as error:
            log_safely(log, logging.ERROR, "account=%s %s", held.account, error)
            return
        if struck is not None and struck.state is State.ASIDE:
            log_safely(
                log,
                logging.ERROR,
                "account=%s key=%d is set aside, %d sessions broke over it; see "
                "`salmon-revsmtp provider held`",
                *(held.account, held.key, struck.strikes),
            )

    # -- the hand-over --------------------------------------------------------------------------

    async def _next_page(self) -> list[tuple[Held, bytes | Content]]:
        """The next messages of the feed, and their octets."""
        feed, store = self._feed, self._provider.store
        assert feed is not None

        def read() -> list[tuple[Held, bytes | Content]]:
            page = feed.take(PAGE, PAGE_OCTETS)
            found = store.load([held.key for held in page]) if page else {}
            return [(held, found[held.key]) for held in page if held.key in found]

        self._more = False
        return await asyncio.to_thread(read)

    async def _hand_over(self, page: list[tuple[Held, bytes | Content]]) -> None:
        """Send what there is, and then say QUIT, or, in a push session, rest.  Raises
        :class:`ConnectionError` when the session breaks."""
        while not self._ending:
            for held, content in page:
                await self._wait_until(lambda: self._may_send)
                if self._ending:
                    break
                await self._send(held, content)
            else:
                page = await self._next_page()
                if page:
                    continue
                if not self.push:
                    break
                if not self._is_needed:
                    self._rest()
                    return
                self._look_again()
        await self._wait_until(lambda: not self._under_way)
        if self.broken is None and self._sender is not None:
            self.happened(self._sender.quit())

    def _be_patient(self) -> None:
        """How long the customer may be silent: for the answer to a message RFC 5321 4.5.3.2.6 has
        10 minutes."""
        if self.push and not self._under_way:
            self.wait_at_most(DEAD_AFTER * self._provider.keepalive)
        else:
            self.wait_at_most(max(self._provider.timeout, DEAD_AFTER * self._provider.keepalive))

    @property
    def _may_send(self) -> bool:
        return self._ending or (self._sender is not None and self._sender.room)

    async def _send(self, held: Held, content: bytes | Content) -> None:
        """Send a message; one over which a session broke goes alone."""
        if held.strikes:
            await self._wait_until(lambda: not self._under_way)
        assert self._sender is not None
        self._under_way.append(held)
        self._be_patient()
        self.happened(self._sender.send(Outgoing(held, held.envelope, content)))
        if held.strikes:
            await self._wait_until(lambda: not self._under_way)

    async def _wait_until(self, so: Callable[[], bool]) -> None:
        """Wait until something is so.  Raises :class:`ConnectionError` when it never will be."""
        while not so():
            if self.broken is not None:
                raise ConnectionError(self.broken)
            await self._until_news()

    def _note(self) -> None:
        """Room, an answer, mail, an end: whoever waits looks again."""
        if self._news is not None:
            if not self._news.done():
                self._news.set_result(None)
        elif self._resting:
            self._stir()

    async def _until_news(self) -> None:
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None

    # -- the rest -------------------------------------------------------------------------------

    # Most sessions have nothing to do most of the time, and there are ten thousand of them: one
    # that rests has an alarm, and neither a task nor a frame.

    def _rest(self) -> None:
        """Until :attr:`_is_needed`."""
        self._resting = True
        self._set_alarm()

    @property
    def _is_needed(self) -> bool:
        """There may be mail, or a reason to end."""
        return self._more or self._ending or self.broken is not None or self._is_time_again

    @property
    def _is_time_again(self) -> bool:
        """What was deferred may be tried again."""
        now = asyncio.get_running_loop().time()
        return self._deferred and not self._under_way and now >= self._again_at

    def _look_again(self) -> None:
        """Have the feed show what was deferred, if it is time.  Raises :class:`ConnectionError`
        when the session has broken."""
        if self.broken is not None:
            raise ConnectionError(self.broken)
        if self._is_time_again:
            assert self._feed is not None
            self._deferred = False
            self._again_in = min(2 * self._again_in, AGAIN_LAST)
            self._feed.start_over()

    def _stir(self) -> None:
        """Go back to work, if there is any."""
        if self._is_needed:
            self._resting = False
            self._start(self._go_on())
        self._set_alarm()

    async def _go_on(self) -> None:
        try:
            self._look_again()
            await self._hand_over([])
        finally:
            await self._give_up_feed()

    def _set_alarm(self) -> None:
        """For a NOOP, and for what was deferred."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if not self._resting:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        until = max(self._heard_at + self._provider.keepalive, now + 1.0)
        if self._deferred:
            until = min(until, max(self._again_at, now + 0.01))
        self._alarm = loop.call_at(until, self._ring)

    def _ring(self) -> None:
        """See whether the customer is still there, when it was silent for long."""
        assert self._sender is not None
        now = asyncio.get_running_loop().time()
        if now >= self._heard_at + self._provider.keepalive and self._sender.idle:
            self.happened(self._sender.noop())
        self._stir()

    # -- answers --------------------------------------------------------------------------------

    def _answered(self, sent: Sent) -> None:
        held = sent.message.key
        assert isinstance(held, Held) and self._feed is not None
        self._under_way.remove(held)
        self.sent += 1
        if any(reply.transient for reply in sent.replies):
            if not self._deferred:
                self._again_at = asyncio.get_running_loop().time() + self._again_in
            self._deferred = True
        elif not self._deferred:
            self._again_in = AGAIN_FIRST
        self._feed.leave([held.key])
        self._provider.settler.settle(Answered(held, sent.replies))
        if not self._under_way:
            self._be_patient()
        self._note()
