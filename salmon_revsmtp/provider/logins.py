"""Who guesses passwords is slowed down, and then shut out.

By network, for an address of IPv6 costs nothing: an IPv4 address, or a /64.  What is remembered is
bounded, and forgotten after a while.
"""

from __future__ import annotations

import ipaddress
import logging
from collections import OrderedDict, deque
from collections.abc import Callable

from salmon_revsmtp.foreign import printable
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["LoginGuard"]

log = logging.getLogger(__name__)

# Failures that are remembered count for so many seconds; so long is someone shut out, too.
WINDOW = 900.0
# From so many on, one is shut out.  A customer with a wrong password calls every ten minutes and
# tries two mechanisms.
MOST = 20
# Seconds until a wrong password is answered: this, doubled with each that came before, up to that.
FIRST_DELAY = 0.5
LONGEST_DELAY = 16.0
# Networks that are remembered.  Who has more of them guesses a password from each.
NETWORKS = 10_000

SHUT_OUT = Reply(421, "too many failed logins from your address, try again later", "4.7.0")


class LoginGuard:
    """Counts failed logins.  ``clock`` gives seconds that pass as they do.

    ``tell``  is told the network of each, for other hosts to hear.
    """

    def __init__(
        self, clock: Callable[[], float], tell: Callable[[str], None] = lambda network: None
    ) -> None:
        self._clock, self._tell = clock, tell
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def refusal(self, address: str) -> Reply | None:
        """What someone hears who is shut out."""
        return SHUT_OUT if len(self._recent(_network(address))) >= MOST else None

    def failed(self, address: str, name: str, mechanism: str) -> float:
        """Note a failed login; returns the seconds that its answer has to wait."""
        network = _network(address)
        recent = self._recent(network)
        recent.append(self._clock())
        self._remember(network, recent)
        self._tell(network)
        log_safely(
            log,
            logging.WARNING,
            "peer=%s account=%r mechanism=%s the login failed, %d in %d minutes%s",
            address,
            printable(name[:80]),
            mechanism,
            len(recent),
            WINDOW / 60,
            f"; {network} is shut out" if len(recent) >= MOST else "",
        )
        return float(min(FIRST_DELAY * 2 ** min(len(recent) - 1, 10), LONGEST_DELAY))

    def heard(self, network: str, number: int, ago: float) -> None:
        """So many logins from a network failed at another host, so many seconds ago."""
        recent = self._recent(network)
        at = self._clock() - ago
        # More than that say no more.
        more = [at] * min(number, max(0, MOST - len(recent)))
        self._remember(network, deque(sorted([*recent, *more])))

    def _remember(self, network: str, recent: deque[float]) -> None:
        self._failures[network] = recent
        self._failures.move_to_end(network)
        if len(self._failures) > NETWORKS:
            self._failures.popitem(last=False)

    def _recent(self, network: str) -> deque[float]:
        found = self._failures.get(network, deque())
        since = self._clock() - WINDOW
        while found and found[0] < since:
            found.popleft()
        return found


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)
