"""A TCP proxy on loopback that breaks a connection at a chosen octet.

It runs in the event loop of its test.  One :class:`Fault` is for one connection, the next that
comes; all others pass unharmed.  Octets are counted per direction, as they are on the wire: under
TLS those of the handshake and of the records.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass
from enum import Enum, auto
from types import TracebackType

__all__ = ["Direction", "Fault", "How", "Proxy"]


class Direction(Enum):
    """Which way octets go; ODMR's customer is who connects, before the reversal and after it."""

    TO_CUSTOMER = auto()
    TO_PROVIDER = auto()


class How(Enum):
    """What happens behind the last octet that gets through."""

    RST = auto()  #: both connections are reset
    FIN = auto()  #: both connections are closed in order
    VANISH = auto()  #: the customer's connection is reset, and the provider hears nothing of it
    HALF = auto()  #: this direction is closed in order, the other goes on
    STALL = auto()  #: nothing more gets through in this direction, and nothing is closed
    TRICKLE = auto()  #: from here on, octets get through one at a time


@dataclass
class Fault:
    """``octets`` get through in a direction, then it happens.  ``struck`` says that it has.

    A trickle is the only one that there can be in both directions at once: ``None``.
    """

    how: How
    direction: Direction | None
    octets: int = 0
    struck: bool = False


