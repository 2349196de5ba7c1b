"""What the world sends for the accounts, on its way into the hold store.

An :class:`Intake` stands where a service has its dispatcher: sessions give it whole messages, and
hear when they are safe.  Those that wait at the same time are made safe together, in one thread.
Where a message's customer is there it goes to that one first (``provider.live``), and is held only
for those recipients of which the customer has not said anything for good.

A domain that no account has is refused: this host relays for no one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, TypeVar, cast

from salmon_revsmtp.delivery.batches import BatchWorker
from salmon_revsmtp.delivery.dispatcher import (
    BUG,
    GONE,
    LOOP,
    STOPPED,
    PendingDelivery,
    last_of_many,
    refusal_by,
)
from salmon_revsmtp.delivery.maildir import disk_reply
from salmon_revsmtp.delivery.trace import MAX_HOPS, AddedFields, Origin, hops, separator
from salmon_revsmtp.foreign import angle
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.provider.accounts import Account, Accounts, AccountsUnavailableError
from salmon_revsmtp.provider.hold.store import Arrival, HoldStore, Spool
from salmon_revsmtp.provider.idents import Ident, Idents
from salmon_revsmtp.provider.live import Live, Said
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.content import Content, Octets, with_lf
from salmon_revsmtp.smtp.envelope import Client, Envelope
from salmon_revsmtp.smtp.receiver import LATER, RecipientRequest, Verdict
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.threads import Threads

__all__ = ["Intake"]

Frozen = TypeVar("Frozen", Client, Envelope)

log = logging.getLogger(__name__)

NOT_OURS = Reply(550, "we do not take mail for this domain", "5.7.1")
NOT_NOW = Reply(451, "it cannot be told now whether we take mail for this domain", "4.3.0")
OVER_QUOTA = Reply(452, "too much mail waits for this domain, try again later", "4.2.2")

# The customer has said nothing, for no one has asked it.
HELD = Said(())

# Octets of messages that plugins look at, at a time; of each there are some copies.  One may be
# larger.
MOST_LOOKED_AT = 32 * 1024 * 1024
# Octets of a message that is passed on although it cannot be sent from its file.
MOST_IN_MEMORY = 1024 * 1024

# Seconds between two log lines about one account's quota.
SAY_AGAIN = 3600.0


class Intake:
    """Takes messages into ``store``, for ``accounts``.

    ``hostname``  asked for our name: mail for its postmaster is mail for that of the host.
    ``filters``   the threads in which plugins look at messages.
    ``patience``  seconds that they have for one.
    """

    def __init__(
        self,
        accounts: Accounts,
        store: HoldStore,
        hooks: HookCaller,
        hostname: Callable[[], str],
        worker: BatchWorker[PendingDelivery],
        filters: Threads,
        patience: float = 300.0,
        live: Live | None = None,
        idents: Idents | None = None,
    ) -> None:
        self._filters, self._patience = filters, patience
        self._live, self._idents = live, idents or Idents()
        self._accounts, self._store, self._hooks = accounts, store, hooks
        self._hostname = hostname
        self._worker = worker
        self._loop: asyncio.AbstractEventLoop | None = None
        self._said: dict[str, float] = {}  # when it was, that an account has no room
        # Those that may be passed on, and those that have been, with what came of it.
        self._for_live: set[PendingDelivery] = set()
        self._passed_on: dict[PendingDelivery, tuple[Arrival, Said]] = {}
        # What plugins have made of a message: our Received, and what they add or refuse.
        self._filtered: dict[PendingDelivery, tuple[bytes, AddedFields, Reply | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._given: dict[PendingDelivery, Ident] = {}  # to those that are not settled
        # Whose those are that are not settled, where that had to be looked up.
        self._looked_up: dict[PendingDelivery, Sequence[Account | None]] = {}
        self._looked_at = 0  # octets of messages that plugins have
        self._less_looked_at = asyncio.Event()
        # Of the batch in hand, in the thread.
        self._arrivals: list[tuple[PendingDelivery, Arrival, Said]] = []
        self._ready: list[tuple[PendingDelivery, Arrival]] = []

    # -- in the event loop ----------------------------------------------------------------------

    def policy(self, mailbox: str) -> Reply | None:
        """Accepts (``None``) or refuses a recipient.  One whose domain has to be looked up is not
        refused yet; :meth:`decide` does that."""
        known = self._accounts.knows_domain(self._domain(mailbox))
        return self._refusal(self._account(mailbox)) if known else None

    def verdict(self, mailbox: str) -> Verdict:
        """The same for one of many who decide: whether it has to be looked up."""
        known = self._accounts.knows_domain(self._domain(mailbox))
        return self._refusal(self._account(mailbox)) if known else LATER

    async def decide(self, request: RecipientRequest) -> Reply | None:
        """Look the domain of a recipient up, and accept or refuse it."""
        try:
            account = await self._accounts.look_up_domain(self._domain(request.recipient))
        except AccountsUnavailableError:
            return NOT_NOW
        return self._refusal(account)

    def _refusal(self, account: Account | None) -> Reply | None:
        if account is None:
            return NOT_OURS
        used, settings = self._store.usage(account.name), account.settings
        if used.messages < settings.quota_messages and used.octets < settings.quota_bytes:
            return None
        self._say_full(account, used.messages, used.octets)
        return OVER_QUOTA

    def _domain(self, mailbox: str) -> str:
        """RFC 5321 4.5.1: "postmaster" without a domain is our own."""
        own = mailbox.lower() == "postmaster"
        return domain_of(f"postmaster@{self._hostname()}" if own else mailbox)

    def _account(self, mailbox: str) -> Account | None:
        """Whose mail it is."""
        return self._accounts.of_domain(self._domain(mailbox))

    def _owners(self, pending: PendingDelivery) -> Sequence[Account | None]:
        """Whose mail a message is, by recipient: as it was looked up when it had come."""
        if (found := self._looked_up.get(pending)) is not None:
            return found
        return [self._account(one) for one in pending.envelope.recipients]

    def _say_full(self, account: Account, messages: int, octets: int) -> None:
        now = time.monotonic()
        if now - self._said.get(account.name, -SAY_AGAIN) >= SAY_AGAIN:
            self._said[account.name] = now
            log_safely(
                log,
                logging.WARNING,
                "account=%s messages=%d octets=%d its quota is used up; senders hear 452 and keep "
                "their mail",
                *(account.name, messages, octets),
            )
            if self._hooks.implemented("quota_exceeded"):
                arguments = {"account": account.name, "messages": messages, "octets": octets}
                call = functools.partial(self._hooks.call, "quota_exceeded", **arguments)
                threading.Thread(target=call, name="hook", daemon=True).start()

    @property
    def sinks(self) -> Callable[[Origin, Envelope], Spool]:
        """Large messages go into the store as they come."""
        return lambda origin, envelope: self._store.spool()

    def deliver(self, pending: PendingDelivery, answered: Callable[[], None]) -> None:
        """Make a message safe, and call ``answered`` in the event loop when it is, or cannot be:
        ``pending.reply`` and ``pending.replies`` say which."""
        self._loop = asyncio.get_running_loop()
        pending.size = len(pending.data)
        if (spool := _spool(pending)) is not None:
            pending.size = spool.size
        pending.answered = answered
        pending.since = self._loop.time()
        if self._accounts.lookups is None:
            self._go_on(pending)
        else:
            self._start(self._look_up(pending))

    async def _look_up(self, pending: PendingDelivery) -> None:
        """See whose mail it is: that may have changed since RCPT."""
        domains = [self._domain(one) for one in pending.envelope.recipients]
        wanted = list(dict.fromkeys(domains))
        try:
            found = await asyncio.gather(*map(self._accounts.look_up_domain, wanted))
        except AccountsUnavailableError:
            pending.abandon(NOT_NOW)
            _discard(pending)
            self._answer([pending])
            return
        # These, and not what was said last: until the slowest of them was there, another may have
        # been asked for again in vain.
        of_domains = dict(zip(wanted, found, strict=True))
        self._looked_up[pending] = [of_domains[one] for one in domains]
        self._go_on(pending)

    def _go_on(self, pending: PendingDelivery) -> None:
        """Whose mail it is is known."""
        owners = self._owners(pending)
        if self._live is not None and self._live.takes(owners, pending.envelope) is not None:
            self._for_live.add(pending)
        if self._hooks.implemented("message_received"):
            self._start(self._ask_plugins(pending))
        else:
            self._submit(pending)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask_plugins(self, pending: PendingDelivery) -> None:
        """Have plugins look at a message before its turn comes.  They may take their time, and no
        other message waits for that."""
        head = _head_of(pending)
        received = self._received(pending)
        added = AddedFields()
        refusal = self._known_refusal(pending, head)
        if refusal is None:
            look = functools.partial(self._filter, pending, received + separator(head), added)
            try:
                refusal = await asyncio.wait_for(self._look(pending, look), self._patience)
            except (asyncio.TimeoutError, TimeoutError):
                text = f"not looked at in {self._patience:g} seconds, try again later"
                refusal = Reply(451, text, "4.3.0")
            except Exception:  # our own bug, or no thread to be had
                log_safely(log, logging.ERROR, "a message was not looked at", error=True)
                refusal = BUG
        if refusal is not None:
            added = AddedFields()
        self._filtered[pending] = received, added, refusal
        self._submit(pending)

    async def _look(
        self, pending: PendingDelivery, look: Callable[[], Reply | None]
    ) -> Reply | None:
        """Have plugins look at it, when there is memory for that."""
        while self._looked_at and self._looked_at + pending.size > MOST_LOOKED_AT:
            self._less_looked_at.clear()
            await self._less_looked_at.wait()
        self._looked_at += pending.size
        try:
            return await self._filters.call(look)
        finally:
            self._looked_at -= pending.size
            self._less_looked_at.set()

    def _received(self, pending: PendingDelivery) -> bytes:
        one, *others = pending.envelope.recipients
        return pending.origin.received(pending.envelope, "" if others else one)

    def _known_refusal(self, pending: PendingDelivery, head: bytes) -> Reply | None:
        """The one that plugins need not be asked for."""
        if hops(head) >= MAX_HOPS:
            return LOOP
        if not all(self._owners(pending)):
            return NOT_OURS  # it was accepted, and the account is gone since
        return None

    def _submit(self, pending: PendingDelivery) -> None:
        assert self._loop is not None
        try:
            self._worker.submit(self, pending)
        except RuntimeError:  # the thread is closed
            self._forget(pending)
            pending.abandon(STOPPED)
            _discard(pending)
            self._loop.call_soon(self._answer, [pending])

    def _forget(self, pending: PendingDelivery) -> None:
        self._for_live.discard(pending)
        self._passed_on.pop(pending, None)
        self._filtered.pop(pending, None)
        self._given.pop(pending, None)
        self._looked_up.pop(pending, None)

    def let_go(self, pending: PendingDelivery) -> bool:
        """No one will hear the answer: what has not begun is forgotten, and its client keeps it."""
        forgotten = pending.abandon(GONE, if_not_begun=True)
        if forgotten:
            pending.answered = None
            _discard(pending)
            self._worker.withdraw(self, pending)
            self._looked_up.pop(pending, None)
            pending.data = b""
        return forgotten

    def _answer(self, deliveries: Sequence[PendingDelivery]) -> None:
        for pending in deliveries:
            answered = pending.answered
            if answered is not None and pending.reply is not None:
                pending.answered = None
                try:
                    answered()
                except Exception:  # the others have nothing to do with it
                    log_safely(log, logging.ERROR, "answering failed", error=True)
                pending.data = b""

    def _pass_on(self, ready: Sequence[tuple[PendingDelivery, Arrival]]) -> None:
        """Send these to their customers, or hold them."""
        for pending, arrival in ready:
            self._start(self._send(pending, arrival))

    async def _send(self, pending: PendingDelivery, arrival: Arrival) -> None:
        said = Said([None] * len(arrival.accounts), "the customer's session ended")
        try:
            assert self._live is not None
            ready = arrival.spool is None  # else it may have to be read
            content = _content(arrival) if ready else await asyncio.to_thread(_content, arrival)
            owners = self._owners(pending)
            if (session := self._live.takes(owners, arrival.envelope)) is not None:
                said = await self._live.send(session, arrival.envelope, content)
        except _TooLarge as error:
            said = Said(said.replies, str(error))
        except Exception as error:  # our own bug, or a disk that cannot be read
            said = Said(said.replies, f"{type(error).__name__}: {error}")
            text = "%s a message was not passed on"
            log_safely(log, logging.ERROR, text, pending.origin.label, error=True)
        self._passed_on[pending] = arrival, _for_one_answer(arrival.envelope, said)
        self._submit(pending)

    # -- for a handler --------------------------------------------------------------------------

    def hold(self, envelope: Envelope, data: bytes) -> Reply:
        """Hold a message for its one recipient, as it is; returns 250 when it is safe.  Blocks."""
        [recipient] = envelope.recipients
        try:
            account = self._accounts.fetch_domain(self._domain(recipient))
        except AccountsUnavailableError:
            return NOT_NOW
        if (refusal := self._refusal(account)) or account is None:
            return refusal or NOT_OURS
        pending = PendingDelivery(Origin("hold", self._hostname()), envelope, data, size=len(data))
        self._keep([(pending, Arrival(envelope, (account.name,), [data]), HELD)])
        assert pending.reply is not None
        return pending.reply

    # -- in the thread --------------------------------------------------------------------------

    def begin(self, items: Sequence[PendingDelivery]) -> None:
        """A batch."""
        self._arrivals, self._ready = [], []

    def do(self, item: PendingDelivery, batch: None) -> None:
        """Get one message ready; or see what its customer has said of it."""
        try:
            if (passed_on := self._passed_on.pop(item, None)) is not None:
                self._note_said(item, *passed_on)
            else:
                self._prepare(item)
        except BaseException:  # a hook may even try to end the process
            self._forget(item)
            item.abandon(BUG)
            _discard(item)
            log_safely(log, logging.ERROR, "%s a message failed", item.origin.label, error=True)

    def end(self, items: Sequence[PendingDelivery], batch: None) -> None:
        """Make all of a batch safe, and answer them."""
        arrivals, self._arrivals = self._arrivals, []
        ready, self._ready = self._ready, []
        if arrivals:
            self._keep(arrivals)
        passed_on = {pending for pending, _ in ready}
        for pending in items:
            if pending.reply is None and pending not in passed_on:
                pending.abandon(BUG)
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # no one waits on a loop that is closed
            self._loop.call_soon_threadsafe(self._answer, items)
            if ready:
                self._loop.call_soon_threadsafe(self._pass_on, ready)

    def drop(self, item: PendingDelivery) -> None:
        """The thread is closed, or our own bug: whoever waits tries again."""
        self._forget(item)
        item.abandon(STOPPED)
        _discard(item)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # no one waits on a loop that is closed
                self._loop.call_soon_threadsafe(self._answer, [item])

    def _prepare(self, pending: PendingDelivery) -> None:
        for_live, filtered = pending in self._for_live, self._filtered.get(pending)
        owners = self._owners(pending)
        self._forget(pending)
        with pending.lock:
            if pending.abandoned:
                return
            pending.begun = True
        if self._accounts.lookups is not None:
            self._looked_up[pending] = owners
        head = _head_of(pending)
        if filtered is None:
            filtered = self._received(pending), AddedFields(), self._known_refusal(pending, head)
        received, added, refusal = filtered
        if refusal is not None:
            _discard(pending)
            self._settle(pending, refusal)
            return
        spool = _spool(pending)
        trace = received + added.lines + separator(head)
        content = (trace.replace(b"\n", b"\r\n"), pending.data)
        names = tuple(account.name for account in owners if account is not None)
        arrival = Arrival(self._named(pending, spool), names, content, spool)
        if for_live:
            self._ready.append((pending, arrival))
        else:
            self._arrivals.append((pending, arrival, HELD))

    def _named(self, pending: PendingDelivery, spool: Spool | None) -> Envelope:
        """Its envelope, with an ident that the customer knows it by."""
        envelope = pending.envelope
        digest = hashlib.sha256(pending.data).digest() if spool is None else spool.digest
        ident = self._idents.give(envelope, digest)
        self._given[pending] = ident
        pending.ask_whether_heard(functools.partial(self._note_heard, pending, ident))
        client = _changed(envelope.client or Client(), ident=str(ident))
        return _changed(envelope, client=client)

    def _note_heard(self, pending: PendingDelivery, ident: Ident, heard: bool) -> None:
        """Whether the client has heard the answer."""
        replies = dict(zip(pending.envelope.recipients, pending.replies, strict=False))
        if pending.reply is None or pending.reply.transient or not heard:
            replies = {}
        self._idents.settle(ident, [one for one, reply in replies.items() if not reply.transient])

    def _note_said(self, pending: PendingDelivery, arrival: Arrival, said: Said) -> None:
        """Hold a message for those of which its customer has said nothing for good."""
        envelope, replies = arrival.envelope, said.replies
        left = [number for number, reply in enumerate(replies) if reply is None]
        if not left:
            _discard(pending)
            self._settle(pending, _one_of(replies), said)
            return
        held = replace(envelope, recipients=tuple(envelope.recipients[one] for one in left))
        names = tuple(arrival.accounts[one] for one in left)
        arrival = Arrival(held, names, arrival.content, arrival.spool)
        self._arrivals.append((pending, arrival, said))

    def _filter(self, pending: PendingDelivery, trace: bytes, added: AddedFields) -> Reply | None:
        """In a thread of its own: whether a plugin refuses the message; what the plugins add to it
        is in ``added`` then.  Raises :class:`OSError`."""
        with pending.lock:
            if pending.abandoned:
                return GONE
            pending.begun = True
        spool = _spool(pending)
        data = pending.data if spool is None else spool.read()
        return refusal_by(
            self._hooks,
            "message_received",
            agent=None,
            envelope=pending.envelope,
            message=trace + with_lf(data),
            add_field=added.add,
        )

    def _keep(self, arrivals: Sequence[tuple[PendingDelivery, Arrival, Said]]) -> None:
        try:
            keys = self._store.put([arrival for _, arrival, _ in arrivals])
        except Exception as error:
            reply = disk_reply(error) if isinstance(error, OSError) else BUG
            log_safely(log, logging.ERROR, "messages=%d not held: %s", len(arrivals), error)
            for pending, _, said in arrivals:
                self._settle(pending, reply, said)
            return
        for (pending, arrival, said), held in zip(arrivals, keys, strict=True):
            reply = Reply(250, f"held as {held[0]}", "2.6.0")
            self._settle(pending, reply, said, arrival, held)

    def _settle(
        self,
        pending: PendingDelivery,
        reply: Reply,
        said: Said = HELD,
        arrival: Arrival | None = None,
        keys: Sequence[int] = (),
    ) -> None:
        """Log a message, tell the plugins, and note its reply: what the customer has said, and
        ``reply`` for those of which it has said nothing."""
        envelope = pending.envelope
        told = bool(said.replies) and self._hooks.implemented("message_handed_over")
        owners = self._owners(pending) if told else ()
        self._looked_up.pop(pending, None)
        for recipient, live, account in zip_longest(envelope.recipients, said.replies, owners):
            pending.add(live or reply, repeat=False)
            self._log(pending, recipient, live or reply, live is not None, said.reason)
            if live is not None and told:
                self._hooks.call(
                    "message_handed_over",
                    account=account.name if account is not None else "",
                    envelope=envelope,
                    recipient=recipient,
                    reply=live,
                    seconds=None,
                )
        if arrival is not None and self._hooks.implemented("message_held"):
            envelope = arrival.envelope
            for name, key in zip(dict.fromkeys(arrival.accounts), keys, strict=True):
                self._hooks.call(
                    "message_held",
                    account=name,
                    envelope=envelope,
                    key=key,
                    octets=pending.size,
                )
        ident = self._given.pop(pending, None)
        if ident is not None and all(answer.permanent for answer in pending.replies):
            self._idents.refused(ident)
        last = last_of_many(pending.replies) if pending.envelope.prdr else None
        pending.settle(last or reply)

    def _log(
        self, pending: PendingDelivery, recipient: str, reply: Reply, live: bool, reason: str
    ) -> None:
        way = " live" if live else f" held: {reason}" if reason else ""
        pending.log.log(
            log,
            logging.INFO if reply.positive else logging.WARNING,
            "%s from=%s to=%s bytes=%d reply=%r%s",
            pending.origin.label_of(pending.envelope),
            angle(pending.envelope.reverse_path),
            angle(recipient),
            pending.size,
            str(reply),
            way,
        )


class _TooLarge(Exception):
    """A message is not passed on; the text says why."""


def _content(arrival: Arrival) -> bytes | Content:
    """What is to be sent.  Raises :class:`OSError` and :class:`_TooLarge`."""
    head = b"".join(arrival.content)
    if arrival.spool is None:
        return head
    if (content := arrival.spool.content(head)) is not None:
        return content
    if arrival.size > MOST_IN_MEMORY:
        raise _TooLarge("it is too large to be made fit for SMTP in memory")
    return Octets(head + arrival.spool.read())


def _for_one_answer(envelope: Envelope, said: Said) -> Said:
    """A sender that hears one reply for all cannot be told that some recipients refuse: for these
    the message is held, and their refusal becomes a notification."""
    replies = said.replies
    if envelope.prdr or all(reply is not None and reply.permanent for reply in replies):
        return said
    kept = [reply if reply is not None and reply.positive else None for reply in replies]
    refused = [reply for reply in replies if reply is not None and reply.permanent]
    reason = f"the customer says {refused[0]}, and not of all" if refused else said.reason
    return Said(kept, reason)


def _one_of(replies: Sequence[Reply | None]) -> Reply:
    """The reply for a whole message, of those of its recipients."""
    said = [reply for reply in replies if reply is not None]
    return next((reply for reply in said if reply.positive), said[0])


def _changed(one: Frozen, **fields: object) -> Frozen:
    """As :func:`dataclasses.replace`, of fields from which no others are made, in a tenth of its
    time."""
    changed = object.__new__(type(one))
    vars(changed).update(vars(one), **fields)
    return changed


def _spool(pending: PendingDelivery) -> Spool | None:
    """What :attr:`Intake.sinks` made for it."""
    return cast("Spool | None", pending.sink)


def _discard(pending: PendingDelivery) -> None:
    if pending.sink is not None:
        pending.sink.discard()


def _head_of(pending: PendingDelivery) -> bytes:
    spool = _spool(pending)
    return _head(pending.data if spool is None else spool.beginning())


def _head(data: bytes) -> bytes:
    """What may be the header, with LF line ends: a message may be large."""
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[: end + 2]
    return head.replace(b"\r\n", b"\n") + (b"" if end < 0 else b"\n")
