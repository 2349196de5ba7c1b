"""The guardian: a second process that ends SMTP sessions in words when ours dies.

It runs by itself, as ``python -I -S guardian.py``, and imports nothing of the package, so that it
is small and there at once.  ``net.guard`` starts it and talks to it.

It holds a duplicate of each connection, so that the death of our process closes none of them.  Our
process tells it of each connection and of its end, over the socket that is its standard input.  The
end of file there is the death of our process, whatever that died of.  Then it says to each peer
what it was given to say (421, RFC 5321 3.8), and is gone.  It has nothing else open, and holds up
no port and no lock.

While a connection is kept, nothing is read from it and nothing written: it is our process's.
"""

import contextlib
import selectors
import socket
import struct
import time

# What our process says: a letter, the number of the connection, and how many octets of text follow.
RECORD = struct.Struct("!cQH")
#: Keep this connection, which comes along; the text is what to say to its peer at the end.
KEEP = b"k"
#: Say this text instead.
CHANGE = b"c"
#: Let it go: our process has ended it, or it does without.
LET_GO = b"l"
#: End it now, in words.
END = b"e"

# After the last words each line that comes is answered with them once more, until the peer closes.
# Exim 4.100.1 hears them as the answer to one RCPT, goes on with the recipients accepted before,
# and takes an end without an answer to its DATA for their success.  Besides, what a peer has on its
# way would turn our close into a reset, which may overtake the words.

# A line may be one of a message, of which there are many: no more answers than a transaction has
# commands (``max_recipients``, and some).
ANSWERS = 1100
# Seconds of silence, and in all, after which we close: a peer may have a whole message on its way,
# but one that is gone must not hold up a restart for long.
SILENCE = 30.0
AT_MOST = 300.0
# Connections that are being ended at a time while our process lives; then the oldest is closed.
ENDING = 100

READ = 64 * 1024


class Ending:
    """A connection that is being ended: the last words, again for each line, until the peer closes
    or says QUIT."""

    def __init__(self, connection: socket.socket, text: bytes) -> None:
        self.connection = connection
        self._again = text.lstrip(b"\r\n")
        self._to_say = text
        self._answers = ANSWERS
        self._line = b""  # the beginning of one
        self._quitted = False
        self._until = time.monotonic() + AT_MOST
        self._silent_until = 0.0
        self._came_forward()

    @property
    def give_up_at(self) -> float:
        """On the monotonic clock."""
        return min(self._until, self._silent_until)

    @property
    def events(self) -> int:
        """What it waits for."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._to_say else 0)

    def _came_forward(self) -> None:
        self._silent_until = time.monotonic() + SILENCE

    def go_on(self) -> bool:
        """Do what can be done now; whether there is more to come."""
        try:
            self._write()
            more = self._read()
            self._write()
        except OSError:  # the peer is gone
            return False
        return more

    def _write(self) -> None:
        if self._to_say:
            with contextlib.suppress(BlockingIOError):
                self._to_say = self._to_say[self.connection.send(self._to_say) :]
                self._came_forward()
        if self._quitted and not self._to_say:
            self.connection.shutdown(socket.SHUT_WR)

    def _read(self) -> bool:
        """One block at a time: the others have their turn."""
        try:
            data = self.connection.recv(READ)
        except BlockingIOError:
            return True
        self._came_forward()
        *lines, self._line = (self._line + data).split(b"\n")
        self._line = self._line[-READ:]
        for line in lines:
            self._answer(line)
        return bool(data)

    def _answer(self, line: bytes) -> None:
        if self._answers > 0:
            self._answers -= 1
            self._to_say += self._again
        if line.strip().upper() == b"QUIT":
            self._quitted, self._answers = True, 0


class Guardian:
    """What the process does; ``parent`` is the socket to ours."""

    def __init__(self, parent: socket.socket) -> None:
        self._parent = parent
        self._kept: dict[int, tuple[socket.socket, bytes]] = {}
        self._ending: dict[Ending, None] = {}  # the oldest first
        self._selector = selectors.DefaultSelector()
        self._selector.register(parent, selectors.EVENT_READ)

    def run(self) -> None:
        """Until our process is dead and every session has been ended."""
        alive = True
        while alive or self._ending:
            for key, _ in self._selector.select(self._patience()):
                if key.data is not None:
                    self._go_on(key.data)
                elif not self._listen():
                    alive = False
                    self._selector.unregister(self._parent)
                    for number in list(self._kept):
                        self._end(number)
            for one in [one for one in self._ending if one.give_up_at <= time.monotonic()]:
                self._close(one)

    def _patience(self) -> float | None:
        if not self._ending:
            return None
        first = min(one.give_up_at for one in self._ending)
        return max(0.0, first - time.monotonic())

    def _listen(self) -> bool:
        """Hear one record; ``False`` when our process is dead."""
        try:
            record, descriptors, _, _ = socket.recv_fds(self._parent, RECORD.size, 1)
            if len(record) < RECORD.size:
                return False
            what, number, size = RECORD.unpack(record)
            text = self._parent.recv(size, socket.MSG_WAITALL) if size else b""
        except OSError:
            return False
        if what == KEEP and descriptors:
            self._kept[number] = socket.socket(fileno=descriptors[0]), text
        elif number in self._kept:
            if what == CHANGE:
                self._kept[number] = self._kept[number][0], text
            elif what == LET_GO:
                self._kept.pop(number)[0].close()
            elif what == END:
                self._end(number)
                if len(self._ending) > ENDING:
                    self._close(next(iter(self._ending)))
        return True

    def _end(self, number: int) -> None:
        connection, text = self._kept.pop(number)
        with contextlib.suppress(OSError):
            # The close comes after all is said, and nothing of that may be thrown away.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        one = Ending(connection, text)
        self._ending[one] = None
        self._selector.register(connection, one.events, one)
        self._go_on(one)

    def _go_on(self, one: Ending) -> None:
        before = one.events
        if not one.go_on():
            self._close(one)
        elif one.events != before:
            self._selector.modify(one.connection, one.events, one)

    def _close(self, one: Ending) -> None:
        if one in self._ending:
            del self._ending[one]
            self._selector.unregister(one.connection)
            one.connection.close()


if __name__ == "__main__":
    Guardian(socket.socket(fileno=0)).run()
