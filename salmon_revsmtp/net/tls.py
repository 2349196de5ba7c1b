"""TLS for the connections that come to us, in no more memory than an idle one needs.

asyncio's own TLS keeps a read buffer of 256 KiB for each connection, for as long as it is open; a
provider holds ten thousand that say nothing for hours.  A :class:`TlsTransport` stands between the
asyncio transport of a connection and its protocol: a protocol to what is below it, a transport to
what is above.  OpenSSL reads and writes memory only.

Memory.  All connections of a thread read into one buffer: what is in it is decrypted before the
next read.  OpenSSL's memory never shrinks, so what it is given at a time is small: it then needs a
few KiB also after a large message.  What is written is encrypted at once and waits in the transport
below, whose back-pressure the protocol feels as if it were its own.

Fairness.  The server's part of a handshake is a millisecond or two of work.  When thousands of
customers call at once, as after a restart, their handshakes take turns with everything else: a few
milliseconds of them in each round of the event loop.  What a peer sends without end, if only to
change keys, is read a piece at a time, too.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast

__all__ = ["TlsTransport"]

# Seconds for a handshake; asyncio has 60.  (RFC 5321 4.5.3.2.1 gives a greeting 5 minutes.)
HANDSHAKE = 30.0
# Seconds in which a peer has to take what was said last, or some of it, and close its side, too.
CLOSE = 30.0

# Octets that are read from a connection at a time.
READ = 64 * 1024
# Octets that OpenSSL is given at a time, of either kind: what the two memories of a connection hold
# at most, and a third more, is what they take up for ever.  Where much is written, more at a time
# makes it as fast as asyncio is.
PIECE, LARGE_PIECE = 4096, 8192
# The clear text of a record has no more (RFC 8446 5.1).
RECORD = 16 * 1024
# Octets that are encrypted before they are handed on.
BLOCK = 64 * 1024

# Seconds of handshakes in one round of the event loop.
ROUND = 0.005


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """One connection under TLS, in the server's role.

    It takes the place of the protocol of ``below`` at once.  What has not been read by then is TLS;
    who has read more than the command that led here must not come here (RFC 3207 4.2,
    CVE-2011-0411).  What has been written goes out first.  It has no protocol until
    :meth:`set_protocol`, and reads nothing after the handshake until :meth:`resume_reading`.

    Closing says so to the peer (close_notify), and waits a while for it to do the same: what was
    said last then arrives, whatever the peer has sent meanwhile.  A peer that closes without a word
    is at its end as well: SMTP itself says what was whole.
    """

    __slots__ = (
        "_below",
        "_closing",
        "_context",
        "_error",
        "_incoming",
        "_loop",
        "_outgoing",
        "_protocol",
        "_queued",
        "_reading",
        "_rest",
        "_shaken",
        "_ssl",
        "_timer",
    )

    def __init__(self, below: asyncio.Transport, context: ssl.SSLContext) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._below = below
        self._context = context
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._protocol: asyncio.Protocol | None = None
        self._shaken: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._rest = b""  # was read, and not given to OpenSSL yet
        self._queued = False  # waits for its turn to shake hands
        self._reading = False
        self._closing = False
        self._error: Exception | None = None
        below.set_protocol(self)

    # -- the handshake --------------------------------------------------------------------------

    def begin_with(self, came: bytes) -> None:
        """What of TLS was read before this was there."""
        self._rest += came

    async def shake_hands(self, timeout: float = HANDSHAKE) -> None:
        """Do the handshake, in so many seconds.  Raises :class:`OSError`, of which
        :class:`ssl.SSLError` is one; the connection is gone then, and no one else is told."""
        if self._below.is_closing():
            raise ConnectionResetError("the connection was lost")
        self._shaken = self._loop.create_future()
        self._timer = self._loop.call_later(timeout, self._too_slow, timeout)
        self._below.resume_reading()
        if self._rest:
            self._queue()
        try:
            await self._shaken
        except BaseException:
            self._below.abort()
            raise
        finally:
            self._shaken = None
            self._stop_timer()

    def _too_slow(self, timeout: float) -> None:
        if self._queued:  # that is not the peer's fault
            self._timer = self._loop.call_later(timeout, self._too_slow, timeout)
            return
        self._fail(ConnectionAbortedError(f"it took longer than {timeout:g} seconds"))

    def _fail(self, error: Exception) -> None:
        if self._shaken is not None and not self._shaken.done():
            self._shaken.set_exception(error)

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            _shared.turns(self._loop).add(self._shake)

    def _shake(self) -> None:
        """Its turn has come: go on with the handshake as far as what came allows."""
        self._queued = False
        if self._shaken is None or self._shaken.done():
            return
        try:
            while self._rest:
                self._incoming.write(self._rest[:PIECE])
                self._rest = self._rest[PIECE:]
                try:
                    self._ssl.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                self._shaken.set_result(None)
                return
            self._below.resume_reading()
        except OSError as error:  # ssl.SSLError is one
            self._fail(error)
        finally:
            self._hand_on()  # an alert, too

    # -- what is below calls these ----------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        return _shared.buffer

    def buffer_updated(self, nbytes: int) -> None:
        came: bytes | memoryview = _shared.buffer[:nbytes]
        if self._protocol is not None:
            if self._rest:  # it was closed before anyone read
                came, self._rest = self._rest + bytes(came), b""
            self._take(came)
            return
        # Before the handshake is done, and after it until someone reads.
        self._rest += bytes(came)
        self._below.pause_reading()
        if self._shaken is not None:
            self._queue()

    def eof_received(self) -> None:
        self._fail(ConnectionResetError("the peer closed the connection"))
        if not self._closing and self._protocol is not None:
            self._closing = True
            self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._stop_timer()
        self._fail(exc or ConnectionResetError("the connection was lost"))
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.connection_lost(self._error or exc)

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    # -- octets -----------------------------------------------------------------------------------

    def _take(self, came: bytes | memoryview) -> None:
        """Decrypt what came, and hand it to the protocol."""
        pieces: list[bytes] = []
        try:
            over = self._decrypt(came, pieces)
        except ssl.SSLError as error:
            self._lose(error)
            return
        if self._outgoing.pending:
            self._hand_on()
        if self._closing:
            if over:
                self._below.close()
            return
        assert self._protocol is not None
        if pieces:
            self._protocol.data_received(b"".join(pieces))
        # If what came had it abort, the end is no news.
        if over and not self.is_closing() and not self._protocol.eof_received():
            self.close()

    def _decrypt(self, came: bytes | memoryview, pieces: list[bytes]) -> bool:
        """Whether the peer has no more to say.  Raises :class:`ssl.SSLError`."""
        read, give = self._ssl.read, self._incoming.write
        for start in range(0, len(came) or 1, PIECE):
            give(came[start : start + PIECE])
            try:
                while piece := read(RECORD):
                    pieces.append(piece)
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLZeroReturnError:
                pass
            return True
        return False

    def _hand_on(self) -> None:
        """Write what OpenSSL has to say for itself."""
        if (said := self._outgoing.read()) and not self._below.is_closing():
            self._below.write(said)

    def _lose(self, error: Exception) -> None:
        """TLS itself is broken."""
        self._error = error
        self._hand_on()
        self._below.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- a transport ------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As asyncio has them."""
        if name == "ssl_object":
            return self._ssl
        if name == "sslcontext":
            return self._context
        if name in ("cipher", "compression", "peercert"):
            found: Callable[[], Any] = getattr(
                self._ssl, "getpeercert" if name == "peercert" else name
            )
            return found()
        return self._below.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return cast(asyncio.BaseProtocol, self._protocol)

    def is_closing(self) -> bool:
        return self._closing or self._below.is_closing()

    def is_reading(self) -> bool:
        return self._reading and not self.is_closing()

    def pause_reading(self) -> None:
        if self.is_reading():
            self._reading = False
            self._below.pause_reading()

    def resume_reading(self) -> None:
        if self._reading or self.is_closing():
            return
        self._reading = True
        if self._rest or self._incoming.pending or self._ssl.pending():
            self._loop.call_soon(self._catch_up)
        else:
            self._below.resume_reading()

    def _catch_up(self) -> None:
        """What came with the end of the handshake."""
        if not self.is_reading():
            return
        rest, self._rest = self._rest, b""
        try:
            self._take(rest)
        except BaseException:  # as when what is below calls us
            self._below.abort()
            raise
        if self._reading:
            self._below.resume_reading()

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self.is_closing():
            return
        view = memoryview(data)
        encrypt, take = self._ssl.write, self._outgoing.read
        size = PIECE if len(view) < BLOCK else LARGE_PIECE
        for block in range(0, len(view), BLOCK):
            records = []
            try:
                for start in range(block, min(block + BLOCK, len(view)), size):
                    encrypt(view[start : start + size])
                    records.append(take())
            except ssl.SSLError as error:
                self._lose(error)
                return
            self._below.write(b"".join(records))

    def get_write_buffer_size(self) -> int:
        return self._below.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._below.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._below.set_write_buffer_limits(high, low)

    def can_write_eof(self) -> bool:
        """A close ends both directions."""
        return False

    def close(self) -> None:
        if self.is_closing():
            return
        self._closing = True
        try:
            self._decrypt(b"", [])  # OpenSSL's end stumbles over what no one has read
            self._ssl.unwrap()
        except ssl.SSLWantReadError:
            self._hand_on()
            self._below.resume_reading()
            self._wait_for_the_end(self._below.get_write_buffer_size())
        except ssl.SSLError:
            self._below.close()
        else:  # the peer has closed its side before
            self._hand_on()
            self._below.close()

    def _wait_for_the_end(self, unread: int) -> None:
        self._timer = self._loop.call_later(CLOSE, self._look, unread)

    def _look(self, before: int) -> None:
        unread = self._below.get_write_buffer_size()
        if unread < before:
            self._wait_for_the_end(unread)
        else:
            self._below.abort()

    def abort(self) -> None:
        self._closing = True
        self._below.abort()


class _Turns:
    """Work of an event loop that takes turns with everything else: a little in each round."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._soon = False

    def add(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)
        if not self._soon:
            self._soon = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        until = self.loop.time() + ROUND
        try:
            self._waiting.popleft()()
            while self._waiting and self.loop.time() < until:
                self._waiting.popleft()()
        finally:
            self._soon = bool(self._waiting)
            if self._soon:
                self.loop.call_soon(self._go_on)


class _Shared(threading.local):
    """What the connections of a thread share: ``buffer``, which they read into, and whose turn it
    is to shake hands."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(READ))
        self._turns: _Turns | None = None

    def turns(self, loop: asyncio.AbstractEventLoop) -> _Turns:
        if self._turns is None or self._turns.loop is not loop:
            self._turns = _Turns(loop)
        return self._turns


_shared = _Shared()
