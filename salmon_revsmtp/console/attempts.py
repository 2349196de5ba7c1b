"""Who guesses passwords is slowed down: by network, and all together."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable

__all__ = ["Attempts"]

# Failed logins count for so many seconds.
WINDOW = 900.0
# After so many from one network there it has to wait; after so many from everywhere, everyone but
# those who have been let in: a stranger with many networks does not keep the owner out.
MOST, MOST_IN_ALL = 10, 200
# Networks that are remembered.
NETWORKS = 10_000


class Attempts:
    """Failed logins.  On one thread.  ``clock`` gives seconds that pass as they do."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque(maxlen=MOST_IN_ALL)
        self._let_in: OrderedDict[str, None] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until someone may try; 0: now."""
        network = _network(address)
        counted = [(self._recent(self._failed.get(network, deque())), MOST)]
        if network not in self._let_in:
            counted.append((self._recent(self._all), MOST_IN_ALL))
        waits = [found[0] + WINDOW - self._clock() for found, most in counted if len(found) >= most]
        return max(waits, default=0.0)

    def begin(self, address: str) -> None:
        """A try, which counts as failed until it is right: those that are made at the same time
        count, too."""
        network = _network(address)
        mine = self._failed.pop(network, None) or deque(maxlen=MOST)
        mine.append(self._clock())
        self._failed[network] = mine
        self._all.append(self._clock())
        if len(self._failed) > NETWORKS:
            self._failed.popitem(last=False)

    def right(self, address: str) -> None:
        """Someone is let in: what came before from there is forgiven."""
        network = _network(address)
        for one in self._failed.pop(network, deque()):
            if one in self._all:
                self._all.remove(one)
        self._let_in[network] = None
        self._let_in.move_to_end(network)
        if len(self._let_in) > NETWORKS:
            self._let_in.popitem(last=False)

    def _recent(self, found: deque[float]) -> deque[float]:
        while found and found[0] < self._clock() - WINDOW:
            found.popleft()
        return found


def _network(address: str) -> str:
    """An address of IPv6 costs nothing: its /64 counts."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)
