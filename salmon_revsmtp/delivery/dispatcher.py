"""One message, all its recipients: what is added, what is refused, and how the replies add up.

Every recipient is delivered on its own, and has a reply of its own.  A client that asked for PRDR
hears each; for the others they are combined so that no one is served twice and no one is
forgotten (RFC 5321 4.1.1.4 knows one reply only):

- all succeeded: 250;
- a temporary failure among them: that one.  The journal remembers who has been served, so that
  the client's retry serves only the rest;
- permanent failures beside successes: 250, after a delivery status notification for the failed
  ones (RFC 3464) is safe on disk, on its way to the sender;
- only permanent failures: the first of them.

The order for each recipient is: handled, recorded, told to the plugins, answered.  Between the
first two a crash makes a repeat when the client sends the message again, and loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from salmon_revsmtp.delivery.batches import BatchWorker
from salmon_revsmtp.delivery.inhand import InHand
from salmon_revsmtp.delivery.notifier import Notifier
from salmon_revsmtp.delivery.trace import MAX_HOPS, AddedFields, Origin, hops, separator
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.journal.claims import Claims, SharedClaims
from salmon_revsmtp.journal.deliveries import DeliveryJournal, DeliveryRecord, MessageKey
from salmon_revsmtp.net.together import together
from salmon_revsmtp.safelog import LogBudget, log_safely
from salmon_revsmtp.smtp.content import PIECE, Sink, with_lf
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

__all__ = [
    "Deliverer",
    "Delivery",
    "Dispatcher",
    "PendingDelivery",
    "SharedWork",
    "delivered",
    "last_of_many",
    "refusal_by",
    "refusal_of",
]

log = logging.getLogger(__name__)

# Seconds between two looks of the event loop at what has been delivered and not been answered.
LOOK_EVERY = 0.05

# Seconds that the event loop waits for a batch which may be done at once, and the messages that it
# has at most.  How often it does not wait after one that was late: 1, 3, 7 times and so on, and
# no more than this.
MOMENT = 0.002
AT_ONCE = 10
MOST_PASSES = 1023

# Recipients that are looked up together: of a batch of messages for one each all, of messages for
# a thousand one.
LOOK_UP = 256

# Octets of messages that are made safe together: as many as a disk writes in some milliseconds.
GROUP_OCTETS = 1024 * 1024

# As provider.idents has it.
_IDENT = re.compile(r"[0-9a-f]{64}\.[0-9]{1,10}")

BUG = Reply(451, "internal error, try again later", "4.3.0")
GONE = Reply(451, "the connection is gone", "4.4.2")
STOPPED = Reply(451, "shutting down, try again later", "4.3.2")
ELSEWHERE = Reply(451, "it is being handled elsewhere, try again later", "4.3.0")
LOOP = Reply(554, f"mail loop detected: {MAX_HOPS} Received headers", "5.4.6")


#: A message without its trace, in the form in which Salmon's own receivers give it to handlers: LF
#: line ends, the last line without one.  A view, as a rule, so that a large one is not copied.
Content = bytes | memoryview


class Delivery(Protocol):
    """How one message for one recipient is handed to Salmon."""

    def deliver(
        self,
        peer: tuple[str, int],
        envelope: Envelope,
        recipient: str,
        trace: bytes,
        content: Content,
    ) -> Reply:
        """Make the message, which is ``trace`` and then ``content``, safe, then return 2yz; else
        the reply that says why not."""


@runtime_checkable
class GroupDelivery(Protocol):
    """One that makes messages safe together: what comes while others are written waits for them,
    and costs little beside them."""

    def write(self, envelope: Envelope, recipient: str, trace: bytes, content: Content) -> Any:
        """Write a message for a recipient; returns what :meth:`keep` is to be given, and no
        reference to ``content``.  Does not raise."""

    def spool(self, envelope: Envelope, recipient: str, trace: Callable[[bytes], bytes]) -> Sink:
        """Where a large message goes while it comes, for its first recipient.  ``trace`` is given
        its first lines, and returns what goes before them.  Does not raise."""

    def finish(self, spool: Any) -> Any:
        """:meth:`write`, for that recipient; it is in the spool no more.  Does not raise."""

    def write_spooled(self, envelope: Envelope, recipient: str, trace: bytes, spool: Any) -> Any:
        """:meth:`write`, for another recipient, before that.  Does not raise."""

    def whole(self, spool: Any) -> bytes | Reply:
        """All of what is in it, with LF line ends, or the reply that says why it is not there.
        Does not raise."""

    def keep(self, written: Sequence[tuple[str, Any]]) -> Sequence[Reply]:
        """Make what was written for these recipients safe, or drop it; the reply for each, which
        stays the one that it is where there is one in place of what was written."""


def _nothing() -> None:
    pass


def _no_one_asked(heard: bool) -> None:
    pass


@dataclass(eq=False)
class PendingDelivery:
    """A message on its way to its recipients, how far that is, and what its client is to hear.

    ``origin``     where it came from.
    ``data``       its octets as they came; none once it is answered, for a handler that hangs may
                   hold the rest of this for ever.
    ``sink``       where its octets went while they came, if there were many; then ``data`` has
                   none.
    ``size``       how many they were.
    ``key``        what it is known by in the journal, once its turn has come.
    ``replies``    one per recipient, in the envelope's order, as far as it has come.
    ``delivered``  how many recipients have it now who had it not before.
    ``reply``      for the whole message; ``None`` until it is settled.
    ``answered``   called in the event loop once ``reply`` is there.
    ``since``, ``until``  when it came, and when its time is up, on the event loop's clock.
    ``number``     its place among those of its session when it came.
    ``over``       called when nothing will be done for it any more, from whatever thread.
    ``heard``      called once when its client has gone on after the answer, and so has heard it
                   (``True``), or is gone: :meth:`ask_whether_heard`.
    ``unheard``    its client is gone.
    ``log``        what its lines are written with: all that its client can make us log is bounded.
    """

    origin: Origin
    envelope: Envelope
    data: bytes
    key: MessageKey | None = None
    replies: list[Reply] = field(default_factory=list)
    delivered: int = 0
    reply: Reply | None = None
    answered: Callable[[], None] | None = None
    since: float = 0.0
    until: float = 0.0
    number: int = 1
    over: Callable[[], None] = _nothing
    heard: Callable[[bool], None] = _no_one_asked
    unheard: bool = False
    log: LogBudget = field(default_factory=LogBudget)
    begun: bool = False
    abandoned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    size: int = 0
    sink: Sink | None = None

    def begin(self) -> bytes | None:
        """Its octets, with LF line ends, or the first of them where they are in a sink, if anyone
        still waits for it."""
        with self.lock:
            self.begun = not self.abandoned
            data = self.data if self.sink is None else self.sink.beginning()
        if not self.begun:
            return None
        # For a small one a call more would cost what it saves.
        return with_lf(data) if len(data) > PIECE else data.replace(b"\r\n", b"\n")

    def add(self, reply: Reply, repeat: bool) -> None:
        """Note the reply for the next recipient, for whoever still waits for it."""
        with self.lock:
            if not self.abandoned:
                self.replies.append(reply)
                self.delivered += reply.positive and not repeat

    def settle(self, reply: Reply) -> None:
        """This is the reply, for whoever still waits for it."""
        with self.lock:
            if not self.abandoned:
                self.reply = reply

    def ask_whether_heard(self, tell: Callable[[bool], None]) -> None:
        """Have ``tell`` called once: with ``True`` when the client has heard the answer, or with
        ``False`` as soon as it is gone, which may be long before there is one."""
        with self.lock:
            gone = self.unheard
            if not gone:
                self.heard = tell
        if gone:
            tell(False)

    def note_heard(self, heard: bool) -> None:
        """The client has heard the answer, or it never will."""
        with self.lock:
            tell, self.heard = self.heard, _no_one_asked
            self.unheard = not heard
        tell(heard)

    def abandon(self, reply: Reply, *, if_not_begun: bool = False) -> bool:
        """Wait no longer: ``reply`` goes to whoever has not been served so far.  Returns whether no
        one waits for the rest of it from now on."""
        with self.lock:
            if self.begun and if_not_begun:
                return False
            if self.reply is None:
                self.abandoned = True
                self.replies += [reply] * (len(self.envelope.recipients) - len(self.replies))
                last = last_of_many(self.replies) if self.envelope.prdr else None
                self.reply = last or reply
            return True


def last_of_many(replies: Sequence[Reply]) -> Reply | None:
    """The reply that a client hears after those of the recipients (PRDR), if any took it."""
    taken = sum(reply.positive for reply in replies)
    return Reply(250, f"taken for {taken} of {len(replies)} recipients", "2.0.0") if taken else None


class Deliverer(Protocol):
    """What sessions give whole messages to."""

    def deliver(self, pending: PendingDelivery, answered: Callable[[], None]) -> None:
        """Have a message delivered, and call ``answered`` in the event loop when
        ``pending.reply`` and ``pending.replies`` say what became of it."""

    @property
    def sinks(self) -> Callable[[Origin, Envelope], Sink] | None:
        """Makes the place where a large message goes while it comes, if there is one."""

    def let_go(self, pending: PendingDelivery) -> bool:
        """No one will hear the answer to this message.  Whether it is forgotten."""


async def delivered(deliverer: Deliverer, pending: PendingDelivery) -> Reply:
    """Have a message delivered, and wait for that; returns the reply."""
    done, data = asyncio.Event(), pending.data
    deliverer.deliver(pending, done.set)
    await done.wait()
    pending.data = data  # which the caller has, too
    assert pending.reply is not None
    return pending.reply


def refusal_of(hook: str, said: object) -> Reply | None:
    """What a hook has returned that may refuse something: its :class:`Reply`, if that is a
    refusal."""
    if said is None or (isinstance(said, Reply) and (said.transient or said.permanent)):
        return said
    text = "hook=%s returned %r, which refuses nothing; ignored"
    log_safely(log, logging.ERROR, text, hook, said)
    return None


def refusal_by(plugins: HookCaller, hook: str, **arguments: Any) -> Reply | None:
    """Whether a plugin refuses something, asked in a thread that others work in, too: a hook that
    tries to end the process defers it."""
    try:
        return refusal_of(hook, plugins.call(hook, **arguments))
    except SystemExit:
        log_safely(log, logging.ERROR, "hook=%s tried to end the process", hook, error=True)
        return BUG


@dataclass(eq=False)
class _Batch:
    """What is known of a batch while a thread has it in hand.

    ``log_at``     when its log lines are written at the latest, on the monotonic clock.
    ``lines``      those that are not written yet.
    ``looked_up``  the messages that the rest is about.
    ``known``      who of them has been served before.
    ``elsewhere``  what another process has in hand.
    ``claimed``    what no other process may have until it is released.
    ``group``      messages that are written, and not safe yet; ``group_octets`` of them.
    ``seconds``    how long the handlers had the last message, or the queue; 0: they did not get it.
    """

    log_at: float
    lines: deque[tuple[PendingDelivery, str, Reply, bool]] = field(default_factory=deque)
    looked_up: Sequence[PendingDelivery] = ()
    known: dict[MessageKey, dict[str, DeliveryRecord]] = field(default_factory=dict)
    elsewhere: Collection[MessageKey] = ()
    claimed: Collection[MessageKey] = ()
    group: dict[MessageKey, _Written] = field(default_factory=dict)
    group_octets: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Written:
    """A message that is written for some recipients, and not safe yet.

    ``known``  who had it before.
    ``lines``  its octets, with LF line ends; ``content``: without the last of them.  The first of
               them where the rest is in ``spool``.
    ``made``   what was written for each recipient, or the refusal of a plugin.
    """

    pending: PendingDelivery
    known: dict[str, DeliveryRecord]
    lines: bytes
    content: Content
    spool: Sink | None = None
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SharedWork:
    """What dispatchers share that deliver messages of one service in several threads."""

    claims: SharedClaims
    in_hand: InHand[PendingDelivery] = field(default_factory=InHand)


class Dispatcher:
    """Delivers messages of one service in the threads of ``worker``: one after another if that has
    one.

    ``service``          its name.
    ``claims``           what this dispatcher is delivering; or, if ``worker`` has several threads,
                         what they share.
    ``turn``             held while ``delivery`` is at work, which others may not be then.
    ``spell``            a recipient in the form that it is routed, recorded and logged in.
    ``handler_timeout``  seconds from a message's end to its answer.
    ``repeat_seconds``   how long a message that is redelivered is known.
    ``share``            asked for an agent when a message of it comes; what it returns is called
                         when nothing will be done for that message any more.
    ``at_once``          a message is delivered in a moment, if its handlers do not wait for
                         something else: the event loop may wait that long.
    """

    def __init__(
        self,
        service: str,
        delivery: Delivery,
        journal: DeliveryJournal,
        claims: Claims | SharedWork,
        plugins: HookCaller,
        notifier: Notifier,
        worker: BatchWorker[PendingDelivery],
        *,
        turn: AbstractContextManager[object],
        spell: Callable[[str], str],
        handler_timeout: float,
        repeat_seconds: float,
        share: Callable[[str], Callable[[], None]] = lambda agent: _nothing,
        at_once: bool = False,
    ) -> None:
        self._service = service
        self._spell = spell
        self._share = share
        self._handler_timeout, self._repeat_seconds = handler_timeout, repeat_seconds
        self._delivery = delivery
        self._groups = delivery if isinstance(delivery, GroupDelivery) else None
        self._journal = journal
        self._in_hand = claims.in_hand if isinstance(claims, SharedWork) else None
        self._claims = claims.claims if isinstance(claims, SharedWork) else claims
        self._turn = turn
        self._plugins = plugins
        self._notifier = notifier
        self._worker = worker
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[PendingDelivery] = deque()
        self._looking = False  # soon
        self._come: list[PendingDelivery] = []  # in this turn of the loop
        self._at_once = at_once
        self._passes = self._misses = 0  # see _wait_a_moment
        # What the threads have ended, and the loop has not seen; whether it waits for that.
        self._ending, self._end = threading.Lock(), threading.Lock()
        self._end.acquire()
        self._ended: list[PendingDelivery] = []
        self._awaited = False
        self._batches: set[_Batch] = set()  # those in hand

    # -- in the event loop ------------------------------------------------------------------------

    @property
    def sinks(self) -> Callable[[Origin, Envelope], Sink] | None:
        """Handlers and plugins get whole messages; in a queue there is a place for large ones."""
        if self._groups is None or self._plugins.implemented("message_received"):
            return None
        return functools.partial(self._spool, self._groups)

    def _spool(self, groups: GroupDelivery, origin: Origin, envelope: Envelope) -> Sink:
        """For the first recipient of all; copies are for the others."""
        envelope = envelope.spelled(self._spell)
        first = envelope.recipients[0]
        return groups.spool(
            envelope, first, lambda lines: origin.received(envelope, first) + separator(lines)
        )

    def deliver(self, pending: PendingDelivery, answered: Callable[[], None]) -> None:
        """Deliver a message to every recipient, and call ``answered`` in the event loop when all of
        them are safe or refused: ``pending.reply`` and ``pending.replies`` say what became of it.

        Past ``handler_timeout`` the answer is 451 for those that are not.  A message whose turn has
        not come by then is not handled at all; a handler that is running goes on, and what comes of
        it is recorded for the client's retry, which waits for it.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # no one waits any more on the one before
            self._loop, self._looking = loop, False
            self._waiting.clear()
            come, self._come = self._come, []
            for one in come:
                self.drop(one)
            with self._ending:
                self._ended.clear()
        pending.envelope = pending.envelope.spelled(self._spell)
        pending.size = len(pending.data) if pending.sink is None else pending.sink.size
        pending.answered = answered
        pending.since = loop.time()
        pending.until = pending.since + self._handler_timeout
        self._waiting.append(pending)
        if pending.origin.agent is not None:
            pending.over = self._share(pending.origin.agent.name)
        self._come.append(pending)
        if len(self._come) == 1:
            loop.call_soon(self._submit)

    def _submit(self) -> None:
        """What has come in one turn of the event loop goes to the threads together."""
        come, self._come = self._come, []
        try:
            if come:
                self._worker.submit(self, *come)
        except RuntimeError:  # the threads are closed
            for pending in come:
                pending.abandon(STOPPED)
                self.drop(pending)
        self._look_soon()
        if self._at_once and 0 < len(come) <= AT_ONCE:
            self._wait_a_moment()

    def _wait_a_moment(self) -> None:
        """See whether what was submitted is done at once, as it is where handlers do not wait for
        anything: then it is answered in this turn of the event loop.  The thread has no one to
        share the interpreter with meanwhile, and there are no two that wake each other.

        Where it is not done in a moment, this is not tried again for a while.
        """
        if self._passes:
            self._passes -= 1
            return
        with self._ending:
            self._awaited = not self._ended
        if self._awaited and not self._end.acquire(timeout=MOMENT):
            with self._ending:
                late, self._awaited = self._awaited, False
            if late:
                self._misses = min(2 * self._misses + 1, MOST_PASSES)
                self._passes = self._misses
                return
            self._end.acquire()
        self._misses = 0
        self._answer_ended()

    def _answer_ended(self) -> None:
        """Answer what has ended since this was done before."""
        with self._ending:
            ended, self._ended = self._ended, []
        self._answer(ended)

    def let_go(self, pending: PendingDelivery) -> bool:
        """No one will hear the answer to this message.  If its handling has not begun it is
        forgotten, and its client, which has no 250, keeps it; else ``False``: it goes on to its
        end, so that it is recorded for the client's next try."""
        forgotten = pending.abandon(GONE, if_not_begun=True)
        if forgotten:
            pending.answered = None
            self._withdraw(pending)
        pending.data = b""  # a handler has its own
        return forgotten

    def _withdraw(self, pending: PendingDelivery) -> None:
        """Wherever it waits for its turn, it does so no more."""
        if pending in self._come:
            self._come.remove(pending)
            self.drop(pending)
        elif self._in_hand is not None and self._in_hand.forget(pending):
            self.drop(pending)
        else:
            self._worker.withdraw(self, pending)

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    def _look(self) -> None:
        """No answer waits for a slow handler after it in its batch, or past its time."""
        self._looking = False
        now = asyncio.get_running_loop().time()
        try:
            for pending in self._waiting:
                if pending.reply is None and pending.until <= now:
                    self._abandon(pending)
            if any(one.reply is not None for one in self._waiting):
                for batch in list(self._batches):  # before the answer leaves
                    self._log_lines(batch)
                self._answer(self._waiting)
        finally:
            self._waiting = deque(one for one in self._waiting if one.answered is not None)
            if self._waiting:
                self._look_soon()

    def _answer(self, deliveries: Sequence[PendingDelivery]) -> None:
        """The one way by which answers leave: whoever waits for one that is settled hears it."""
        with together():
            for pending in deliveries:
                answered = pending.answered
                if answered is not None and pending.reply is not None:
                    pending.answered = None
                    try:
                        answered()
                    except Exception:  # the others have nothing to do with it
                        log_safely(log, logging.ERROR, "answering failed", error=True)
                    pending.data = b""

    def _abandon(self, pending: PendingDelivery) -> None:
        text = f"not done in {self._handler_timeout:g} seconds, try again later"
        late = Reply(451, text, "4.3.0")
        pending.abandon(late)
        self._withdraw(pending)
        pending.log.log(
            log,
            logging.WARNING,
            "%s from=%s reply=%r %s",
            pending.origin.label_of(pending.envelope),
            angle(pending.envelope.reverse_path),
            str(late),
            "handler still running" if pending.begun else "not started",
        )

    # -- in the threads ---------------------------------------------------------------------------

    def begin(self, items: Sequence[PendingDelivery]) -> _Batch:
        """A batch: see which of them have been delivered before."""
        batch = _Batch(time.monotonic() + LOOK_EVERY)
        self._batches.add(batch)
        if self._in_hand is None:  # else another thread may deliver one of them meanwhile
            self._look_up(batch, (pending for pending in items if not pending.abandoned))
        return batch

    def _look_up(self, batch: _Batch, items: Iterable[PendingDelivery]) -> None:
        """See what the journal knows of the first of these: as many as have a few hundred
        recipients together, and one at least, for a batch may end before the others' turn."""
        wanted: dict[MessageKey, list[str]] = {}
        recipients, looked_up = 0, []
        for pending in items:
            if pending.key is None:
                pending.key = self._key_of(pending)
            wanted.setdefault(pending.key, []).extend(pending.envelope.recipients)
            recipients += len(pending.envelope.recipients)
            looked_up.append(pending)
            if recipients >= LOOK_UP:
                break
        # Those before have been delivered.  First claimed, then looked up: what another process has
        # in hand may be recorded between.
        self._claims.release(batch.claimed)
        batch.looked_up, batch.claimed = looked_up, ()
        batch.elsewhere = elsewhere = self._claims.claim(wanted)
        batch.claimed = wanted.keys() - elsewhere
        batch.known = self._journal.known_all(wanted, self._repeat_seconds)

    def _key_of(self, pending: PendingDelivery) -> MessageKey:
        """What a repeat of this message has in common with it: its octets; or the ident that a
        provider of ours has for it, which it has for a message that its own sender sends again,
        too.  Of one that is abandoned meanwhile there may be no octets; that one is not begun."""
        envelope, known_by = pending.envelope, pending.data
        client = envelope.client
        if client is not None and _IDENT.fullmatch(client.ident):  # of a host that is believed
            known_by = client.ident.encode()
        elif pending.sink is not None:
            return MessageKey.by_digest(self._service, envelope.reverse_path, pending.sink.digest)
        return MessageKey.of(self._service, envelope.reverse_path, known_by)

    def do(self, item: PendingDelivery, batch: _Batch) -> None:
        """Deliver one message, if anyone still waits for it."""
        if self._in_hand is not None and not self._take(self._in_hand, item):
            return
        lines = item.begin()
        try:
            if lines is not None:
                self._deliver(item, batch, lines)
        except BaseException:  # a hook may even try to end the process
            item.abandon(BUG)
            log_safely(log, logging.ERROR, "%s a delivery failed", item.origin.label, error=True)
        finally:
            if self._in_hand is not None:
                self._keep(batch)
                self._in_hand.give_back(item)
            written = batch.group.get(item.key) if item.key is not None else None
            if written is None or written.pending is not item:
                self.drop(item)

    def _take(self, in_hand: InHand[PendingDelivery], item: PendingDelivery) -> bool:
        """Whether no other thread has this message in hand; else it goes on when none has."""
        if item.key is None:
            item.key = self._key_of(item)
        recipients, go_on = item.envelope.recipients, functools.partial(self._go_on, item)
        taken = in_hand.take(item, item.key, recipients, go_on)
        if not taken and item.abandoned and in_hand.forget(item):  # it was withdrawn just now
            self.drop(item)
        return taken

    def _go_on(self, item: PendingDelivery) -> None:
        """Its turn comes next."""
        try:
            self._worker.submit(self, item, before_others=True)
        except RuntimeError:  # the threads are closed
            item.abandon(STOPPED)
            self.drop(item)

    def drop(self, item: PendingDelivery) -> None:
        """Nothing more will be done for it."""
        if item.sink is not None:
            item.sink.discard()
        over, item.over = item.over, _nothing
        try:
            over()
        except Exception:  # the others of its batch have nothing to do with it
            log_safely(log, logging.ERROR, "letting an agent's lock go failed", error=True)

    def end(self, items: Sequence[PendingDelivery], batch: _Batch) -> None:
        """Log those of a batch, and answer them."""
        self._keep(batch)
        self._batches.discard(batch)
        self._claims.release(batch.claimed)
        self._log_lines(batch)
        with self._ending:
            first = not self._ended
            self._ended += items
            awaited, self._awaited = self._awaited, False
        if awaited:
            self._end.release()
        elif first:
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # no one waits on a loop that is closed
                self._loop.call_soon_threadsafe(self._answer_ended)

    def _deliver(self, pending: PendingDelivery, batch: _Batch, lines: bytes) -> None:
        if pending.key in batch.group:
            self._keep(batch)  # the same message again
        if pending not in batch.looked_up:
            self._keep(batch)
            self._look_up(batch, [pending])
        key = pending.key
        assert key is not None
        refusal = LOOP if hops(lines) >= MAX_HOPS else None
        known = batch.known[key]
        spool = pending.sink
        if key in batch.elsewhere:
            refusal = ELSEWHERE
        elif refusal is None and spool is not None and self._want_it_whole(known):
            assert self._groups is not None
            whole, spool = self._groups.whole(spool), None
            if isinstance(whole, Reply):
                refusal = whole
            else:
                lines = whole
        if refusal is not None:
            for recipient in pending.envelope.recipients:
                self._note(pending, batch, recipient, refusal, repeat=False)
            pending.settle(refusal)
            return
        content = memoryview(lines)[: len(lines) - lines.endswith(b"\n")]
        message = _Written(pending, known, lines, content, spool)
        if self._groups is not None:
            self._write(message, self._groups)
            batch.group[key] = message
            batch.group_octets += pending.size
            # No message that is written waits for a plugin that looks at the next one.
            if batch.group_octets > GROUP_OCTETS or self._plugins.implemented("message_received"):
                self._keep(batch)
        else:
            self._serve(message, batch, {})

    def _want_it_whole(self, known: Mapping[str, DeliveryRecord]) -> bool:
        """A plugin looks at the whole message; or its sender may be told of recipients that refused
        it before.  (Where it is known beforehand, no message goes into a spool.)"""
        return self._plugins.implemented("message_received") or any(
            record.reply.permanent for record in known.values()
        )

    def _write_spooled(self, message: _Written, groups: GroupDelivery, spool: Sink) -> None:
        """A message for each of its recipients, as long as anyone waits for it: last for the first
        of them, whose file it is in."""
        pending, begun = message.pending, message.content
        envelope = pending.envelope
        first = envelope.recipients[0]
        for recipient in (*(one for one in envelope.recipients if one != first), first):
            if recipient in message.known or recipient in message.made:
                continue
            if pending.abandoned:
                return
            try:
                if recipient == first:
                    made = groups.finish(spool)
                else:
                    trace = pending.origin.received(envelope, recipient) + separator(begun)
                    made = groups.write_spooled(envelope, recipient, trace, spool)
            except BaseException:  # our own bug
                made = self._not_written(pending)
            message.made[recipient] = made

    def _write(self, message: _Written, groups: GroupDelivery) -> None:
        """A message for each of its recipients, as long as anyone waits for it."""
        pending, content = message.pending, message.content
        if message.spool is not None:
            self._write_spooled(message, groups, message.spool)
            return
        for recipient in pending.envelope.recipients:
            if recipient in message.known or recipient in message.made:
                continue
            if pending.abandoned:
                return
            try:
                trace, refusal = self._prepared(pending, recipient, content)
            except BaseException:  # a hook may even try to end the process
                trace, refusal = b"", self._not_written(pending)
            if refusal is None:
                refusal = groups.write(pending.envelope, recipient, trace, content)
            message.made[recipient] = refusal

    def _not_written(self, pending: PendingDelivery) -> Reply:
        """Within an exception: what is written for those before is kept, and does not stay open."""
        text = "%s a delivery failed"
        log_safely(log, logging.ERROR, text, pending.origin.label, error=True)
        return BUG

    def _keep(self, batch: _Batch) -> None:
        """Make safe what is written, and settle it.  Does not raise."""
        group, batch.group, batch.group_octets = batch.group, {}, 0
        if not group:
            return
        assert self._groups is not None
        began = time.monotonic()
        try:
            made = self._made(group, self._groups)
        except BaseException:
            made = dict.fromkeys(group)
            log_safely(log, logging.ERROR, "messages=%d not kept", len(group), error=True)
        batch.seconds = time.monotonic() - began
        for key, message in group.items():
            pending, records = message.pending, made[key]
            try:
                if records is None:
                    pending.abandon(BUG)
                else:
                    self._serve(message, batch, records)
            except BaseException:  # a hook may even try to end the process
                pending.abandon(BUG)
                text = "%s a delivery failed"
                log_safely(log, logging.ERROR, text, pending.origin.label, error=True)
            finally:
                self.drop(pending)

    def _made(
        self, group: Mapping[MessageKey, _Written], groups: GroupDelivery
    ) -> dict[MessageKey, dict[str, DeliveryRecord] | None]:
        """What became of what is written, for each recipient; recorded."""
        written = {
            (key, recipient): (recipient, one)
            for key, message in group.items()
            for recipient, one in message.made.items()
        }
        replies = groups.keep(list(written.values()))
        replied = dict(zip(written, replies, strict=True))
        records = self._journal.record_all(replied, self._repeat_seconds)
        return {
            key: {recipient: records[key, recipient] for recipient in message.made}
            for key, message in group.items()
        }

    def _serve(self, message: _Written, batch: _Batch, made: Mapping[str, DeliveryRecord]) -> None:
        """Serve all recipients of a message, of whom some have been just now, and settle it."""
        pending, known, key = message.pending, message.known, message.pending.key
        assert key is not None
        deferred: dict[str, DeliveryRecord] = {}
        for recipient in pending.envelope.recipients:
            if pending.abandoned and recipient not in made:
                return
            record = known.get(recipient) or deferred.get(recipient)
            if record is not None:
                self._note(pending, batch, recipient, record.reply, repeat=True)
                continue
            record = made.get(recipient) or self._hand_over(
                pending, batch, recipient, message.content
            )
            if record is None:
                return
            (deferred if record.reply.transient else known)[recipient] = record
            self._note(pending, batch, recipient, record.reply, repeat=False)
            if self._plugins.implemented("message_delivered"):
                self._tell_plugins(pending, recipient, record.reply, batch.seconds)
        if not pending.abandoned:
            pending.settle(self._combined(pending, key, known, message.lines))

    def _hand_over(
        self, pending: PendingDelivery, batch: _Batch, recipient: str, content: Content
    ) -> DeliveryRecord | None:
        """Handled, and recorded; ``None`` if no one waits for that any more."""
        key = pending.key
        assert key is not None
        batch.seconds = 0.0
        trace, reply = self._prepared(pending, recipient, content)
        if reply is None:
            with self._turn:
                if pending.abandoned:
                    return None
                envelope = pending.envelope
                peer = (envelope.client and envelope.peer) or pending.origin.peer
                began = time.monotonic()
                reply = self._delivery.deliver(peer, envelope, recipient, trace, content)
                batch.seconds = time.monotonic() - began
        return self._journal.record(key, recipient, reply, self._repeat_seconds)

    def _prepared(
        self, pending: PendingDelivery, recipient: str, content: Content
    ) -> tuple[bytes, Reply | None]:
        """What goes before a message for a recipient, and whether a plugin refuses it."""
        envelope, origin = pending.envelope, pending.origin
        received, added, reply = origin.received(envelope, recipient), AddedFields(), None
        if self._plugins.implemented("message_received"):
            pieces = (received, separator(content), content)
            reply = self._refusal(origin, envelope, pieces, added)
        return received + added.lines + separator(content), reply

    def _tell_plugins(
        self, pending: PendingDelivery, recipient: str, reply: Reply, seconds: float
    ) -> None:
        self._plugins.call(
            "message_delivered",
            agent=pending.origin.agent,
            envelope=pending.envelope,
            recipient=recipient,
            reply=reply,
            octets=pending.size,
            seconds=seconds,
        )

    def _refusal(
        self, origin: Origin, envelope: Envelope, pieces: Iterable[Content], added: AddedFields
    ) -> Reply | None:
        """Whether a plugin refuses the message; what the plugins add to it is in ``added`` then."""
        said = self._plugins.call(
            "message_received",
            agent=origin.agent,
            envelope=envelope,
            message=b"".join(pieces),
            add_field=added.add,
        )
        return refusal_of("message_received", said)

    def _note(
        self, pending: PendingDelivery, batch: _Batch, recipient: str, reply: Reply, repeat: bool
    ) -> None:
        pending.add(reply, repeat)
        batch.lines.append((pending, recipient, reply, repeat))
        if time.monotonic() >= batch.log_at:
            self._log_lines(batch)

    def _log_lines(self, batch: _Batch) -> None:
        """Write the lines of a batch together: one among deliveries costs twice as much.  In a
        batch that takes long they are written as they come, by the event loop if the thread is
        held up."""
        lines = []  # taken first: what a slow log holds up is not written by the other, too
        with contextlib.suppress(IndexError):
            while True:
                lines.append(batch.lines.popleft())
        for pending, recipient, reply, repeat in lines:
            pending.log.log(
                log,
                logging.INFO if reply.positive else logging.WARNING,
                "%s from=%s to=%s bytes=%d reply=%r%s",
                pending.origin.label_of(pending.envelope),
                angle(pending.envelope.reverse_path),
                angle(recipient),
                pending.size,
                str(reply),
                " repeat" if repeat else "",
            )

    def _combined(
        self,
        pending: PendingDelivery,
        key: MessageKey,
        known: dict[str, DeliveryRecord],
        content: bytes,
    ) -> Reply:
        """One reply of those of all recipients; above is how."""
        replies = pending.replies
        if pending.envelope.prdr and (last := last_of_many(replies)):
            return last
        if len(replies) == 1:
            return replies[0]
        for reply in replies:
            if reply.transient:
                return reply
        positive = [reply for reply in replies if reply.positive]
        if len(positive) in (0, len(replies)):
            return replies[0]
        return self._notify(pending.envelope, key, known, content) or positive[0]

    def _notify(
        self,
        envelope: Envelope,
        key: MessageKey,
        known: dict[str, DeliveryRecord],
        content: bytes,
    ) -> Reply | None:
        """Have the sender told of the failures that it has not been told of; ``None`` when that is
        safe, else the 4yz for the message."""
        failed = {
            recipient: known[recipient]
            for recipient in envelope.recipients
            if known[recipient].reply.permanent and not known[recipient].notified
        }
        if not failed:
            return None
        replies = {recipient: record.reply for recipient, record in failed.items()}
        refusal = self._notifier.notify(envelope, replies, content)
        if refusal is None:
            known.update(self._journal.record_notified(key, failed))
        return refusal
