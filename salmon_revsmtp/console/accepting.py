"""Sockets that take so many connections, and no more: the descriptors are those of a process that
has mail to deliver.

It is seen to where a connection comes, before TLS and before anything is asked: who says nothing
takes a descriptor, too.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import weakref
from collections.abc import Sequence

from salmon_revsmtp.console.settings import Network

__all__ = ["CONNECTIONS", "CONNECTIONS_PER_ADDRESS", "Bounds", "Listening"]

# Connections at a time: in all, and from one address that is no proxy of ours.  A browser has six.
CONNECTIONS, CONNECTIONS_PER_ADDRESS = 300, 100


class Bounds:
    """What several sockets have together.  ``proxies``: those that speak for many."""

    def __init__(self, proxies: Sequence[Network]) -> None:
        self._proxies = proxies
        self._there: weakref.WeakKeyDictionary[socket.socket, str] = weakref.WeakKeyDictionary()

    def admit(self, connection: socket.socket, address: str) -> bool:
        """Whether there is room for another one."""
        there = [one for each, one in self._there.items() if each.fileno() >= 0]
        if len(there) >= CONNECTIONS:
            return False
        if there.count(address) >= CONNECTIONS_PER_ADDRESS and not self._is_proxy(address):
            return False
        self._there[connection] = address
        return True

    def _is_proxy(self, address: str) -> bool:
        with contextlib.suppress(ValueError):
            return any(ipaddress.ip_address(address) in one for one in self._proxies)
        return False


class Listening(socket.socket):
    """One that listens."""

    bounds: Bounds

    def accept(self) -> tuple[socket.socket, object]:
        """The next connection.  Raises :class:`ConnectionAbortedError` after one for which there is
        no room: an event loop goes on then."""
        connection, peer = super().accept()
        if not self.bounds.admit(connection, str(peer[0])):
            connection.close()
            raise ConnectionAbortedError
        return connection, peer
