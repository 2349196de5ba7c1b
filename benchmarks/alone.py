"""The SMTP machine alone: no socket, no delivery, the bytes of large messages.

As a process (``python -m benchmarks.alone HOW MESSAGES``) it prints the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

from benchmarks.feeding import PIECE, message
from benchmarks.processes import module
from benchmarks.table import Case, Section, Target
from salmon_revsmtp.smtp.receiver import Receiver, Transaction
from salmon_revsmtp.smtp.replies import Reply

__all__ = ["section", "targets"]

OCTETS = 10_000_000
TITLE = "The SMTP machine alone, 10 MB messages"

# Copies: each octet once, and as often as the machine does as it is.
_COPIES = {"one memory copy": 1, "three memory copies": 3}


def section(quick: bool) -> Section:
    """By BDAT and by DATA, beside the copying of the same bytes."""
    messages = 3 if quick else 50

    def case(name: str, how: str) -> Case:
        def measure() -> float:
            with module("alone", how, messages) as child:
                return messages * OCTETS / float(child.says(300)["seconds"]) / 1e6

        return Case(name, measure)

    copies = [case(name, f"copy{times}") for name, times in _COPIES.items()]
    cases = [case("by BDAT", "bdat"), case("by DATA", "data"), *copies]
    return Section(TITLE, "MB/s", cases, limit="one memory copy")


def targets() -> list[Target]:
    """What the issue asks for."""
    return [
        Target(
            f"the machine alone, 10 MB messages by {how}, MB/s",
            lambda sections, name=f"by {how}": _median(sections, name),  # type: ignore[misc]
            lambda sections, bound=bound: bound,  # type: ignore[misc]
        )
        for how, bound in (("BDAT", 500.0), ("DATA", 200.0))
    ]


def _median(sections: dict[str, Section], name: str) -> float | None:
    return sections[TITLE].median(name) if TITLE in sections else None


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]


def _receive(stream: list[bytes], messages: int) -> float:
    receiver = Receiver("mail.example.org")
    receiver.receive_bytes(b"EHLO x\r\n")
    taken = 0
    started = time.perf_counter()
    for _ in range(messages):
        for piece in stream:
            for event in receiver.receive_bytes(piece):
                assert isinstance(event, Transaction)
                receiver.answer(event, Reply(250, "ok"))
                receiver.data_to_send()
                taken += 1
    seconds = time.perf_counter() - started
    assert taken == messages
    return seconds


def _copy(stream: list[bytes], messages: int, times: int) -> float:
    started = time.perf_counter()
    for _ in range(messages):
        copied = b"".join(stream)
        for _ in range(times - 1):
            copied = bytes(memoryview(copied))
    return time.perf_counter() - started


def main(how: str, messages: int) -> float:
    """Seconds for so many messages."""
    content = b"".join(message(0, OCTETS))
    envelope = b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\n"
    if how == "bdat":
        return _receive(list(_pieces(envelope + b"BDAT %d LAST\r\n" % OCTETS + content)), messages)
    if how == "data":
        return _receive(list(_pieces(envelope + b"DATA\r\n" + content + b".\r\n")), messages)
    return _copy(list(_pieces(content)), messages, int(how.removeprefix("copy")))


if __name__ == "__main__":
    print(json.dumps({"seconds": main(sys.argv[1], int(sys.argv[2]))}))
