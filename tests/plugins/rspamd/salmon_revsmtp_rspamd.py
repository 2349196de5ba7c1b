"""A spam filter: rspamd is asked about each message, over HTTP, before it is delivered or held."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from salmon_revsmtp import Envelope, Reply, hookimpl

# A logger of this name is heard although Salmon's logging.conf does not name it.
log = logging.getLogger("salmon_revsmtp.rspamd")

MAX_MESSAGE = 50 * 1024 * 1024  # rspamd takes no larger one, unless its max_message says so
MAX_ANSWER = 1024 * 1024
MAX_SYMBOLS = 100

# What is not spam. "greylist" is a score; what is to come again later is a "soft reject".
HAM = ("no action", "greylist")

NOT_NOW = Reply(451, "the spam filter does not answer, try again later", "4.7.1")

OUR_RECEIVED = re.compile(rb"\AReceived:.*\n(?:[ \t].*\n)*")


class NoAnswer(Exception):
    """rspamd cannot be asked, or says nothing that we understand."""


@hookimpl
def message_received(
    envelope: Envelope, message: bytes, add_field: Callable[[str, str], None]
) -> Reply | None:
    """Before a message is delivered or held."""
    try:
        rspamd = from_environment()
    except ValueError as error:
        log.error("mail is deferred until this is right: %s", error)
        return NOT_NOW
    return rspamd.check(envelope, message, add_field)


@functools.cache
def from_environment() -> Rspamd:
    """When the first message comes: ``.env`` is read after plugins are loaded."""
    keys = ("url", "timeout", "unreachable", "reject")
    found = {key: os.environ.get(f"RSPAMD_{key.upper()}") for key in keys}
    return Rspamd(**{key: value for key, value in found.items() if value})


class Rspamd:
    """Where rspamd is, and what is done with what it says.

    ``url``          where rspamd's normal worker listens.
    ``timeout``      seconds for the connection, and as many for the question and the answer.
    ``unreachable``  what becomes of a message without an answer: "defer" or "accept".
    ``reject``       what becomes of one that rspamd rejects: "refuse" or "mark".
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:11333",
        timeout: float | str = 10.0,
        unreachable: str = "defer",
        reject: str = "refuse",
    ) -> None:
        parts, self.timeout = urlsplit(url), float(timeout)
        if parts.scheme != "http" or not parts.hostname:
            before, at, host = url.partition("?")[0].rpartition("@")  # a login is before the @
            shown = f"***@{host}" if before and at else host
            raise ValueError(f"RSPAMD_URL: found {shown!r}, allowed: http://HOST:PORT")
        if not self.timeout > 0:
            raise ValueError(f"RSPAMD_TIMEOUT: found {timeout!r}, allowed: seconds above 0")
        if unreachable not in ("defer", "accept"):
            raise ValueError(f"RSPAMD_UNREACHABLE: found {unreachable!r}, allowed: defer, accept")
        if reject not in ("refuse", "mark"):
            raise ValueError(f"RSPAMD_REJECT: found {reject!r}, allowed: refuse, mark")
        self.host, self.port = parts.hostname, parts.port or 80
        self.unreachable, self.reject = unreachable, reject

    def check(
        self, envelope: Envelope, message: bytes, add_field: Callable[[str, str], None]
    ) -> Reply | None:
        """Refuse the message, or say in its header what rspamd thinks of it."""
        # As other mail servers ask: without the line of the server that asks, and with an end of
        # the last line.
        content = OUR_RECEIVED.sub(b"", message, count=1).removesuffix(b"\n") + b"\n"
        if len(content) > MAX_MESSAGE:
            add_field("X-Spam", "Unknown")
            return None
        try:
            action, score, required, symbols, text = verdict(self.ask(envelope, content))
        except NoAnswer as error:
            log.error("from=%.100a %s: %s", envelope.reverse_path, self.unreachable, error)
            if self.unreachable == "defer":
                return NOT_NOW
            add_field("X-Spam", "Unknown")
            return None
        log.info("from=%.100a action=%.30a score=%.2f", envelope.reverse_path, action, score)
        if action == "soft reject":
            return Reply(451, text or "try again later", "4.7.1")
        if action == "reject" and self.reject == "refuse":
            return Reply(550, text or "this looks like spam", "5.7.1")
        add_field("X-Spam", "No" if action in HAM else "Yes")
        add_field("X-Spam-Score", f"{score:.2f} / {required:.2f}")
        add_field("X-Spam-Symbols", ", ".join(symbols))
        return None

    def ask(self, envelope: Envelope, content: bytes) -> bytes:
        """The answer to ``POST /checkv2``."""
        where = f"asking rspamd at {self.host}:{self.port}"
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        try:
            connection.connect()
        except OSError as error:
            raise NoAnswer(f"{where}: {error}") from None
        # The timeout of a socket begins anew with each octet.
        late = threading.Event()
        timer = threading.Timer(self.timeout, hang_up, [connection.sock, late])
        timer.daemon = True
        timer.start()
        try:
            connection.putrequest("POST", "/checkv2")
            for name, value in about(envelope):
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(content)))
            connection.endheaders(content)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = str(error)[:200] or type(error).__name__
            raise NoAnswer(f"{where}: {printable(why)}") from None
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():
            raise NoAnswer(f"{where}: no answer in {self.timeout:g} seconds")
        if response.status != 200 or len(answer) > MAX_ANSWER:
            raise NoAnswer(f"{where}: HTTP {response.status}, {len(answer)} octets")
        return answer


def verdict(answer: bytes) -> tuple[str, float, float, list[str], str]:
    """Action, score, the score at which it rejects, symbols, and what the client is to hear."""
    try:
        said: dict[str, Any] = json.loads(answer)
        symbols = [one for one in said["symbols"] if re.fullmatch(r"[A-Z0-9_]{1,80}", one)]
        numbers = float(said["score"]), float(said["required_score"])
        text = str(said.get("messages", {}).get("smtp_message") or "")
        return said["action"].lower(), *numbers, symbols[:MAX_SYMBOLS], text
    except Exception as error:  # whatever is wrong with it
        raise NoAnswer(f"what rspamd answers is no verdict: {type(error).__name__}") from None


def hang_up(connection: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


def about(envelope: Envelope) -> Iterator[tuple[str, str]]:
    """The headers for what is not in the message.

    There is no User: that is someone who has logged in, and is trusted.  On a reversed connection
    the client may not be known, and the provider is not it.  Without an IP rspamd goes by the
    Received line that the provider has written.
    """
    yield "From", f"<{in_ascii(envelope.reverse_path)}>"
    for recipient in envelope.recipients:
        yield "Rcpt", f"<{in_ascii(recipient)}>"
    if (client := envelope.client) is not None:
        known = {"IP": client.address, "Hostname": client.name, "Helo": client.helo}
        for name, value in {**known, "Queue-Id": client.ident}.items():
            if value:
                yield name, printable(value)


def in_ascii(mailbox: str) -> str:
    """Other characters are a broken header to rspamd, and count as spam.  What it asks the DNS for
    is the domain; in a local part no single character matters."""
    local, at, domain = mailbox.rpartition("@")
    with contextlib.suppress(UnicodeError):
        domain = domain.encode("idna").decode()
    return printable(local + at + domain)


def printable(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)
