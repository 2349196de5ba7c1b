"""Large messages, which go somewhere else while they come, and come from there while they go."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salmon_revsmtp.smtp import receiver as module
from salmon_revsmtp.smtp.content import Octets, Traits, with_lf
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import Receiver, Refused, Transaction
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Broken, Outgoing, Sender, Sent

BEGIN = b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\n"
OK = Reply(250, "ok")
# Few letters, so that line ends and dots meet in every way.
CONTENT = st.lists(st.sampled_from([b"\r\n", b".", b"\r", b"\n", b"x", b"\0", b"y" * 7])).map(
    b"".join
)


class Memory:
    """A sink that keeps what it gets."""

    def __init__(self, data: bytes = b"") -> None:
        self.data, self.discarded = data, False

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    def beginning(self) -> bytes:
        return self.data[:8]

    def write(self, data: bytes) -> None:
        self.data += data

    def discard(self) -> None:
        self.discarded = True


class Told:
    """A receiver with a small sink, and what it did."""

    def __init__(self, limits: Limits | None = None, sinks: bool = True) -> None:
        self.made: list[Memory] = []
        self.receiver = Receiver("h", limits, sinks=self._make if sinks else None)
        self.events: list[object] = []
        self.heard = b""

    def _make(self, envelope: Envelope) -> Memory:
        assert envelope.recipients == ("b@example.org",)
        self.made.append(Memory())
        return self.made[-1]

    def tell(self, *pieces: bytes) -> None:
        for piece in pieces:
            events = self.receiver.receive_bytes(piece)
            for event in events:
                if isinstance(event, Transaction):
                    self.receiver.answer(event, OK)
            self.events += events
            self.heard += self.receiver.data_to_send()

    def messages(self) -> list[bytes]:
        found = []
        for event in self.events:
            if isinstance(event, Transaction):
                assert event.sink is None or (event.data == b"" and isinstance(event.sink, Memory))
                found.append(event.sink.data if isinstance(event.sink, Memory) else event.data)
        return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SINK_AT", 8)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


SIZES = st.lists(st.integers(1, 30), max_size=20)


@given(CONTENT, SIZES)
def test_a_message_is_the_same_in_a_sink_by_data(content: bytes, sizes: list[int]) -> None:
    wire = BEGIN + b"DATA\r\n" + content + b"\r\n.\r\nQUIT\r\n"
    kept, sunk = Told(sinks=False), Told()
    kept.tell(wire)
    sunk.tell(*cut(wire, sizes))
    assert sunk.messages() == kept.messages()
    assert sunk.heard == kept.heard
    assert sunk.receiver.memory.held == kept.receiver.memory.held == 0


@given(CONTENT, SIZES, st.integers(0, 20))
def test_a_message_is_the_same_in_a_sink_by_bdat(
    content: bytes, sizes: list[int], first: int
) -> None:
    first = min(first, len(content))
    wire = BEGIN + b"BDAT %d\r\n%bBDAT %d LAST\r\n%b" % (
        *(first, content[:first]),
        *(len(content) - first, content[first:]),
    )
    sunk = Told()
    sunk.tell(*cut(wire, sizes))
    assert sunk.messages() == [content]
    assert sunk.receiver.memory.held == 0


@pytest.mark.parametrize("how", ["too big", "a long line", "the client is gone", "RSET"])
def test_what_is_no_message_is_forgotten(how: str) -> None:
    told = Told(Limits(message=100, text_line=50))
    if how == "too big":
        told.tell(BEGIN + b"DATA\r\n", *[b"x" * 20 + b"\r\n"] * 10, b".\r\n")
    elif how == "a long line":
        told.tell(BEGIN + b"DATA\r\n", *[b"x" * 20] * 3, b"\r\n.\r\n")
    elif how == "RSET":
        told.tell(BEGIN + b"BDAT 40\r\n", b"x" * 40, b"RSET\r\n")
    else:
        told.tell(BEGIN + b"DATA\r\n", *[b"x" * 20] * 2)
        told.receiver.lost()
    assert told.messages() == []
    assert told.made and all(one.discarded for one in told.made)
    assert told.receiver.memory.held == 0
    if how in ("too big", "a long line"):
        assert any(isinstance(event, Refused) for event in told.events)


@given(CONTENT)
def test_lf_for_each_crlf_and_nothing_else(content: bytes) -> None:
    assert with_lf(content) == content.replace(b"\r\n", b"\n")


def test_few_messages_in_sinks_are_read_ahead() -> None:
    """Each of them is an open file, and as much of the disk as it is large."""
    receiver = Receiver("h", sinks=lambda envelope: Memory())
    message = b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 50 LAST\r\n" + b"x" * 50
    events = receiver.receive_bytes(b"EHLO x\r\n" + message * 10)
    come = [event for event in events if isinstance(event, Transaction)]
    assert len(come) == Limits().unanswered_sunk < 10
    assert receiver.paused
    receiver.answer(come[0], OK)
    assert [type(event) for event in receiver.advance()] == [Transaction]
    assert receiver.paused


def test_a_sink_gives_memory_back() -> None:
    told = Told()
    told.tell(BEGIN + b"DATA\r\n", *[b"x" * 20 + b"\r\n"] * 100)
    assert told.receiver.memory.held < 2000
    told.tell(b".\r\n")
    assert told.messages() == [(b"x" * 20 + b"\r\n") * 100]


def test_what_a_sink_keeps_in_memory_is_counted_until_the_answer() -> None:
    receiver = Receiver("h", sinks=lambda envelope: Memory())
    receiver.receive_bytes(BEGIN + b"BDAT 1 LAST\r\nx")
    little = receiver.memory.held
    receiver.receive_bytes(b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 99\r\n" + b"x" * 99)
    assert receiver.memory.held == 2 * little - 1 + len(Memory(b"x" * 99).beginning())
    [large] = receiver.receive_bytes(b"BDAT 0 LAST\r\n")
    assert isinstance(large, Transaction)
    assert receiver.memory.held == 2 * little - 1 + 8
    receiver.answer(large, OK)
    assert receiver.memory.held == little


@pytest.mark.parametrize("length", [49, 50, 51])
@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_a_line_is_too_long_in_a_sink_as_in_memory(length: int, end: bytes) -> None:
    line = b"x" * length + end
    wire = BEGIN + b"BDAT %d LAST\r\n%b" % (len(line), line)
    kept, sunk = Told(Limits(text_line=50), sinks=False), Told(Limits(text_line=50))
    kept.tell(wire)
    sunk.tell(*(wire[at : at + 1] for at in range(len(wire))))
    assert sunk.made and sunk.heard == kept.heard


# -- from where it is ------------------------------------------------------------------------------


@given(CONTENT, SIZES)
def test_what_is_known_of_a_message_does_not_depend_on_its_pieces(
    content: bytes, sizes: list[int]
) -> None:
    traits = Traits()
    for piece in cut(content, sizes):
        traits.add(piece)
    lines = content.replace(b"\r\n", b"")
    clean = not any(octet in lines for octet in b"\r\n\0") and content.endswith(b"\r\n")
    assert (traits.size, traits.ascii, traits.streams) == (len(content), True, clean)


class Pieces:
    """A message in pieces."""

    def __init__(self, *pieces: bytes, fails: bool = False) -> None:
        self._pieces, self._fails = pieces, fails
        self.size = sum(map(len, pieces))
        self.ascii = all(piece.isascii() for piece in pieces)

    def pieces(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._fails:
            raise OSError("the disk is gone")

    def beginning(self, octets: int) -> bytes:
        return b"".join(self._pieces)[:octets]


def sent(sender: Sender) -> bytes:
    """All that it has to say now."""
    said = b"".join(sender.data_to_send())
    while sender.streaming:
        said += b"".join(sender.data_to_send())
    return said + b"".join(sender.data_to_send())


def exchange(sender: Sender, *replies: bytes) -> tuple[bytes, list[object]]:
    said = b""
    events: list[object] = []
    for reply in replies:
        events += sender.receive_bytes(reply)
        said += sent(sender)
    return said, events


LINES = st.lists(st.sampled_from([b"\r\n", b".\r\n", b"..\r\n", b"x\r\n", b"x.\r\n", b".x.\r\n"]))


@given(LINES, SIZES, st.booleans())
def test_a_message_in_pieces_goes_out_as_one_in_memory(
    lines: list[bytes], sizes: list[int], chunking: bool
) -> None:
    content = b"".join(lines) or b"\r\n"
    envelope = Envelope("a@example.net", ("b@example.org",))
    greeting = b"250-x\r\n250-8BITMIME\r\n250 CHUNKING\r\n" if chunking else b"250 x\r\n"
    replies = [b"220 x\r\n", greeting, b"250 ok\r\n", b"250 ok\r\n"]
    replies += [b"250 taken\r\n"] if chunking else [b"354 go on\r\n", b"250 taken\r\n"]
    found = []
    for data in (content, Pieces(*cut(content, sizes))):
        sender = Sender("h")
        sender.send(Outgoing(1, envelope, data))
        said, events = exchange(sender, *replies)
        assert [type(one) for one in events][-1] is Sent
        found.append(said)
    assert found[0] == found[1]


def test_what_follows_a_message_in_pieces_comes_after_it() -> None:
    envelope = Envelope("a@example.net", ("b@example.org",))
    sender = Sender("h")
    sender.send(Outgoing(1, envelope, Pieces(b"one\r\n", b"two\r\n")))
    sender.send(Outgoing(2, envelope, b"three\r\n"))
    sender.quit()
    said, _ = exchange(
        sender, b"220 x\r\n", b"250-x\r\n250-PIPELINING\r\n250 CHUNKING\r\n", *[b"250 ok\r\n"] * 7
    )
    assert said.endswith(b"BDAT 7 LAST\r\nthree\r\nQUIT\r\n")
    assert b"BDAT 10 LAST\r\none\r\ntwo\r\nRSET\r\nMAIL" in said


def test_a_message_that_cannot_be_read_to_its_end_breaks_the_session() -> None:
    """Its octets were announced: nothing else may stand in their place."""
    sender = Sender("h")
    envelope = Envelope("a@example.net", ("b@example.org",))
    sender.send(Outgoing(1, envelope, Pieces(b"one\r\n", fails=True)))
    greeting = b"250-x\r\n250-PIPELINING\r\n250 CHUNKING\r\n"
    said, _ = exchange(sender, b"220 x\r\n", greeting)
    assert said.endswith(b"one\r\n")
    [event] = sender.advance()
    assert isinstance(event, Broken) and "the disk is gone" in event.reason
    assert sender.closed


def test_octets_in_memory_are_content() -> None:
    octets = Octets(b"\xff\r\n")
    assert (octets.size, octets.ascii, octets.beginning(1)) == (3, False, b"\xff")
    assert list(octets.pieces()) == [b"\xff\r\n"]
