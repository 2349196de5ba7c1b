"""The other end of an intake: it is never the bottleneck, and it holds the clock.

As a process (``python -m benchmarks.feeding ROLE``):

``provider``  listens for a customer, lets anybody log in, and after ATRN sends messages down the
              connection: its own, or those of smtp-source, spliced in
``client``    sends the same messages to a port: to Salmon's receivers, and to the sink
``customer``  calls a provider, and answers everything at once
``sink``      the ideal peer: takes everything, does nothing, and answers

What is sent is made beforehand, as much of it as the peer's extensions allow at a time, with a
bound on what is unanswered.  The clock runs from the first MAIL to the last reply: one JSON object
``{"messages": ..., "octets": ..., "seconds": ...}`` is printed then.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import json
import select
import shlex
import socket
import ssl
import subprocess
import time
from collections.abc import Sequence

from benchmarks.processes import end_with_parent
from benchmarks.project import ACCOUNT, CERTIFICATE, DOMAIN, KEY, PASSWORD

__all__ = ["SENDER", "message"]

SENDER, RECIPIENT = "bench@example.net", f"bench@{DOMAIN}"

# What is unanswered at a time.  Our receiver reads at most 256 messages or 1 MiB ahead, so that
# this much keeps its socket full; any more would only measure the kernel's buffers.
WINDOW_MESSAGES = 1024
WINDOW_OCTETS = 4 * 1024 * 1024
PIECE = 256 * 1024
# Messages up to this size are written together.
SMALL = 64 * 1024

TIMEOUT = 600.0

_LINE = b"x" * 76 + b"\r\n"


def message(number: int, octets: int) -> tuple[bytes, bytes]:
    """Message ``number``, of so many octets with CRLF line ends: what is its own, and what all of
    this size have in common.  No two runs have a message in common, either."""
    head = (
        f"From: {SENDER}\r\nTo: {RECIPIENT}\r\nSubject: benchmark\r\n"
        f"Message-Id: <{number:09d}.{_RUN:020d}@example.net>\r\n\r\n"
    ).encode()
    return head, _filler(max(2, octets - len(head)))


_RUN = time.time_ns()
_fillers: dict[int, bytes] = {}


def _filler(octets: int) -> bytes:
    if octets not in _fillers:
        lines, left = divmod(octets - 2, len(_LINE))
        _fillers[octets] = _LINE * lines + b"x" * left + b"\r\n"
    return _fillers[octets]


class Refused(Exception):
    """The peer did not take what we sent."""


class Peer:
    """A blocking connection, and its replies."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(TIMEOUT)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._buffer = b""
        self.extensions: set[str] = set()

    def start_tls(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE, KEY)
        self.socket = context.wrap_socket(self.socket, server_side=True)

    def _read(self) -> None:
        data = self.socket.recv(PIECE)
        if not data:
            raise Refused(f"the peer closed the connection after {self._buffer[-200:]!r}")
        self._buffer += data

    def line(self) -> bytes:
        """The next line, without its CRLF."""
        while b"\n" not in self._buffer:
            self._read()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def unread(self) -> bytes:
        """What has come and was not asked for."""
        data, self._buffer = self._buffer, b""
        return data

    def reply(self, code: int) -> list[str]:
        """The lines of a whole reply, which is to have this code."""
        lines = [self.line()]
        while lines[-1][3:4] == b"-":
            lines.append(self.line())
        if not lines[-1].startswith(b"%d" % code):
            raise Refused(f"{code} was expected, and came: {lines[-1].decode()!r}")
        return [line[4:].decode("ascii", "replace") for line in lines]

    def positive_replies(self) -> int:
        """Wait for more; how many whole replies have come, all of which are to be 2yz."""
        self._read()
        whole, _, rest = self._buffer.rpartition(b"\n")
        self._buffer = rest
        count = 0
        for line in whole.split(b"\n") if whole else ():
            if line[:1] != b"2":
                raise Refused(f"2yz was expected, and came: {line.decode('ascii', 'replace')!r}")
            count += line[3:4] != b"-"
        return count

    def say(self, *pieces: bytes) -> None:
        """Write; small pieces go together."""
        if sum(map(len, pieces)) <= SMALL:
            self.socket.sendall(b"".join(pieces))
        else:
            for piece in pieces:
                self.socket.sendall(piece)

    def greet(self, verb: bytes, without: Sequence[str] = ()) -> None:
        """Wait for the greeting and say EHLO, or LHLO; extensions ``without`` are not used."""
        self.reply(220)
        self.say(verb + b" feeder.example.net\r\n")
        self.extensions = {one.split(" ")[0].upper() for one in self.reply(250)} - set(without)


