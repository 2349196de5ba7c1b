"""The contract of a hold store: what keeps mail until its customer has it.

What a store promises:

- When :meth:`HoldStore.put` returns, the messages survive the death of the process and a power
  cut.  When it raises, none of them is kept.
- A message is kept once, however many accounts it is for; what one account holds costs the others
  nothing.
- Nothing goes but by :meth:`HoldStore.settle`: a recipient is struck off when the caller says that
  it is done with, and a message goes with its last recipient.
- One has a message at a time: a feed of its account, or who has claimed it.

Its methods block, and may be called from several threads.  They raise :class:`OSError` when the
store cannot do it now; then nothing has changed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from salmon_revsmtp.smtp.content import Content, Sink
from salmon_revsmtp.smtp.envelope import Envelope

__all__ = [
    "Arrival",
    "Feed",
    "Held",
    "HoldStore",
    "HoldStoreError",
    "OpenHoldStore",
    "Settled",
    "Spool",
    "Standing",
    "State",
    "Usage",
    "Woken",
]


class HoldStoreError(OSError):
    """A hold store cannot be opened; the text says which, why, and what to do."""


class State(enum.IntEnum):
    """What becomes of a held message next."""

    WAITING = 0  #: it goes out when its customer is there
    ASIDE = 1  #: it has failed again and again: it goes out only when a person says so


class Spool(Sink, Protocol):
    """A large message that goes into the store as it comes.  It is not held until it is given to
    :meth:`HoldStore.put`.  The event loop writes to it, so it does not sync.
    """

    def read(self) -> bytes:
        """All of it.  Raises :class:`OSError`."""

    def content(self, head: bytes) -> Content | None:
        """All of it below ``head``, to be sent from where it is, also when it has been held or
        discarded meanwhile; ``None`` where that cannot be done.  Raises :class:`OSError`."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """A message to keep.

    ``envelope``  its sender and recipients.
    ``accounts``  for each recipient, in order, the account that it is for.
    ``content``   its octets, header of ours and all, in pieces.
    ``spool``     what comes after them, if that is so much that it is in the store already.
    """

    envelope: Envelope
    accounts: tuple[str, ...]
    content: Sequence[bytes]
    spool: Spool | None = None

    @property
    def size(self) -> int:
        """Octets."""
        return sum(map(len, self.content)) + (self.spool.size if self.spool is not None else 0)


@dataclass(frozen=True)
class Held:
    """A message that waits for an account.

    ``key``       a number, the same as long as it waits; later messages have higher ones.
    ``account``   the account's name.
    ``envelope``  its sender, and those recipients of the account that have not got it.
    ``size``      octets.
    ``arrived``   seconds since the epoch, on the store's clock.
    ``strikes``   how often the session broke over it.
    ``reason``    why it was set aside or did not go out the last time; for a person.
    ``warned``    its sender has been told that it is delayed.
    """

    key: int
    account: str
    envelope: Envelope
    size: int
    arrived: float
    state: State = State.WAITING
    strikes: int = 0
    reason: str = ""
    warned: bool = False


@dataclass(frozen=True)
class Settled:
    """What the customer's answer to a held message comes to.

    ``recipients``  those that are done with: taken by the customer, or refused by it and their
                    sender told.
    ``reason``      why it is still held for others, if it is.
    """

    key: int
    recipients: Collection[str]
    reason: str = ""


@dataclass(frozen=True)
class Usage:
    """What is held for an account: messages, and their octets."""

    messages: int = 0
    octets: int = 0


@dataclass(frozen=True)
class Standing:
    """How the mail of an account that has any stands.

    ``oldest``  when the oldest message came, in seconds since the epoch.
    ``aside``   how many are set aside.
    """

    oldest: float
    aside: int = 0


#: Told the accounts that messages have come for, in any thread, once these are safe.
Woken = Callable[[Collection[str]], None]


class Feed(Protocol):
    """An account's mail as one session sees it: each message once, the oldest first, and what has
    come since.  Only ``take`` blocks, and it is not called while it runs."""

    def take(self, messages: int, octets: int) -> Sequence[Held]:
        """The next ones, which no other feed gets until they are settled or this one is closed.

        No more than ``messages``, and of ``octets`` no more than the first that goes beyond; none
        when there are no more for now."""

    def has(self, key: int) -> bool:
        """Whether this one, which it took, may be sent: a store that several hosts have may have
        had to give it to another.  If not, it is let go.  Does not block."""

    def leave(self, keys: Iterable[int]) -> None:
        """These have been answered: no one gets them until they are settled, also when this feed
        is closed."""

    def start_over(self) -> None:
        """What still waits comes again, from the oldest."""

    def close(self) -> None:
        """The session is over: what it took, and was not answered, is anyone's again."""


