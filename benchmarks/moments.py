"""One message after another to a port, and when each was answered: a process.

``python -m benchmarks.moments PORT MESSAGES OCTETS DOMAINS`` sends each to one of so many domains
(``0.example.org``, ``1.example.org``, ...), some milliseconds apart, and prints their Message-Ids
with the moments of their 250 (the system's monotonic clock).
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time

from benchmarks.feeding import SENDER, Peer, message
from benchmarks.project import DOMAIN

__all__: list[str] = []

# Seconds between two messages: 20 ms, more or less.
PAUSE = (0.01, 0.03)


def main(port: int, messages: int, octets: int, domains: int) -> dict[str, float]:
    """Message-Id -> when it was answered."""
    chance = random.Random(1)
    peer = Peer(socket.create_connection(("127.0.0.1", port), 20))
    peer.greet(b"EHLO")
    answered = {}
    for number in range(messages):
        own, rest = message(number, octets)
        [name] = [
            line[12:].strip() for line in own.split(b"\r\n") if line.startswith(b"Message-Id")
        ]
        recipient = f"bench@{chance.randrange(domains)}.{DOMAIN}"
        peer.say(
            f"MAIL FROM:<{SENDER}>\r\nRCPT TO:<{recipient}>\r\n"
            f"BDAT {len(own) + len(rest)} LAST\r\n".encode(),
            *(own, rest),
        )
        for _ in range(3):
            peer.reply(250)
        answered[name.decode()] = time.monotonic()
        time.sleep(chance.uniform(*PAUSE))
    peer.socket.close()
    return answered


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
