"""Handlers that come with the package, and a server that they hand mail on to, in this process."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from salmon import utils
from salmon.routing import Router

from salmon_revsmtp.delivery.router import RouterDelivery
from salmon_revsmtp.handlers import options
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.replies import Reply

# Seconds after which a test is stuck.
STUCK = 20.0


def load(monkeypatch: pytest.MonkeyPatch, *names: str, **settings: Any) -> None:
    """Import these handlers of the package, as a boot module does, with these settings."""
    monkeypatch.setattr(utils, "settings", SimpleNamespace(**settings))
    monkeypatch.setattr(options, "PROJECT", Path.cwd())
    modules = [f"salmon_revsmtp.handlers.{name}" for name in names]
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    Router.load(modules)


def deliver(
    content: bytes = b"Subject: x\n\nhello",
    recipient: str = "bob@example.org",
    sender: str = "ann@example.net",
    trace: bytes = b"",
    **envelope: Any,
) -> Reply:
    """A message, with LF line ends and without the last one, to the handlers."""
    whole = Envelope(sender, (recipient,), **envelope)
    return RouterDelivery().deliver(("192.0.2.1", 25), whole, recipient, trace, content)


class Call:
    """One connection to the server of a test, as the test has it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(STUCK)
        self.socket = connection
        self._file = connection.makefile("rb")

    def hear(self, expected: str = "") -> str:
        """The next line, which begins with this."""
        line = self._file.readline().decode()
        assert line.startswith(expected), f"heard {line!r}, not {expected!r}"
        return line.rstrip("\r\n")

    def say(self, *lines: str) -> None:
        # In one piece: the other side may reset the connection after the first line.
        self.socket.sendall(b"".join(line.encode() + b"\r\n" for line in lines))

    def asks(self, command: str, *reply: str) -> str:
        heard = self.hear(command)
        self.say(*reply)
        return heard

    def greet(self, *extensions: str, hello: str = "LHLO") -> None:
        self.say("220 next.example.org")
        lines = ["next.example.org", *extensions]
        reply = [f"250-{line}" for line in lines[:-1]] + [f"250 {lines[-1]}"]
        self.asks(hello, *reply)

    def up_to_data(self) -> None:
        self.asks("MAIL FROM:", "250 2.1.0 ok")
        self.asks("RCPT TO:", "250 2.1.5 ok")
        self.asks("DATA", "354 go ahead")

    def data(self) -> bytes:
        """What comes up to the end of data, as it is on the wire."""
        lines = []
        while (line := self._file.readline()) != b".\r\n":
            assert line, "the connection ended within the data"
            lines.append(line)
        return b"".join(lines)

    def message(self, reply: str = "250 2.0.0 saved") -> bytes:
        self.up_to_data()
        data = self.data()
        self.say(reply)
        return data

    def silence(self) -> None:
        """The other side closes without another word, or after QUIT."""
        with contextlib.suppress(ConnectionError):
            assert self._file.read() in (b"", b"QUIT\r\n")

    def reset(self) -> None:
        """Break the connection off."""
        linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        self._file.close()
        self.socket.close()


Script = Callable[[Call], None]


@contextlib.contextmanager
def next_host(*scripts: Script, path: str = "", at_once: bool = False) -> Iterator[str]:
    """A server whose first connection follows the first script, and so on; ``at_once`` they do so
    at the same time.  Yields its address as the settings have it.  At the end every script has run,
    and no one has called once more."""
    listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET)
    listener.bind(path or ("127.0.0.1", 0))
    listener.listen()
    listener.settimeout(STUCK)
    errors: list[BaseException] = []

    def serve(scripts: Sequence[Script]) -> None:
        for script in scripts:
            try:
                connection, _ = listener.accept()
                with connection:
                    script(Call(connection))
            except BaseException as error:
                errors.append(error)
                return

    each = [[one] for one in scripts] if at_once else [scripts]
    threads = [threading.Thread(target=serve, args=(some,)) for some in each]
    for thread in threads:
        thread.start()
    try:
        yield f"unix:{path}" if path else f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for thread in threads:
            thread.join()
        listener.setblocking(False)
        with listener, contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            errors.append(AssertionError("it was called once more"))
    if errors:
        raise errors[0]
