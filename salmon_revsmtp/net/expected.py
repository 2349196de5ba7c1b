"""Whom a listening service expects: networks, and the addresses that host names stand for."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["Address", "Expected", "address_of"]

# Seconds after which names are looked up again; DNS lets most be remembered for about that long.
LOOK_UP_EVERY = 600.0
# Addresses that were met, and are remembered.
MET = 64

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def address_of(text: str) -> Address | None:
    """A peer's address, an IPv4 one as such also where the socket is of IPv6; ``None`` for what is
    no address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class Expected:
    """``address in expected``: it is in one of the ``networks``, or one of ``names`` stands for it,
    or it was met.

    Names are looked up in a thread, so that no one waits for DNS; until that has answered, what it
    said before is true, and nothing the first time.
    """

    def __init__(self, networks: Iterable[str] = (), names: Iterable[str] = ()) -> None:
        self._networks = [ipaddress.ip_network(one) for one in networks]
        self._names = tuple(dict.fromkeys(names))
        self._found: frozenset[Address] = frozenset()
        self._met: OrderedDict[Address, None] = OrderedDict()
        self._look_up_at = 0.0
        self._looking = threading.Lock()

    def meet(self, text: str) -> None:
        """This address is one of them: we have just talked to it."""
        if (address := address_of(text)) is not None:
            self._met.pop(address, None)
            self._met[address] = None
            while len(self._met) > MET:
                self._met.popitem(last=False)

    def look_up(self) -> None:
        """Have the names looked up, if that was not done in the last minutes."""
        if not self._names or time.monotonic() < self._look_up_at:
            return
        if self._looking.acquire(blocking=False):
            self._look_up_at = time.monotonic() + LOOK_UP_EVERY
            try:
                threading.Thread(target=self._look_up, name="expected", daemon=True).start()
            except RuntimeError:  # no thread to be had now
                self._looking.release()

    def __contains__(self, text: object) -> bool:
        self.look_up()
        address = address_of(str(text))
        if address is None:
            return False
        if address in self._found or address in self._met:
            return True
        return any(address in network for network in self._networks)

    def _look_up(self) -> None:
        try:
            self._found = frozenset(one for name in self._names for one in _addresses(name))
        finally:
            self._looking.release()


def _addresses(name: str) -> Iterable[Address]:
    try:
        found = socket.getaddrinfo(name.strip("[]").rstrip("."), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for *_, where in found:
        if (address := address_of(str(where[0]))) is not None:
            yield address
