"""Mail servers of the world, which send a message and hear what becomes of it: processes.

``python -m benchmarks.senders waits PORT MESSAGES OCTETS DOMAIN...`` sends one message after
another, so many to each of the domains in turn, and prints for each domain how many seconds the
answers took: to RCPT, and after the end of the data.

``python -m benchmarks.senders mixed PORT MESSAGES`` sends so many messages to a recipient, so many
to recipients that do not exist, and so many with the subject "spam", each from another sender; and
prints how often which code was the answer.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.feeding import SENDER, Peer, message
from benchmarks.processes import end_with_parent
from benchmarks.project import DOMAIN

__all__: list[str] = []

# Seconds between two messages: 20 ms, more or less.
PAUSE = (0.01, 0.03)


def waits(port: int, messages: int, octets: int, domains: Sequence[str]) -> dict[str, object]:
    """Domain -> ``{"rcpt": [seconds], "data": [seconds]}``."""
    chance = random.Random(1)
    peer = _connected(port)
    found: dict[str, dict[str, list[float]]] = {one: {"rcpt": [], "data": []} for one in domains}
    for number in range(messages):
        for domain in domains:
            content = b"".join(message(number, octets))
            _asked(peer, f"MAIL FROM:<{SENDER}>\r\n".encode(), 250)
            took = _asked(peer, f"RCPT TO:<bench@{domain}>\r\n".encode(), 250)
            found[domain]["rcpt"].append(took)
            took = _asked(peer, b"BDAT %d LAST\r\n" % len(content) + content, 250)
            found[domain]["data"].append(took)
            time.sleep(chance.uniform(*PAUSE))
    peer.socket.close()
    return dict(found)


def _connected(port: int) -> Peer:
    peer = Peer(socket.create_connection(("127.0.0.1", port), 20))
    peer.greet(b"EHLO")
    return peer


def _asked(peer: Peer, octets: bytes, code: int) -> float:
    """The seconds that the answer takes."""
    started = time.perf_counter()
    peer.say(octets)
    peer.reply(code)
    return time.perf_counter() - started


def mixed(port: int, messages: int) -> dict[str, int]:
    """Code -> how many messages ended with it."""
    heard: Counter[str] = Counter()
    for number in range(messages):
        for recipient, subject in (("bench", "hello"), ("no-one", "hello"), ("bench", "spam")):
            heard[_sent(port, f"{subject}-{recipient}-{number}", recipient, subject)] += 1
    return dict(heard)


def _sent(port: int, name: str, recipient: str, subject: str) -> str:
    """The code that ended a message from someone whose name no other message has."""
    sender = f"ann@{name}.example.net"
    content = (
        f"From: {sender}\r\nTo: {recipient}@{DOMAIN}\r\nSubject: {subject}\r\n"
        f"Message-Id: <{time.time_ns()}@example.net>\r\n\r\nhello\r\n"
    ).encode()
    peer = _connected(port)
    code = ""
    for command in (
        f"MAIL FROM:<{sender}>\r\n".encode(),
        f"RCPT TO:<{recipient}@{DOMAIN}>\r\n".encode(),
        b"BDAT %d LAST\r\n" % len(content) + content,
    ):
        peer.say(command)
        code = peer.line()[:3].decode()
        if code != "250":
            break
    peer.socket.close()
    return code


def main(role: str, port: str, messages: str, *more: str) -> dict[str, object]:
    """The process."""
    if role == "waits":
        return waits(int(port), int(messages), int(more[0]), more[1:])
    return dict(mixed(int(port), int(messages)))


if __name__ == "__main__":
    end_with_parent()
    print(json.dumps(main(*sys.argv[1:])))
