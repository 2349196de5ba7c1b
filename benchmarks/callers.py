"""Customers of a provider that hold a push session each, and do nothing else: a process.

``python -m benchmarks.callers PORT NUMBER`` calls with so many accounts at once, over TLS, and
prints the seconds from the first call to the last session that is open.  A session that ends is
called again; when all are open again, that is printed, too: from the last end.  ``PORT NUMBER
bare`` does no more than the TLS handshake, and reads one line.

The sockets are OpenSSL's own, in one thread: ten thousand fit into this process as well.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import secrets
import selectors
import socket
import ssl
import sys
import time
from collections.abc import Generator

from benchmarks.crowd import open_files
from benchmarks.processes import end_with_parent
from benchmarks.project import PASSWORD

__all__ = ["account_name"]

# Seconds until a call that was not taken is tried again.
AGAIN = 0.5
# Connections that are begun at a time: a machine's own table of them is no part of this.
AT_ONCE = 100

Dialogue = Generator[bytes, bytes, None]


def account_name(number: int) -> str:
    """The account of a caller."""
    return f"home-{number}"


@functools.cache
def _salted(salt: bytes, iterations: int) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), salt, iterations)


def _proof(first: str, challenge: str) -> str:
    """RFC 5802 3: the answer to the server's challenge."""
    fields = dict(one.split("=", 1) for one in challenge.split(","))
    salted = _salted(base64.b64decode(fields["s"]), int(fields["i"]))
    key = hmac.digest(salted, b"Client Key", "sha256")
    final = f"c=biws,r={fields['r']}"
    signed = f"{first},{challenge},{final}".encode()
    signature = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
    proof = bytes(a ^ b for a, b in zip(key, signature, strict=True))
    return f"{final},p={base64.b64encode(proof).decode()}"


def _customer(number: int) -> Dialogue:
    """Greeting to EHLO of the reversed session; yields what is said, gets the last line of what is
    answered."""
    yield b""
    yield b"EHLO localhost\r\n"
    first = f"n={account_name(number)},r={secrets.token_hex(12)}"
    answer = yield b"AUTH SCRAM-SHA-256 %s\r\n" % base64.b64encode(b"n,," + first.encode())
    challenge = base64.b64decode(answer.split()[1]).decode()
    yield base64.b64encode(_proof(first, challenge).encode()) + b"\r\n"
    answer = yield b"\r\n"
    if not answer.startswith(b"235"):
        raise ConnectionError(answer.decode())
    yield b"XHOLD\r\n"
    answer = yield b"ATRN\r\n"
    if not answer.startswith(b"250"):
        raise ConnectionError(answer.decode())
    yield b"220 localhost\r\n"


def _bare(number: int) -> Dialogue:
    yield b""


class Caller:
    """One customer."""

    def __init__(self, crowd: Crowd, number: int) -> None:
        self._crowd, self._number = crowd, number
        self._connection: ssl.SSLSocket | None = None
        self._shaken = self.open = False
        self._line = b""
        self._dialogue: Dialogue | None = None

    def call(self) -> None:
        """Begin."""
        raw = socket.socket()
        raw.setblocking(False)
        raw.connect_ex(("127.0.0.1", self._crowd.port))
        self._crowd.selector.register(raw, selectors.EVENT_WRITE, (self, raw))

    def ready(self, raw: socket.socket | None) -> None:
        """Something can be read, or the connection is there."""
        try:
            if raw is not None:
                self._connected(raw)
            if not self._shaken:
                self._shake()
            if self._shaken:
                self._read()
        except (ssl.SSLWantReadError, BlockingIOError):
            return
        except (OSError, StopIteration) as error:
            self._ended(error)

    def _connected(self, raw: socket.socket) -> None:
        self._crowd.selector.unregister(raw)
        if error := raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raw.close()
            raise OSError(error, "no connection")
        self._connection = self._crowd.context.wrap_socket(raw, do_handshake_on_connect=False)
        self._crowd.selector.register(self._connection, selectors.EVENT_READ, (self, None))

    def _shake(self) -> None:
        assert self._connection is not None
        self._connection.do_handshake()
        self._shaken, self._line = True, b""
        self._dialogue = self._crowd.dialogue(self._number)
        next(self._dialogue)

    def _read(self) -> None:
        assert self._connection is not None
        while data := self._connection.recv(4096):
            *lines, self._line = (self._line + data).split(b"\r\n")
            for line in lines:
                self._heard(line)
        raise ConnectionError("it was closed")

    def _heard(self, line: bytes) -> None:
        if self.open:
            self._say(b"250 ok\r\n")  # NOOP
        elif line.startswith(b"EHLO"):
            self._say(b"250-localhost\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
            self._is_open()
        elif line[3:4] != b"-" and self._dialogue is not None:
            try:
                self._say(self._dialogue.send(line))
            except StopIteration:
                self._is_open()

    def _is_open(self) -> None:
        self.open, self._dialogue = True, None
        self._crowd.opened()

    def _say(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.send(data)

    def _ended(self, error: Exception) -> None:
        if self._connection is not None:
            self._crowd.selector.unregister(self._connection)
            self._connection.close()
            self._connection = None
        was_open, self.open, self._shaken = self.open, False, False
        self._crowd.ended(self, was_open, error)


class Crowd:
    """All of them."""

    def __init__(self, port: int, number: int, bare: bool) -> None:
        self.port, self._number = port, number
        self.dialogue = _bare if bare else _customer
        self.selector = selectors.DefaultSelector()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        self._waiting = [Caller(self, one) for one in range(number)]
        self._again: list[tuple[float, Caller]] = []
        self._calling = self._open = 0
        self._failed = 0
        self._started = time.monotonic()

    def opened(self) -> None:
        self._open += 1
        self._calling -= 1
        if self._open == self._number:
            seconds = time.monotonic() - self._started
            print(json.dumps({"seconds": seconds, "failed": self._failed}), flush=True)
            self._failed = 0

    def ended(self, caller: Caller, was_open: bool, error: Exception) -> None:
        if was_open:
            self._open -= 1
            self._started = time.monotonic()
        else:
            self._calling -= 1
            self._failed += 1
        self._again.append((time.monotonic() + AGAIN, caller))

    def run(self) -> None:
        while True:
            now = time.monotonic()
            while self._again and self._again[0][0] <= now:
                self._waiting.append(self._again.pop(0)[1])
            while self._waiting and self._calling < AT_ONCE:
                self._calling += 1
                self._waiting.pop().call()
            for key, _ in self.selector.select(0.1 if self._again else 1.0):
                caller, raw = key.data
                caller.ready(raw)


if __name__ == "__main__":
    end_with_parent()
    open_files()
    Crowd(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["bare"]).run()
