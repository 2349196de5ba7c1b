"""A listening socket: many connections at once, each with a place, and ended together."""

from __future__ import annotations

import asyncio
import errno
import logging
import ssl
from collections.abc import Callable, Container
from functools import partial

from salmon_revsmtp.net.driver import Driver
from salmon_revsmtp.net.forecourt import Forecourt, Forecourts
from salmon_revsmtp.net.places import Places
from salmon_revsmtp.net.vestibule import Vestibule
from salmon_revsmtp.net.words import came_back, listen_advice
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["Admit", "Listener", "cannot_listen", "places_for", "why_not_listen"]

log = logging.getLogger(__name__)

# What costs memory is bounded where it is; this is for descriptors, of which a process has 1,024.
MAX_CONNECTIONS = 100
# What one provider opens at once; Postfix has 20, Exim 10.
MAX_PER_ADDRESS = 25

# Connections that the system keeps until we take them, where it allows so many: when a provider
# comes back, all its customers call at once.  asyncio takes as many at a time as it is told to have
# waiting, so it is told of its usual 100.
BACKLOG = 4096

_STOPPED = Reply(421, "shutting down, try again later", "4.3.2")

#: Asked of a connection that has come: ``None`` lets it in, a reply is said to it instead of the
#: greeting.
Admit = Callable[[Driver], Reply | None]


def cannot_listen(name: str, host: str, port: int, error: OSError) -> OSError:
    """Which service cannot have its address, why, and what to try, as an error of the same
    kind."""
    where = f"{name} cannot listen on {host or '*'}:{port}"
    number = error.errno or errno.EADDRNOTAVAIL
    advice = listen_advice(error, port)
    reason = came_back(error if error.errno else OSError(number, ""))
    return OSError(number, f"{where}: {reason}" + (f"; {advice}" if advice else ""))


async def why_not_listen(name: str, host: str, port: int) -> str | None:
    """Why an address cannot be listened on now, and what to try; ``None`` if it can."""
    unused = Listener(name, _unconnected, host, port)
    try:
        await unused.start(quietly=True)
    except OSError as error:
        return error.strerror or str(error)
    finally:
        await unused.stop(0)
    return None


def _unconnected(admit: Admit) -> Driver:
    raise ConnectionAbortedError("nothing is served here yet")


def places_for(most: int, expected: Container[str]) -> Places:
    """Places that several listeners share."""
    return Places(most, MAX_PER_ADDRESS, expected)


class Listener:
    """Takes connections on an address.

    ``name``     for the log.
    ``connect``  makes the driver of a connection, which asks what it is given once it is there.
    ``tls``      TLS from the start: asked for each connection, for certificates are renewed.
    ``max_connections``, ``max_per_address``  at a time, the latter for a /24, or an IPv6 /64; then
                 an idle one gives way, or the newcomer hears 421: see :class:`Places`.
    ``expected`` addresses for which there is always a place.
    ``places``   shares them with other listeners: instead of the limits.
    ``refuse``   asked first: the reply for whom no place is to be had at all.
    ``balancers`` addresses whose connections begin with a PROXY header: see :class:`Forecourt`.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[Admit], Driver],
        host: str,
        port: int,
        *,
        tls: Callable[[], ssl.SSLContext] | None = None,
        max_connections: int | None = None,
        max_per_address: int | None = None,
        expected: Container[str] = frozenset(),
        places: Places | None = None,
        refuse: Callable[[str], Reply | None] = lambda address: None,
        balancers: Container[str] | None = None,
    ) -> None:
        self.name = name
        self._connect = connect
        self._host, self._port = host, port
        self._tls = tls
        self._refuse = refuse
        if places is None:
            most, of_each = max_connections or MAX_CONNECTIONS, max_per_address or MAX_PER_ADDRESS
            places = Places(most, of_each, expected)
        self._places = places
        self._hurrying = False  # soon
        self._server: asyncio.Server | None = None
        self._stopping = False
        self._connections: set[Driver] = set()
        self._shaking_hands: set[Vestibule] = set()
        self._forecourts = Forecourts(name, balancers) if balancers is not None else None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """Where it listens, for a person."""
        host = f"[{self._host}]" if ":" in self._host else self._host or "*"
        return f"{host}:{self.port}"

    @property
    def tls_from_the_start(self) -> bool:
        """Whether a client begins with TLS."""
        return self._tls is not None

    async def start(self, quietly: bool = False) -> None:
        """Listen; port 0 takes a free one.  Raises :class:`OSError` when the address cannot be
        had.  ``quietly``: only to see whether it can; no connection is taken."""
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._accept,
                self._host or None,
                self._port,
                start_serving=not quietly,
            )
        except OSError as error:
            raise cannot_listen(self.name, self._host, self._port, error) from None
        if not quietly:
            for one in self._server.sockets:
                with one.dup() as listening:
                    listening.listen(BACKLOG)
            log.info("%s listens on %s:%d", self.name, self._host or "*", self.port)

    async def stop(self, grace: float) -> None:
        """Take no more connections; end each at its next message boundary, and break off what has
        not ended after ``grace`` seconds."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
        if self._forecourts is not None:
            self._forecourts.close()
        for shaking in list(self._shaking_hands):
            shaking.abort()
        connections = list(self._connections)
        for one in connections:
            one.shut_down()
        if connections:
            _, late = await asyncio.wait([one.ended for one in connections], timeout=grace)
            for one in connections if late else ():
                one.abort("the server is shutting down")

    def _accept(self) -> asyncio.Protocol:
        if self._forecourts is not None:
            return Forecourt(self._forecourts, self._enter)
        return self._enter()

    def _enter(self) -> Driver | Vestibule:
        if self._tls is None:
            return self._connect(self._admit)
        return Vestibule(
            self._tls(), lambda: self._connect(self._admit), self._arrived, self._went_on
        )

    def _arrived(self, shaking: Vestibule) -> bool:
        self._shaking_hands.add(shaking)
        address = shaking.peer[0]
        return not (self._stopping or self._refuse(address) or self._places.admit(shaking))

    def _went_on(self, shaking: Vestibule) -> None:
        self._shaking_hands.discard(shaking)
        self._places.leave(shaking)

    def _admit(self, driver: Driver) -> Reply | None:
        """Give a connection a place from when it is there."""
        driver.ended.add_done_callback(partial(self._ended, driver))
        self._connections.add(driver)
        if self._stopping:  # its handshake took that long
            return _STOPPED
        return self._refuse(driver.peer[0]) or self._places.admit(driver)

    def _ended(self, driver: Driver, _: object) -> None:
        self._connections.discard(driver)
        self._places.leave(driver)

    def hurry(self) -> None:
        """Memory is short: end the connections whose messages come too slowly for that, soon."""
        if not self._hurrying:
            self._hurrying = True
            asyncio.get_running_loop().call_soon(self._hurry)

    def _hurry(self) -> None:
        self._hurrying = False
        self._places.hurry()
