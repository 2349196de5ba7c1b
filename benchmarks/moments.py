"""One message after another to a port, and when each was answered: a process.

``python -m benchmarks.moments PORT MESSAGES OCTETS DOMAINS`` sends each to one of so many domains
(``0.example.org``, ``1.example.org``, ...), some milliseconds apart, and prints their Message-Ids
with the moments of their 250 (the system's monotonic clock).  With ``each`` every domain gets one,
all at once and without waiting for an answer; ``began`` says when that was.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
import time

from benchmarks.feeding import SENDER, Peer, message
from benchmarks.project import DOMAIN

__all__: list[str] = []

# Seconds between two messages: 20 ms, more or less.
PAUSE = (0.01, 0.03)


def main(port: int, messages: int, octets: int, domains: int) -> dict[str, float]:
    """Message-Id -> when it was answered."""
    chance = random.Random(1)
    peer = _greeted(port)
    answered = {}
    for number in range(messages):
        name, pieces = _transaction(number, octets, chance.randrange(domains))
        peer.say(*pieces)
        for _ in range(3):
            peer.reply(250)
        answered[name] = time.monotonic()
        time.sleep(chance.uniform(*PAUSE))
    peer.socket.close()
    return answered


def to_each(port: int, messages: int, octets: int) -> dict[str, float]:
    """The same of messages that come at once, each to another domain."""
    peer = _greeted(port)
    made = [_transaction(number, octets, number) for number in range(messages)]
    answered = {"began": time.monotonic()}

    def write() -> None:
        for _, pieces in made:
            peer.say(*pieces)

    writing = threading.Thread(target=write)
    writing.start()
    for name, _ in made:
        for _ in range(3):
            peer.reply(250)
        answered[name] = time.monotonic()
    writing.join()
    peer.socket.close()
    return answered


def _greeted(port: int) -> Peer:
    peer = Peer(socket.create_connection(("127.0.0.1", port), 20))
    peer.greet(b"EHLO")
    return peer


def _transaction(number: int, octets: int, domain: int) -> tuple[str, tuple[bytes, ...]]:
    """A message's Message-Id, and what is said to send it."""
    own, rest = message(number, octets)
    [name] = [line[12:].strip() for line in own.split(b"\r\n") if line.startswith(b"Message-Id")]
    said = (
        f"MAIL FROM:<{SENDER}>\r\nRCPT TO:<bench@{domain}.{DOMAIN}>\r\n"
        f"BDAT {len(own) + len(rest)} LAST\r\n"
    )
    return name.decode(), (said.encode(), own, rest)


if __name__ == "__main__":
    numbers = list(map(int, sys.argv[1:5]))
    print(json.dumps(to_each(*numbers[:3]) if sys.argv[5:] else main(*numbers)))