# -- sending -------------------------------------------------------------------------------------


def send_all(peer: Peer, messages: int, octets: int) -> float:
    """Send so many messages in the fastest way that the peer's extensions allow, and QUIT; returns
    the seconds from the first MAIL to the last reply."""
    made = [message(number, octets) for number in range(messages)]
    if {"PIPELINING", "CHUNKING"} <= peer.extensions:
        seconds = _send_chunks(peer, made)
    elif "PIPELINING" in peer.extensions:
        seconds = _send_data(peer, made)
    else:
        seconds = _send_step_by_step(peer, made)
    peer.say(b"QUIT\r\n")
    peer.reply(221)
    return seconds


_MAIL = f"MAIL FROM:<{SENDER}>\r\n".encode()
_RCPT = f"RCPT TO:<{RECIPIENT}>\r\n".encode()


def _send_chunks(peer: Peer, made: Sequence[tuple[bytes, bytes]]) -> float:
    """RFC 2920 and 3030: whole transactions, without waiting for anything."""
    octets = sum(map(len, made[0]))
    head = _MAIL + _RCPT + b"BDAT %d LAST\r\n" % octets
    window = max(1, min(WINDOW_MESSAGES, WINDOW_OCTETS // octets))
    small = octets <= SMALL
    whole: list[tuple[bytes, ...]] = [
        (head + own + rest,) if small else (head + own, rest) for own, rest in made
    ]
    written = replies = 0
    started = time.perf_counter()
    while replies < 3 * len(whole):
        until = min(len(whole), replies // 3 + window)
        if small:
            peer.socket.sendall(b"".join(one for (one,) in whole[written:until]))
        else:
            for pieces in whole[written:until]:
                peer.say(*pieces)
        written = until
        replies += peer.positive_replies()
    return time.perf_counter() - started


def _send_data(peer: Peer, made: Sequence[tuple[bytes, bytes]]) -> float:
    """RFC 2920 without CHUNKING: the client waits for 354, and the next transaction's commands go
    out with the message."""
    commands = _MAIL + _RCPT + b"DATA\r\n"
    started = time.perf_counter()
    peer.say(commands)
    for number, (own, rest) in enumerate(made):
        for code in (250, 250, 354):
            peer.reply(code)
        last = number == len(made) - 1
        peer.say(own, rest, b".\r\n" + (b"" if last else commands))
        peer.reply(250)
    return time.perf_counter() - started


def _send_step_by_step(peer: Peer, made: Sequence[tuple[bytes, bytes]]) -> float:
    """RFC 5321: one command at a time."""
    started = time.perf_counter()
    for own, rest in made:
        for command, code in ((_MAIL, 250), (_RCPT, 250), (b"DATA\r\n", 354)):
            peer.say(command)
            peer.reply(code)
        peer.say(own, rest, b".\r\n")
        peer.reply(250)
    return time.perf_counter() - started


# -- smtp-source ---------------------------------------------------------------------------------


def splice(connection: socket.socket, command: str, messages: int, octets: int) -> float:
    """Have smtp-source send to a connection that is there already; returns its seconds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        arguments = f"-d -m {messages} -l {octets} -f {SENDER} -t {RECIPIENT} 127.0.0.1:{port}"
        source = subprocess.Popen(
            shlex.split(f"{command} {arguments}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            listener.settimeout(10)
            try:
                inside, _ = listener.accept()
            except TimeoutError:
                source.kill()
                raise Refused(f"smtp-source: {source.communicate()[0].decode()!r}") from None
            with inside:
                started = time.perf_counter()
                _copy_both_ways(inside, connection)
                seconds = time.perf_counter() - started
            said = source.communicate(timeout=TIMEOUT)[0]
            if source.returncode != 0:
                raise Refused(f"smtp-source: {said.decode()!r}")
            return seconds
        finally:
            source.kill()
            source.wait()


def _copy_both_ways(one: socket.socket, other: socket.socket) -> None:
    """Until either has no more to say; smtp-source does not wait for the answer to its QUIT."""
    for end in (one, other):
        end.setblocking(True)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    poll = select.poll()
    to = {one.fileno(): (one, other), other.fileno(): (other, one)}
    for descriptor in to:
        poll.register(descriptor, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            source, target = to[descriptor]
            try:
                data = source.recv(PIECE)
                target.sendall(data)
            except ConnectionError:
                return
            if not data:
                return


# -- roles ---------------------------------------------------------------------------------------


def _tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _feed(peer: Peer, options: argparse.Namespace, verb: bytes) -> None:
    if options.source:
        seconds = splice(peer.socket, options.source, options.messages, options.octets)
    else:
        peer.greet(verb, options.without)
        seconds = send_all(peer, options.messages, options.octets)
    _tell(messages=options.messages, octets=options.octets, seconds=seconds)


def provider(options: argparse.Namespace) -> None:
    """RFC 2645 as far as a customer needs it; whoever comes later hears that there is no more."""
    fed = False
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        _tell(port=listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            peer = Peer(connection)
            try:
                if _reverses(peer, options.tls, has_mail=not fed):
                    fed = True
                    _feed(peer, options, b"EHLO")
            except (Refused, OSError) as error:
                if not fed or peer.extensions or options.source:
                    _tell(failure=f"{type(error).__name__}: {error}")
            finally:
                peer.socket.close()


def _reverses(peer: Peer, tls: bool, has_mail: bool) -> bool:
    """The dialogue before the reversal; whether it came to that."""
    peer.say(b"220 provider.example.net\r\n")
    while True:
        verb, _, _ = peer.line().upper().partition(b" ")
        if verb == b"EHLO":
            offers = b"250-STARTTLS\r\n" if tls and not _encrypted(peer) else b""
            peer.say(b"250-provider.example.net\r\n%s250-AUTH CRAM-MD5\r\n250 ATRN\r\n" % offers)
        elif verb == b"STARTTLS":
            peer.say(b"220 go ahead\r\n")
            peer.start_tls()
        elif verb == b"AUTH":
            peer.say(b"334 PDFAeD4=\r\n")
            peer.line()
            peer.say(b"235 welcome\r\n")
        elif verb == b"ATRN" and has_mail:
            peer.say(b"250 reversing\r\n")
            return True
        elif verb == b"ATRN":
            peer.say(b"453 you have no mail\r\n")
        elif verb == b"QUIT":
            peer.say(b"221 bye\r\n")
            return False
        else:
            peer.say(b"250 ok\r\n")


def _encrypted(peer: Peer) -> bool:
    return isinstance(peer.socket, ssl.SSLSocket)


def client(options: argparse.Namespace) -> None:
    """Send to a port."""
    connection = socket.create_connection(("127.0.0.1", options.port), 20)
    if options.tls:
        context = ssl.create_default_context(cafile=str(CERTIFICATE))
        connection = context.wrap_socket(connection, server_hostname="localhost")
    peer = Peer(connection)
    try:
        _feed(peer, options, b"LHLO" if options.lmtp else b"EHLO")
    except (Refused, OSError) as error:
        _tell(failure=f"{type(error).__name__}: {error}")
    finally:
        peer.socket.close()


def sink(options: argparse.Namespace) -> None:
    """Take everything, and do nothing with it: what the feeding side can do at most."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        _tell(port=listener.getsockname()[1])
        connection, _ = listener.accept()
    peer = Peer(connection)
    if options.tls:
        peer.start_tls()
    Sink(peer).take()
    peer.socket.close()


def customer(options: argparse.Namespace) -> None:
    """Call a provider, and answer what it has at once; after so many messages, 421.  The clock runs
    from the reversal to the last answer."""
    peer = Peer(socket.create_connection(("127.0.0.1", options.port), 20))
    try:
        peer.greet(b"EHLO")
        peer.say(b"AUTH CRAM-MD5\r\n")
        [challenge] = peer.reply(334)
        digest = hmac.new(options.password.encode(), base64.b64decode(challenge), "md5")
        answer = f"{ACCOUNT} {digest.hexdigest()}"
        peer.say(base64.b64encode(answer.encode()) + b"\r\n")
        peer.reply(235)
        peer.say(b"ATRN\r\n")
        peer.reply(250)
        taken = Sink(peer, options.messages)
        started = time.perf_counter()
        taken.take()
        if taken.messages < options.messages:
            raise Refused(f"the provider had {taken.messages} messages")
        _tell(messages=taken.messages, octets=options.octets, seconds=taken.last - started)
    except (Refused, OSError) as error:
        _tell(failure=f"{type(error).__name__}: {error}")
    finally:
        peer.socket.close()


_ANSWERS = {
    b"EHLO": b"250-sink\r\n250-8BITMIME\r\n250-PIPELINING\r\n250 CHUNKING\r\n",
    b"HELO": b"250 sink\r\n",
    b"DATA": b"354 go on\r\n",
    b"QUIT": b"221 bye\r\n",
}
_OK = b"250 2.0.0 ok\r\n"
_ENOUGH = b"421 4.0.0 enough\r\n"


class Sink:
    """The server role of SMTP, as fast as it can be had here.

    ``messages``  how many have come.
    ``last``      when the last of them was answered.
    """

    def __init__(self, peer: Peer, most: int = 0) -> None:
        self._peer, self._most = peer, most
        self._buffer = bytearray(peer.unread())
        self._skip = 0  # octets of a BDAT's content that are still to come
        self._ends_message = False  # that BDAT does
        self._until = b""  # what ends the content of a DATA
        self.messages, self.last = 0, 0.0

    def take(self) -> None:
        """Until the peer closes, or has sent the most that is wanted."""
        self._peer.say(b"220 sink ESMTP\r\n")
        while data := self._peer.socket.recv(PIECE):
            out = self._take(data)
            if out:
                self._peer.say(b"".join(out))
                self.last = time.perf_counter()
            if self._most and self.messages >= self._most:
                self._peer.say(_ENOUGH)
                return

    def _take(self, data: bytes) -> list[bytes]:
        """The answers to what has come."""
        if self._skip > len(data):
            self._skip -= len(data)
            return []
        self._buffer += memoryview(data)[self._skip :]
        out = [self._message(self._ends_message)] if self._skip else []
        self._skip = start = 0
        while not self._skip:
            end = self._buffer.find(self._until or b"\r\n", start)
            if end < 0:
                break
            if self._until:
                start, self._until = end + len(self._until), b""
                out.append(self._message(True))
                continue
            line = bytes(self._buffer[start:end])
            start = end + 2
            if line.startswith(b"BDAT"):
                size, self._ends_message = int(line.split()[1]), line.endswith(b"LAST")
                here = min(size, len(self._buffer) - start)
                start, self._skip = start + here, size - here
                out += [] if self._skip else [self._message(self._ends_message)]
            else:
                self._until = b"\r\n.\r\n" if line == b"DATA" else b""
                out.append(_ANSWERS.get(line[:4], _OK))
        del self._buffer[:start]
        if self._until and len(self._buffer) > len(self._until):  # only what may begin its end
            del self._buffer[: -len(self._until)]
        return out

    def _message(self, whole: bool) -> bytes:
        self.messages += whole
        return _OK


def main(arguments: Sequence[str] | None = None) -> None:
    """The process."""
    parser = argparse.ArgumentParser(prog="benchmarks.feeding")
    parser.add_argument("role", choices=("provider", "client", "sink", "customer"))
    parser.add_argument("--messages", type=int, default=1)
    parser.add_argument("--octets", type=int, default=4096)
    parser.add_argument("--port", type=int)
    parser.add_argument("--password", default=PASSWORD)
    parser.add_argument("--lmtp", action="store_true")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], help="extensions that are not used")
    parser.add_argument("--source", default="", help="the command of smtp-source")
    options = parser.parse_args(arguments)
    end_with_parent()
    roles = {"provider": provider, "client": client, "sink": sink, "customer": customer}
    roles[options.role](options)


if __name__ == "__main__":
    main()