class Proxy:
    """Listens on ``port`` (a free one) and connects to ``target``.

    ``fault``   for the next connection; taken by it.
    ``passed``  octets that the last connection to begin has let through, per direction.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.fault: Fault | None = None
        self.passed = dict.fromkeys(Direction, 0)
        self._ends: set[_End] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def stall(self, direction: Direction) -> None:
        """From now on nothing gets through in this direction, and nothing is closed."""
        for end in self._ends:
            end.stall(direction)

    @property
    def connections(self) -> float:
        """How many are open; one that is open at one end only is half of one."""
        return len(self._ends) / 2

    def fault_from_now(self, fault: Fault | None) -> None:
        """The one connection that there is has this fault, after so many more octets; or none."""
        one, other = self._ends
        for end in (one, other):
            end.fault_from_now(fault)

    def abort(self) -> None:
        """Break every connection off, at both ends."""
        for end in list(self._ends):
            end.abort()

    async def quiet(self) -> None:
        """Wait until every connection is closed at both ends."""
        await self._quiet.wait()

    async def __aenter__(self) -> Proxy:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.abort()
        await self.quiet()

    def _accept(self) -> _End:
        fault, self.fault = self.fault, None
        self.passed = dict.fromkeys(Direction, 0)
        customer = _End(self, Direction.TO_PROVIDER, fault, self.passed)
        provider = _End(self, Direction.TO_CUSTOMER, fault, self.passed)
        customer.other, provider.other = provider, customer
        self._ends |= {customer, provider}
        self._quiet.clear()
        return customer

    def gone(self, end: _End) -> None:
        self._ends.discard(end)
        if not self._ends:
            self._quiet.set()


class _End(asyncio.Protocol):
    """One of the two connections of a pair; ``direction`` is where its octets go."""

    other: _End

    def __init__(
        self,
        proxy: Proxy,
        direction: Direction,
        fault: Fault | None,
        passed: dict[Direction, int],
    ) -> None:
        self._proxy, self._direction, self._passed = proxy, direction, passed
        self._pair_fault = fault
        self._fault = fault if fault and fault.direction in (direction, None) else None
        self._transport: asyncio.Transport | None = None
        self._deaf = False  # what comes is thrown away
        # What came before there was another end: Python 3.10 reads on although it was told not to.
        self._early: bytearray | None = bytearray()
        self._eof = False
        self._trickling: asyncio.Task[None] | None = None
        self._held = bytearray()  # came, and goes on one octet at a time
        self._at_rest: list[How] = []  # to be done when all that was written has gone out

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Whatever waits here is told of: a fault comes behind the octets before it.
        transport.set_write_buffer_limits(0)
        if self._direction is Direction.TO_PROVIDER:
            transport.pause_reading()
            self._connecting = asyncio.get_running_loop().create_task(self._connect())
        elif self.other.lost:
            self.abort()
        else:
            self.other.resume()

    async def _connect(self) -> None:
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: self.other, "127.0.0.1", self._proxy.target
            )
        except OSError:
            self._proxy.gone(self.other)
            self.abort()

    @property
    def lost(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def resume(self) -> None:
        if not self.lost:
            assert self._transport is not None
            self._transport.resume_reading()
        if self._early is not None:
            early, self._early = self._early, None
            if early:
                self.data_received(bytes(early))

    def pause(self) -> None:
        if not self.lost:
            assert self._transport is not None
            self._transport.pause_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def stall(self, direction: Direction) -> None:
        self._deaf = self._deaf or self._direction is direction

    def fault_from_now(self, fault: Fault | None) -> None:
        self._pair_fault = fault
        self._fault = fault if fault and fault.direction in (self._direction, None) else None
        self._passed[self._direction] = 0

    # -- octets ---------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._early is not None and self._direction is Direction.TO_PROVIDER:
            self._early += data
            return
        if self._deaf:
            return
        fault = self._fault
        if fault is None:
            self._forward(data)
        elif fault.how is How.TRICKLE:
            self._held += data
            if self._trickling is None:
                self._trickling = asyncio.get_running_loop().create_task(self._trickle())
        else:
            room = fault.octets - self._passed[self._direction]
            self._forward(data[:room])
            if len(data) >= room:
                self._deaf = True
                self.other.when_at_rest(fault.how)

    def _forward(self, data: bytes) -> None:
        self._passed[self._direction] += len(data)
        if not self.other.lost:
            assert self.other._transport is not None
            self.other._transport.write(data)

    async def _trickle(self) -> None:
        assert self._fault is not None
        self._fault.struck = True
        while self._held:
            self._forward(bytes(self._held[:1]))
            del self._held[:1]
            # The receiver reads it before the next one is on its way.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        self._trickling = None
        if self._eof:
            self._pass_eof()

    def pause_writing(self) -> None:
        self.other.pause()

    def resume_writing(self) -> None:
        if self._at_rest:
            self._strike(self._at_rest.pop())
        self.other.resume()

    # -- faults ---------------------------------------------------------------------------------

    def when_at_rest(self, how: How) -> None:
        """Do it when what was written to this end has left the process."""
        if self._transport is not None and self._transport.get_write_buffer_size():
            self._at_rest.append(how)
        else:
            self._strike(how)

    def _strike(self, how: How) -> None:
        assert self._pair_fault is not None
        self._pair_fault.struck = True
        if how is How.STALL:
            return
        if how is How.HALF:
            self._close_half()
            return
        for end in (self, self.other):
            end._deaf = True
            if how is How.VANISH:
                if end._direction is Direction.TO_PROVIDER:
                    end._reset()
            elif how is How.RST:
                end._reset()
            else:
                end._close_half()

    def _reset(self) -> None:
        if self._transport is not None:
            connection = self._transport.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()

    def _close_half(self) -> None:
        # Not a close: that would answer what is still on its way with an RST.
        if not self.lost:
            assert self._transport is not None
            self._transport.write_eof()

    # -- the end --------------------------------------------------------------------------------

    def eof_received(self) -> bool:
        """One side has ended: what it said still goes out, then the other side hears of it."""
        self._eof = True
        if self._trickling is None:
            self._pass_eof()
        return not self.lost

    def _pass_eof(self) -> None:
        stalled = self._deaf and self._fault is not None and self._fault.how is How.STALL
        if self.other._eof or self.other.lost or stalled:
            self.close()
            self.other.close()
        elif not self._deaf:  # if deaf, the fault has seen to it
            self.other._close_half()

    def close(self) -> None:
        if not self.lost:
            assert self._transport is not None
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._trickling is not None:
            self._trickling.cancel()
        fault = self._pair_fault
        if fault is None or fault.how is not How.VANISH or not fault.struck:
            self.other.close()
        self._proxy.gone(self)
