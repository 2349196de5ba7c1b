"""Places for connections: so many at a time, so many for one network, and who gives way.

A client that has nothing to do but stay keeps its place only while no one else wants it.  When all
are taken, the newcomer gets the place of an idle connection: of the network that has the most, and
of those the one that has been idle longest.  A crowd from a few networks thus displaces itself.
For those that are expected (an agent's server) there is always a place: a stranger that is idle
gives way at once, and if there is none, one more is let in.

This knows connections and addresses, and neither services nor customers.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Container
from typing import Protocol

from salmon_revsmtp.net.expected import address_of
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["TOO_MANY", "Places"]

TOO_MANY = Reply(421, "too many connections, try again later", "4.7.0")
GIVE_WAY = Reply(421, "idle, and others wait for your place; try again later", "4.7.0")
TOO_SLOW = Reply(421, "too slow while memory is short, try again later", "4.3.1")

# What stands for the networks of all that are expected.
EXPECTED = "expected"

# Seconds of silence between transactions after which a connection gives way to one of a network
# that has no fewer; a client that is at work is never silent for so long.
IDLE = 10.0
# The same within a transaction: RFC 5321 4.5.3.2 gives it minutes, but not at others' expense.
STALLED = 60.0
# Octets of content a second, on average, that a client must send while memory is short.
HASTE = 20_000
# Seconds of its transaction that are not looked at so closely.
START = 10.0


class Client(Protocol):
    """A connection, as places know it; :class:`~salmon_revsmtp.net.driver.Driver` says more."""

    peer: tuple[str, int]

    @property
    def waits_since(self) -> float | None:
        """Since when it has brought nothing forward; ``None`` while it waits for us."""

    @property
    def at_boundary(self) -> bool:
        """Nothing is under way."""

    def slower_than(self, rate: int, after: float) -> bool:
        """What is under way comes slowly."""

    def send_away(self, reply: Reply) -> None:
        """End it."""


class Places:
    """``most`` connections, ``most_per_network`` of them from one network (a /24, of IPv6 a /64).
    ``expected``: addresses that have a place also when there is none left, as long as they have not
    ``most`` themselves.
    """

    def __init__(
        self, most: int, most_per_network: int, expected: Container[str] = frozenset()
    ) -> None:
        self._most, self._most_per_network = most, most_per_network
        self._expected = expected
        self._networks: dict[Client, str] = {}
        self._crowds: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._networks)

    def admit(self, client: Client) -> Reply | None:
        """Give a connection a place until :meth:`leave`; or the reply that turns it away."""
        address = client.peer[0]
        expected = address in self._expected
        network = EXPECTED if expected else _network(address)
        most, idle = (self._most, 0.0) if expected else (self._most_per_network, IDLE)
        if self._crowds[network] >= most and not self._make_room(network, idle):
            return TOO_MANY
        if len(self._networks) >= self._most and not self._make_room_for(network) and not expected:
            return TOO_MANY
        self._networks[client] = network
        self._crowds[network] += 1
        return None

    def leave(self, client: Client) -> None:
        """The connection is over, or will be soon."""
        network = self._networks.pop(client, None)
        if network is not None:
            self._crowds[network] -= 1
            if not self._crowds[network]:
                del self._crowds[network]

    def hurry(self) -> None:
        """Memory is short: send those strangers away whose message comes too slowly for that."""
        strangers = [one for one, network in self._networks.items() if network != EXPECTED]
        for client in strangers:
            if client.slower_than(HASTE, START):
                self._send_away(client, TOO_SLOW)

    def _make_room(self, network: str, idle: float) -> bool:
        """Have the connection of a network that is idle longest give way, if it is so long."""
        found = [one for one in self._networks if self._networks[one] == network]
        longest = max(found, key=_idle, default=None)
        if longest is None or _idle(longest) < idle:
            return False
        self._send_away(longest, GIVE_WAY)
        return True

    def _make_room_for(self, network: str) -> bool:
        """Have a connection of another network give way to one of this: for one that we expect any
        stranger; for a stranger one of a larger crowd, or one that is idle for long."""
        crowd = self._crowds[network] + 1
        found = []
        for client, of in self._networks.items():
            least = 0.0 if network == EXPECTED or self._crowds[of] > crowd else IDLE
            if of != EXPECTED and (idle := _idle(client)) >= least:
                found.append((self._crowds[of], idle, client))
        if not found:
            return False
        *_, longest = max(found, key=lambda one: one[:2])
        self._send_away(longest, GIVE_WAY)
        return True

    def _send_away(self, client: Client, reply: Reply) -> None:
        self.leave(client)
        client.send_away(reply)


def _idle(client: Client) -> float:
    """For how many seconds a connection has been idle; less than 0 if it is not."""
    if (since := client.waits_since) is None:
        return -1.0
    seconds = asyncio.get_running_loop().time() - since
    return seconds if client.at_boundary or seconds >= STALLED else -1.0


def _network(text: str) -> str:
    address = address_of(text)
    if address is None:
        return text
    bits = 24 if address.version == 4 else 64
    return str(ipaddress.ip_network(f"{address}/{bits}", strict=False))
