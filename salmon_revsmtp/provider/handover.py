"""The hand-over of an account's held mail down one session, whoever opened the connection.

A :class:`HandOver` moves messages from a feed of the hold store to the customer, and its answers to
the settler.  After ATRN that is the connection on which the customer called, after ETRN one of our
own; each is a driver whose machine is ``smtp.sender``.

Several messages are under way where the customer lets us.  What the customer has answered is
settled also when the connection breaks or is dropped, and what it has not is still held.  When the
session breaks over a message it gets a strike, and goes alone the next time, so that it is known
which of those under way is the one; after some strikes it is set aside.

A session that its customer wants to keep rests when all has been sent: it waits for the store to
tell of more, and says NOOP when it was silent for long.  What the customer deferred is tried again
in it after a while.  Most such sessions have nothing to do most of the time, and there may be ten
thousand of them: one that rests has an alarm, and neither a task nor a frame.

A session that stays open passes transactions on as well, for which a sender waits: they go out
before what is held, and who waits for one hears what the customer says to it.  What is said too
late for that is its answer to the same message, which is held by then: it does not go out again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

from salmon_revsmtp.net.driver import DEAD_AFTER, Driver
from salmon_revsmtp.provider.hold.store import Feed, Held, HoldStore, State
from salmon_revsmtp.provider.settling import Answered, Settler, is_for_later
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.content import PIECE, Content, Octets
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Broken, NotForwarded, Outgoing, Ready, Sender, Sent

__all__ = ["MOST_STRIKES", "HandOver", "Page", "Passing"]

log = logging.getLogger(__name__)

# Messages and octets that are read from the store at a time.
PAGE = 256
PAGE_OCTETS = 1024 * 1024
# A session that broke so often over a message is not the reason: the message is set aside.
MOST_STRIKES = 5
# Transactions in a session, under way or waiting for that, at which no more are passed on.
MOST_WAITING = 512
# Answers that came too late for their senders, and are kept until the message comes from the feed.
MOST_LATE = MOST_WAITING
# Seconds until what was deferred is tried again in the same session: the first time, and, each time
# twice as long, at the most.  A session looks for all that waits after so long in any case: an
# answer that the disk could not take is settled later, and what was deferred waits only then.
AGAIN_FIRST, AGAIN_LAST = 60.0, 900.0


def _nothing() -> None:
    pass


def _made_ready(content: bytes | Content) -> bytes | Content:
    """The event loop is not to work on a large message that cannot be sent as it is."""
    if isinstance(content, bytes) and len(content) > PIECE:
        return Octets(content)
    return content


def _ident_of(envelope: Envelope) -> str:
    """What tells its message from others; ``""``: nothing does."""
    return envelope.client.ident if envelope.client is not None else ""


class Passing:
    """A transaction that is passed on, for which someone waits.

    ``answer``  what the customer said; ``None`` when it never will.
    ``message`` as it goes out.
    ``late``    no one waits for it any more.
    """

    __slots__ = ("answer", "late", "message")

    def __init__(self, envelope: Envelope, content: bytes | Content | None) -> None:
        self.answer: asyncio.Future[Sent | None] = asyncio.get_running_loop().create_future()
        self.message = Outgoing(self, envelope, content)
        self.late = False

    def end(self, sent: Sent | None = None) -> None:
        """Whoever waits hears it."""
        if not self.answer.done():
            self.answer.set_result(sent)


#: Messages of a feed, with their octets.
Page = Sequence[tuple[Held, bytes | Content]]


class HandOver:
    """Hands over what ``store`` holds for ``account``, down ``connection``::

        first = await hand_over.open(domains)     # what waits
        hand_over.begin(sender, timeout)          # the connection is the sender's now
        await hand_over.run(first)                # if it rests then, resume() follows
        await hand_over.close()                   # in any case

    ``settler``  takes the customer's answers.
    ``sent``     held messages that the customer has answered.
    ``passed_on``, ``fell_back``  messages of which the sender heard the customer's answer, and that
                 were held because there was none in time.
    ``resting``  nothing runs, and the session is open.

    The connection passes its events to :meth:`handle`, and says :meth:`look` when it is lost.
    """

    __slots__ = (
        "_account",
        "_again_at",
        "_again_in",
        "_alarm",
        "_alone",
        "_asked_again",
        "_awake",
        "_connection",
        "_deferred",
        "_domains",
        "_dry",
        "_excused",
        "_feed",
        "_heard_at",
        "_keepalive",
        "_late",
        "_late_replies",
        "_more",
        "_news",
        "_sender",
        "_settler",
        "_stopped",
        "_store",
        "_stuck",
        "_timeout",
        "_under_way",
        "fell_back",
        "passed_on",
        "resting",
        "sent",
    )

    def __init__(
        self, connection: Driver, store: HoldStore, settler: Settler, account: str
    ) -> None:
        self.sent = self.passed_on = self.fell_back = 0
        self._connection, self._store, self._settler = connection, store, settler
        self._account = account
        self._sender: Sender | None = None
        self._timeout = 0.0
        self._keepalive: float | None = None
        self._awake: Callable[[], None] = _nothing
        self.resting = False
        self._alarm: asyncio.TimerHandle | None = None
        self._feed: Feed | None = None
        self._stopped = False
        self._news: asyncio.Future[None] | None = None  # is waited for
        self._more = False  # there may be mail that the feed has not shown
        self._dry = False  # the feed has shown all, unless the store has told of more
        self._asked_again = False
        # In the order in which they are answered.
        self._under_way: list[Held | Passing] = []
        self._late = 0  # of those under way
        # By the ident of the message, and the recipient.
        self._late_replies: OrderedDict[str, Mapping[str, Reply]] = OrderedDict()
        self._stuck = False  # one was late, and nothing has been answered since
        self._alone = False  # the one that is sent now
        self._domains: Collection[str] | None = None
        self._excused = False  # if the session breaks, it is not over what is under way
        self._deferred = False
        self._again_in, self._again_at = AGAIN_FIRST, 0.0
        self._heard_at = 0.0

    # -- what the connection says ---------------------------------------------------------------

    def handle(self, event: object) -> None:
        """Something happened in the sender."""
        if isinstance(event, Ready):
            self.look()
        elif isinstance(event, Sent):
            self._answered(event)
        elif isinstance(event, NotForwarded):
            log_safely(
                log,
                logging.WARNING,
                "account=%s XFORWARD reply=%r: the customer is not told which hosts its mail came "
                "from",
                *(self._account, str(event.reply)),
            )
        elif isinstance(event, Broken):
            self._excused = self._excused or event.said_so
            self._connection.broken = self._connection.broken or event.reason
            self.lost()

    def heard(self) -> None:
        """The customer has said something."""
        self._heard_at = asyncio.get_running_loop().time()

    def look(self) -> None:
        """Room, an answer, mail, an end: whoever waits looks again."""
        if self._news is not None:
            if not self._news.done():
                self._news.set_result(None)
        elif self.resting:
            self._stir()

    def lost(self) -> None:
        """There will be no more answers."""
        for one in self._under_way:
            if isinstance(one, Passing):
                one.end()
        self.look()

    def stop(self) -> None:
        """Send no more than what is under way."""
        self._stopped = self._excused = True
        self.look()

    def wake(self) -> None:
        """Mail has come."""
        self._more = True
        self.look()

    def ask_again(self) -> None:
        """Before the session ends, see whether mail has come since it began.  Unasked it does not:
        what comes while it lasts may be what it brings about, without an end."""
        self._asked_again = True

    def start_over(self) -> None:
        """Mail that was another session's may be anyone's now."""
        if self._feed is not None:
            self._feed.start_over()
        self.wake()

    # -- from a sender to the customer ----------------------------------------------------------

    def passes(self, domain: str) -> bool:
        """Transactions with recipients in this domain can be passed on now: the session stays open,
        and answers in time."""
        return (
            self._keepalive is not None
            and self._sender is not None
            and not self._stopped
            and not self._late
            and not self._stuck
            and len(self._under_way) < MOST_WAITING
            and self._connection.broken is None
            and (self._domains is None or domain in self._domains)
            and not self._alone
        )

    def pass_on(self, envelope: Envelope, content: bytes | Content | None) -> Passing:
        """Send a message for which someone waits, or ask for its recipients (``None``)."""
        assert self._sender is not None
        passing = Passing(envelope, content)
        if self._connection.broken is not None:
            passing.end()
            return passing
        self._under_way.append(passing)
        self.be_patient()
        self._connection.happened(self._sender.send(passing.message))
        return passing

    def give_up(self, passing: Passing) -> None:
        """Wait no more for its answer, which is late.  Until that has come after all, nothing is
        passed on."""
        if not self.forget(passing) and passing in self._under_way:
            passing.late = True
            self._late += 1
        self._stuck = bool(self._under_way)

    def forget(self, passing: Passing) -> bool:
        """No one wants its answer any more.  Whether it will never be sent."""
        passing.end()
        withdrawn = self._sender is not None and self._sender.withdraw(passing.message)
        if withdrawn:
            self._under_way.remove(passing)
            self.look()
        return withdrawn

    # -- from the feed to the customer ----------------------------------------------------------

    async def open(self, domains: Collection[str] | None = None) -> Page:
        """Open the feed, for recipients in ``domains`` if given; returns what goes out first.
        Raises :class:`OSError` when the store cannot be read."""
        self._domains = domains
        return await self._next_page()

    def begin(self, sender: Sender, timeout: float) -> None:
        """``sender`` speaks on the connection from now on; ``timeout``: seconds that the customer
        may be silent while anything is under way."""
        self._sender, self._timeout = sender, timeout
        self.heard()
        self._again_at = self._heard_at + AGAIN_LAST

    def stay(self, keepalive: float, awake: Callable[[], None]) -> None:
        """The session stays open for what comes later.

        ``keepalive``  after so many seconds of silence it is seen whether the customer is there.
        ``awake``      has :meth:`resume` run, when there is something to do.
        """
        self._keepalive, self._awake = keepalive, awake

    async def run(self, page: Page) -> None:
        """Send what there is.  Returns when all is answered, or, in a session that stays open, when
        it rests.  Raises :class:`ConnectionError` when the session breaks."""
        self.be_patient()
        while True:
            for held, content in page:
                await self._wait_until(lambda: self._may_send)
                if self._stopped:
                    break
                await self._send(held, content)
            if not self._stopped:
                page = () if self._dry and not self._more else await self._next_page()
                if page:
                    continue
                if self._keepalive is not None:
                    if not self._is_needed:
                        self._rest()
                        return
                    self._look_again()
                    continue
            await self._wait_until(lambda: not self._under_way)
            if self._stopped or not self._asked_again:
                return
            self._asked_again = False
            page = await self._next_page()

    async def resume(self) -> None:
        """Go on after a rest.  Raises :class:`ConnectionError` when the session breaks."""
        self._look_again()
        await self.run(())

    async def close(self) -> None:
        """What was answered is settled, what was not is anyone's; unless the session rests.

        A connection on which anything is under way is dropped first: another session may send that
        at once, and no one is to have two sessions that send it."""
        if self._feed is None or self.resting:
            return
        feed, self._feed = self._feed, None
        self.lost()
        try:
            if self._under_way:
                first, broken = self._under_way[0], self._connection.broken is not None
                if isinstance(first, Held) and broken and not self._excused:
                    await self._strike(first)
                self._connection.abort("what is under way is given up")
        finally:
            feed.close()

    async def _next_page(self) -> Page:
        """The next messages of the feed, and their octets; none, if there are no more until the
        store tells of some."""
        self._more = False
        page = await asyncio.to_thread(self._read)
        self._dry = not page
        return page

    def _read(self) -> Page:
        """In a thread: one change of threads is what most sessions come with."""
        store = self._store
        if (feed := self._feed) is None:
            feed = self._feed = store.feed(self._account, self._domains)
        page = feed.take(PAGE, PAGE_OCTETS)
        found = store.load([held.key for held in page]) if page else {}
        return [(held, _made_ready(found[held.key])) for held in page if held.key in found]

    def be_patient(self) -> None:
        """How long the customer may be silent: for the answer to a message RFC 5321 4.5.3.2.6 has
        10 minutes."""
        if self._keepalive is not None and not self._under_way:
            self._connection.wait_at_most(DEAD_AFTER * self._keepalive)
        else:
            self._connection.wait_at_most(self._timeout)

    @property
    def _may_send(self) -> bool:
        return self._stopped or (self._sender is not None and self._sender.room)

    async def _send(self, held: Held, content: bytes | Content) -> None:
        """Send a message; one over which a session broke goes alone.  What the customer has said of
        it already, or is about to, is not asked again."""
        await self._wait_until(lambda: not self._is_answered_late(held))
        if replies := self._late_replies_of(held):
            self._held_answered(held, replies)
            return
        if self._stopped:  # while we waited
            return
        self._alone = bool(held.strikes)
        if self._alone:
            await self._wait_until(lambda: not self._under_way)
        assert self._sender is not None and self._feed is not None
        if not self._feed.has(held.key):
            self._alone = False
            return
        self._under_way.append(held)
        self.be_patient()
        self._connection.happened(self._sender.send(Outgoing(held, held.envelope, content)))
        if self._alone:
            await self._wait_until(lambda: not self._under_way)
            self._alone = False

    def _is_answered_late(self, held: Held) -> bool:
        """This message was passed on, too late for its sender, and is under way still."""
        return self._late > 0 and any(
            isinstance(one, Passing)
            and one.late
            and one.message.data is not None
            and _ident_of(one.message.envelope) == _ident_of(held.envelope) != ""
            for one in self._under_way
        )

    def _late_replies_of(self, held: Held) -> Sequence[Reply]:
        """What the customer said of a held message too late for its sender; nothing, if it has not
        been asked for all of the recipients."""
        known = self._late_replies.pop(_ident_of(held.envelope), {})
        replies = [known[one] for one in held.envelope.recipients if one in known]
        return replies if len(replies) == len(held.envelope.recipients) else ()

    async def _wait_until(self, so: Callable[[], bool]) -> None:
        """Wait until something is so.  Raises :class:`ConnectionError` when it never will be."""
        while not so():
            self._raise_if_broken()
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            finally:
                self._news = None

    def _raise_if_broken(self) -> None:
        if self._connection.broken is not None:
            raise ConnectionError(self._connection.broken)

    # -- the rest -------------------------------------------------------------------------------

    def _rest(self) -> None:
        """Until :attr:`_is_needed`."""
        self.resting = True
        self._set_alarm()

    @property
    def _is_needed(self) -> bool:
        """There may be mail, or a reason to end."""
        broken = self._connection.broken is not None
        return self._more or self._stopped or broken or self._is_time_again

    @property
    def _is_time_again(self) -> bool:
        """What was deferred may be tried again."""
        return not self._under_way and asyncio.get_running_loop().time() >= self._again_at

    def _look_again(self) -> None:
        """Have the feed show what was deferred, if it is time.  Raises :class:`ConnectionError`
        when the session has broken."""
        self._raise_if_broken()
        if self._is_time_again and self._feed is not None:
            if self._deferred:
                self._again_in = min(2 * self._again_in, AGAIN_LAST)
            self._deferred = False
            self._again_at = asyncio.get_running_loop().time() + AGAIN_LAST
            self._feed.start_over()
            self._dry = False

    def _stir(self) -> None:
        """Go back to work, if there is any."""
        if self._is_needed:
            self.resting = False
            self._awake()
        self._set_alarm()

    def _set_alarm(self) -> None:
        """For a NOOP, and for what was deferred."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if not self.resting or self._keepalive is None:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        until = max(self._heard_at + self._keepalive, now + 1.0)
        self._alarm = loop.call_at(min(until, max(self._again_at, now + 0.01)), self._ring)

    def _ring(self) -> None:
        """See whether the customer is still there, when it was silent for long."""
        assert self._sender is not None and self._keepalive is not None
        silent = asyncio.get_running_loop().time() - self._heard_at
        if silent >= self._keepalive and self._sender.idle:
            self._connection.happened(self._sender.noop())
        self._stir()

    # -- what comes back ------------------------------------------------------------------------

    def _answered(self, sent: Sent) -> None:
        key = sent.message.key
        self._stuck = False
        if isinstance(key, Passing):
            self._under_way.remove(key)
            if key.late:
                self._late -= 1
                self._note_late(sent)
            key.end(sent)
        else:
            assert isinstance(key, Held)
            self._under_way.remove(key)
            self._held_answered(key, sent.replies)
        if not self._under_way:
            self.be_patient()
        self.look()

    def _note_late(self, sent: Sent) -> None:
        """The customer has answered after all; its message is held, or about to be."""
        envelope = sent.message.envelope
        if sent.message.data is None or not sent.asked or not _ident_of(envelope):
            return
        replies = dict(zip(envelope.recipients, sent.replies, strict=True))
        self._late_replies[_ident_of(envelope)] = replies
        while len(self._late_replies) > MOST_LATE:
            self._late_replies.popitem(last=False)

    def _held_answered(self, held: Held, replies: Sequence[Reply]) -> None:
        assert self._feed is not None
        self.sent += 1
        if any(is_for_later(reply) for reply in replies):
            if not self._deferred:
                self._again_at = asyncio.get_running_loop().time() + self._again_in
            self._deferred = True
        elif not self._deferred:
            self._again_in = AGAIN_FIRST
        self._feed.leave([held.key])
        self._settler.settle(Answered(held, replies))

    async def _strike(self, held: Held) -> None:
        """The session broke, and this is the message that the customer was answering."""
        reason = f"the session broke over it: {self._connection.broken}"
        try:
            struck = await asyncio.to_thread(self._store.strike, held.key, MOST_STRIKES, reason)
        except (OSError, RuntimeError) as error:  # or the machine has no thread to spare
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
