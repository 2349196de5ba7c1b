"""The limits that Salmon and the disk set, without any SMTP: a process in a project's folder.

``python -m benchmarks.bare router|queue MESSAGES OCTETS`` prints the seconds of ``MailRequest`` and
``Router.deliver`` in a loop, or of Salmon's ``Queue.push`` with fsync; and those of processor time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.feeding import RECIPIENT, SENDER, message

__all__: list[str] = []


def _router() -> Callable[[bytes], None]:
    from salmon.mail import MailRequest
    from salmon.routing import Router

    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    __import__("config.boot")

    def deliver(data: bytes) -> None:
        Router.deliver(MailRequest(("127.0.0.1", 1), SENDER, RECIPIENT, data))

    return deliver


def _queue() -> Callable[[bytes], None]:
    from salmon import queue

    target = queue.Queue("run/bare")
    folder = Path("run/bare/new")

    def push(data: bytes) -> None:
        # As Salmon's Queue has it, which syncs the file, and what makes its name safe.
        target.push(data)
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    return push


def main(arguments: Sequence[str]) -> None:
    """The process."""
    how, messages, octets = arguments[0], int(arguments[1]), int(arguments[2])
    deliver = {"router": _router, "queue": _queue}[how]()
    made = [b"".join(message(number, octets)).replace(b"\r\n", b"\n") for number in range(messages)]
    started, spent = time.perf_counter(), time.process_time()
    for data in made:
        deliver(data)
    spent, seconds = time.process_time() - spent, time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "processor": spent}))


if __name__ == "__main__":
    main(sys.argv[1:])
