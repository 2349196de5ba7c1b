"""What must hold for any message that is given to Salmon's parser, or is kept from it.

An input is ``words LF message``, as ``properties`` has it.  In the message GS (octet 1D) stands
before and after what is repeated, as often as the numbers among the words say, one after another;
in it FS (1C) stands for the number of the repetition.  So 30 octets can be a message of 100 KB.
"""

from __future__ import annotations

import contextlib
import email
import itertools
import time
import warnings
from collections.abc import Iterator
from email.header import decode_header
from email.message import Message
from email.utils import getaddresses

from salmon.mail import MailRequest

from salmon_revsmtp.delivery import bounds

__all__ = ["parser"]

REPEATED, NUMBER = b"\x1d", b"\x1c"

MIB = 1024 * 1024
LONGEST = MIB // 4

# Seconds of this thread's processor time: for a message, and for each MiB of it.  Below the limits
# it takes some seconds at most; beyond them it would soon be minutes.
LOOK, LOOK_MIB = 0.5, 4.0
USE, USE_MIB = 12.0, 12.0


def parser(data: bytes) -> None:
    """A message is parsed in its time, or kept; and we see it as Python's parser does."""
    message = _message(data)
    with _within(LOOK + LOOK_MIB * len(message) / MIB, "to look at it"):
        reason = bounds.excess(message)
    if reason is not None:
        assert reason.isascii() and reason.isprintable(), "of the message nothing is said"
        return
    with _within(USE + USE_MIB * len(message) / MIB, "to use it"):
        parsed = email.message_from_bytes(message)
        _use(message)
    structure = bounds.examine(message)
    parts, depth = _structure(parsed)
    assert structure.parts == parts, "the parser sees other parts"
    # One that is open and has no part yet counts, too.
    assert depth <= structure.depth <= depth + 1, "the parser sees another depth"


def _message(data: bytes) -> bytes:
    head, _, text = data.partition(b"\n")
    words = head.split()[:20]
    counts = itertools.cycle(
        [int(word) for word in words if word.isdigit() and len(word) < 7] or [7]
    )
    message = b""
    for index, piece in enumerate(text.split(REPEATED)):
        message += _repeated(piece, next(counts) if index % 2 else 1, LONGEST - len(message))
    return message


def _repeated(piece: bytes, count: int, most: int) -> bytes:
    """So often, but no more octets than that."""
    if NUMBER not in piece:
        count = min(count, most // (len(piece) or 1) + 1)
        return (piece * count)[:most]
    made, size = [], 0
    for number in range(count):
        made.append(piece.replace(NUMBER, b"%d" % number))
        size += len(made[-1])
        if size >= most:
            break
    return b"".join(made)[:most]


@contextlib.contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    began = time.thread_time()
    yield
    took = time.thread_time() - began
    assert took < seconds, f"it took {took:.1f} s {what}, of {seconds:.1f}"


def _use(message: bytes) -> None:
    """What handlers do with one.  It may be no mail at all, which raises, and soon."""
    try:
        request = MailRequest(("192.0.2.1", 25), "", "b@example.org", message)
    except RecursionError:
        raise
    except Exception:
        return
    for use in (_read, MailRequest.is_bounce, str, _addresses, _words):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(request)


def _read(request: MailRequest) -> None:
    for part in (request.base, *request.walk()):
        for read in (part.items, lambda part=part: part.body):
            with contextlib.suppress(Exception):
                read()


def _values(request: MailRequest) -> list[str]:
    return [str(value) for part in request.base.mime_part.walk() for _, value in part.items()]


def _addresses(request: MailRequest) -> None:
    for value in _values(request):
        with contextlib.suppress(Exception):
            getaddresses([value])


def _words(request: MailRequest) -> None:
    for value in _values(request):
        with contextlib.suppress(Exception):
            decode_header(value)


def _structure(message: Message) -> tuple[int, int]:
    """How many parts, and how deep."""
    if not message.is_multipart():  # whose payload may be in a charset that is none
        return 1, 0
    inner = [_structure(part) for part in message.get_payload() if isinstance(part, Message)]
    return 1 + sum(parts for parts, _ in inner), 1 + max((depth for _, depth in inner), default=0)