class HoldStore(Protocol):
    """Keeps mail.  ``close`` it at the end."""

    def put(self, arrivals: Sequence[Arrival]) -> Sequence[tuple[int, ...]]:
        """Make messages safe, all of them together; returns the keys of each, one per account, in
        the order in which the accounts come.  Raises :class:`OSError`."""

    def adopt(self, moved: Sequence[tuple[Held, bytes | Content]]) -> Sequence[int]:
        """Make messages that another store has held safe, all of them together, as they are there:
        since when, in which state, and why.  Returns their keys, in order.  Raises
        :class:`OSError`."""

    def leave(self) -> None:
        """The process is about to end: what its feeds and claims have is for other processes, if
        there are any.  What was answered can still be settled.  Does not raise."""

    def others(self) -> Sequence[str]:
        """Which other processes use the store now."""

    def spool(self) -> Spool:
        """A place for a message that is coming.  Does not block, and does not raise."""

    def load(self, keys: Sequence[int]) -> dict[int, bytes | Content]:
        """The octets of messages by their keys, without those that are gone.  Large ones are not
        read but as they are sent."""

    def feed(self, account: str, domains: Collection[str] | None = None) -> Feed:
        """A feed of an account's mail: what waits, for recipients in ``domains`` if given."""

    def settle(self, done: Sequence[Settled]) -> None:
        """Strike recipients off; of a message that is gone already, nothing.  What is left waits
        again."""

    def strike(self, key: int, most: int, reason: str) -> Held | None:
        """The session broke over this message.  At ``most`` strikes it is set aside.  Returns what
        it is now, ``None`` if it is gone."""

    def retry(self, keys: Iterable[int]) -> int:
        """What was set aside waits again; returns how many there were."""

    def claim(self, keys: Iterable[int]) -> dict[int, Held]:
        """Take messages as a feed would, whatever their state, so that no session sends them;
        returns them as they are now.  Those that a feed or someone else has are not among them,
        nor those that are gone.  They are claimed until they are settled or released."""

    def release(self, keys: Iterable[int]) -> None:
        """These, which were claimed, are anyone's again, as far as they are still held."""

    def note_warned(self, key: int) -> None:
        """The sender of this message has been told that it is delayed."""

    def find(self, key: int) -> Held | None:
        """One message that is held, whatever its state."""

    def listing(
        self,
        account: str | None = None,
        after: int = 0,
        messages: int = 100,
        state: State | None = None,
    ) -> Sequence[Held]:
        """What is held, the oldest first, from after a key; of an account and in a state, if
        given."""

    def usage(self, account: str) -> Usage:
        """What is held for an account."""

    def standings(self, accounts: Collection[str]) -> dict[str, Standing]:
        """How it stands with those of these accounts that have mail: asked once for all of them."""

    def usages(self) -> dict[str, Usage]:
        """The same of all accounts that have anything, also of those that there are no more."""

    def now(self) -> float:
        """The store's clock: seconds since the epoch, that pass as they do, whatever is set."""

    def watch(self, woken: Woken) -> None:
        """Have ``woken`` told of mail that has come."""

    def close(self) -> None:
        """Use it no more."""


#: Opens a store by its URL; it has a folder of this host for its files.  Raises
#: :class:`HoldStoreError`.
OpenHoldStore = Callable[[str, Path], HoldStore]
