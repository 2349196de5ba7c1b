"""What the hosts of one provider tell one another: whose sessions are open, who guesses passwords,
which accounts have changed.

A plugin has it (``open_nodes``), as it has the hold store that the hosts share.  None of it has to
be there: a host that cannot reach the others goes by what it knows itself.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["NodeSession", "Nodes", "Told"]


@dataclass(frozen=True)
class NodeSession:
    """A reversed session.

    ``most``   how many its account may have at a time.
    ``since``  when it began, in seconds since the epoch, by the clock of its host.
    ``tls``    such as "TLSv1.3"; ``None`` in the clear.
    ``node``   which host has it.
    """

    account: str
    peer: str
    since: float
    push: bool
    tls: str | None = None
    most: int = 1
    node: str = ""


class Told(Protocol):
    """Who hears what the others tell, in any thread.  Does not block."""

    def accounts_changed(self, names: Collection[str] | None) -> None:
        """These accounts are not what they were; ``None``: any may be."""

    def accounts_seen(self, at: float) -> None:
        """No account had changed at this time (:func:`time.monotonic`) but those that
        :meth:`accounts_changed` was told of."""

    def gave_way(self, numbers: Collection[int]) -> None:
        """These sessions of ours have to end: newer ones of their accounts are at other hosts."""

    def logins_failed(self, network: str, number: int, ago: float) -> None:
        """So many logins from there have failed at another host, so many seconds ago."""


class Nodes(Protocol):
    """The hosts, as one of them sees them.  Its methods may be called from any thread."""

    def watch(self, told: Told) -> None:
        """Begin, and tell what others do.  Blocks.  Does not raise where they cannot be reached."""

    def begin(self, number: int, session: NodeSession) -> Sequence[object]:
        """A session of ours has begun.  The newest ones of an account win: returns those of other
        hosts that it replaces.  Blocks.  Raises :class:`OSError` where that cannot be told now;
        then it is done later."""

    def still_there(self, replaced: Sequence[object]) -> bool:
        """Whether any of these is open still.  Blocks.  Raises :class:`OSError`."""

    def end(self, number: int) -> None:
        """A session of ours has ended.  Does not block."""

    def login_failed(self, network: str) -> None:
        """A login from there has failed.  Does not block."""

    def sessions(self) -> Sequence[NodeSession]:
        """Those of the other hosts, the oldest first.  Blocks.  Raises :class:`OSError`."""

    def close(self) -> None:
        """We are gone.  Blocks."""
