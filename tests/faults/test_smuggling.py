"""SMTP smuggling, both ways (CVE-2023-51764, -51765, -51766 and their kin).

As a server: whatever a client puts where an end of data might be, what follows it is never another
message.  As a client: whatever content we are given, no server however lax finds the end of our
message anywhere but at its end.
"""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st
from support.client import Client
from support.sample import amount, chance

from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.sender import Outgoing, Sender

# -- the server role -------------------------------------------------------------------------------

LINE_ENDS = (b"\r\n", b"\n", b"\r", b"\n\r", b"\r\r\n", b"\r\n\n", b"\x00\n", b"\r\x00\n", b"\x0b")
NULS = (
    b"\r\n\x00.\r\n",
    b"\r\n.\x00\r\n",
    b"\r\x00\n.\r\n",
    b"\r\n.\r\x00\n",
    b"\r\n\x00.\x00\r\n",
)
OTHERS = (
    b"\r\n. \r\n",
    b"\r\n.\t\r\n",
    b"\r\n .\r\n",
    b"\r\n..\r\n",
    b"\r\n.\\r\\n",
    b"\r\n\x85.\r\n",
    "\r\n\u2028.\r\n".encode(),
    "\u2028.\u2028".encode(),
    b"\r\n\xef\xbb\xbf.\r\n",
    b"\r\n.\x1a\r\n",
    b"\r\n=2E\r\n",
)
ENDS = tuple(
    dict.fromkeys(
        [
            one + b"." + other
            for one, other in itertools.product(LINE_ENDS, LINE_ENDS)
            if b"\r\n.\r\n" not in one + b"." + other
        ]
        + list(NULS + OTHERS)
    )
)

SMUGGLED = (
    b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
    b"From: evil@example.com\r\n\r\nevil\r\n"
)
BEFORE = b"From: a@example.com\r\n\r\nhello"


def test_the_matrix_holds_what_real_servers_fell_for() -> None:
    for end in (b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r\n.\r", b"\r.\r", b"\r.\r\n", b"\n.\r"):
        assert end in ENDS
    assert len(ENDS) > 85


STREAM_BORDER = len(b"DATA\r\n" + BEFORE)


def is_one_message(end: bytes, splits: range) -> None:
    """Split into two packets anywhere, it is one message, with all of it inside."""
    stream = b"DATA\r\n" + BEFORE + end + SMUGGLED + b".\r\n"
    content = (BEFORE + end + SMUGGLED).replace(b"\r\n.", b"\r\n")
    for split in splits:
        client = Client()
        client.begin()
        before = len(client.heard)
        client.say(stream[:split])
        if STREAM_BORDER <= split < len(stream):
            # No reply but the 354 before the very end.
            assert client.heard[before:].count(b"\r\n") == 1, split
        client.say(stream[split:])
        assert [message.data for message in client.messages] == [content], split
        assert client.messages[0].envelope.reverse_path == "a@example.com"


@pytest.mark.parametrize("end", ENDS)
def test_what_is_behind_an_end_of_data_that_is_none_is_content(end: bytes) -> None:
    """Whole, and at every split at the end that is none."""
    is_one_message(end, range(0, 1))
    is_one_message(end, range(STREAM_BORDER - 1, STREAM_BORDER + len(end) + 2))


@pytest.mark.long
@pytest.mark.parametrize("end", ENDS)
def test_what_is_behind_it_is_content_at_every_split_of_all_of_it(end: bytes) -> None:
    is_one_message(end, range(len(b"DATA\r\n" + BEFORE + end + SMUGGLED + b".\r\n") + 1))


@pytest.mark.parametrize("end", [*ENDS, b"\r\n.\r\n"])
def test_nothing_in_a_chunk_ends_it_nor_at_the_border_of_two(end: bytes) -> None:
    """BDAT counts: the true end of data is content there, too (RFC 3030 3)."""
    content = BEFORE + end + SMUGGLED + b".\r\n"
    for border in range(len(BEFORE) - 1, len(BEFORE + end) + 2):
        for gap in (b"", b"RSET\r\n"):
            client = Client()
            client.begin()
            first, second = content[:border], content[border:]
            client.say(b"BDAT %d\r\n" % len(first) + first)
            client.say(gap + b"BDAT %d LAST\r\n" % len(second) + second)
            expected = [] if gap else [content]
            assert [message.data for message in client.messages] == expected, border


@pytest.mark.parametrize("end", [*ENDS, b"\r\n.\r\n"])
def test_nothing_is_smuggled_across_the_border_of_data_and_bdat(end: bytes) -> None:
    """Chunks and DATA do not mix (RFC 3030 3), whatever stands at the border."""
    client = Client()
    client.begin()
    client.say(b"BDAT %d\r\n" % len(BEFORE) + BEFORE)
    client.say(b"DATA\r\n" + end[:1])
    client.say(end[1:] + SMUGGLED + b".\r\n")
    assert all(b"evil\r\n" not in message.data for message in client.messages)
    assert client.messages == []


@pytest.mark.parametrize("end", ENDS)
def test_a_command_that_is_cut_by_it_is_no_command(end: bytes) -> None:
    """Between transactions the same octets are errors, and what is glued to them is one, too."""
    client = Client()
    client.say(b"EHLO p\r\n")
    while b"\r\n" in end:
        end = end.replace(b"\r\n", b"\n")
    client.say(b"NOOP" + end + b"MAIL FROM:<evil@example.com>\r\n")
    client.say(b"RCPT TO:<b@example.org>\r\nDATA\r\nevil\r\n.\r\n")
    assert client.messages == []


PIECES = st.lists(
    st.one_of(
        st.sampled_from([b"\r", b"\n", b".", b"\x00", b"\r\n", b"x", SMUGGLED, b".\r\n", b"\r\n."]),
        st.binary(max_size=5),
    ),
    max_size=20,
).map(b"".join)


@given(PIECES, st.integers(0, 400))
@settings(deadline=None)
def test_the_first_true_end_is_the_only_one(content: bytes, split: int) -> None:
    """A strict reading of RFC 5321 4.1.1.4, by the shortest possible code, finds what we find."""
    stream = content + b"\r\n.\r\n"
    data = (b"\r\n" + stream).partition(b"\r\n.\r\n")[0][2:] + b"\r\n"
    if (b"\r\n" + stream).startswith(b"\r\n.\r\n"):
        data = b""
    client = Client()
    client.begin()
    client.say(b"DATA\r\n")
    client.say(stream[:split])
    client.say(stream[split:])
    assert client.messages[0].data == (b"\r\n" + data).replace(b"\r\n.", b"\r\n")[2:]


# -- the client role -------------------------------------------------------------------------------

# How real servers have found the end of data.  The CRLF of DATA's own line stands before content.
LAX: dict[str, bytes] = {
    "RFC 5321": rb"\r\n\.\r\n",
    "Postfix before 3.8.4: LF for CRLF": rb"\r?\n\.\r?\n",
    "sendmail before 8.18: LF.CRLF, CRLF.LF": rb"(?:\r\n|\n)\.(?:\r\n|\n)",
    "Exim before 4.97.1: LF.CRLF behind LF": rb"\n\.\r\n",
    "Cisco Secure Email: CR for CRLF": rb"(?:\r\n|\r|\n)\.(?:\r\n|\r|\n)",
    "any of CR, LF, and runs of them": rb"[\r\n]+\.[\r\n]+",
    "aiosmtpd before 1.4.5: CRLF.CR and text": rb"[\r\n]\.[\r\n]",
    "NULs are dropped first": rb"[\r\n]\x00*\.\x00*[\r\n]",
    "blanks behind the dot": rb"[\r\n]\.[ \t]*[\r\n]",
    "CRs are dropped first": rb"\n\r*\.\r*\n",
}


def on_the_wire(data: bytes, *keywords: str) -> bytes:
    """What a sender writes for the content of a message, its end of data too; nothing if it refuses
    the message."""
    sender = Sender("odmr.example.net")
    sender.send(Outgoing("key", Envelope("a@example.net", ("b@example.org",)), data))
    extensions = ["8BITMIME", "PIPELINING", *keywords]
    sender.receive_bytes(
        b"220 h\r\n250-h\r\n" + b"".join(f"250-{one}\r\n".encode() for one in extensions)
        + b"250 HELP\r\n250 ok\r\n250 ok\r\n"
    )  # fmt: skip
    if "CHUNKING" not in keywords:
        if not b"".join(sender.data_to_send()).endswith(b"DATA\r\n"):
            return b""
        sender.receive_bytes(b"354 go on\r\n")
        return b"".join(sender.data_to_send())
    wire = b"".join(sender.data_to_send())
    line = re.search(rb"BDAT (\d+) LAST\r\n", wire)
    if line is None:
        return b""
    assert len(wire) - line.end() == int(line[1])
    return wire[line.end() :]


def with_crlf(data: bytes) -> bytes:
    text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return text + b"\r\n" if text and not text.endswith(b"\r\n") else text


# A line that is a lone dot to those who drop NULs: such a message is not sent at all.
HIDDEN = re.compile(rb"[\r\n]\x00+\.\x00*(?:[\r\n]|\Z)")

CONTENTS = st.one_of(PIECES, st.binary(max_size=60), st.text(max_size=40).map(str.encode))


def holds(data: bytes) -> None:
    """The promise of the sending role, for one content."""
    wire = on_the_wire(data)
    if not wire:
        assert HIDDEN.search(b"\n" + data), "refused without a reason"
        return
    # DATA's own CRLF stands before it.
    stream = b"\r\n" + wire
    for name, rule in LAX.items():
        ends = [found.start() for found in re.finditer(b"(?=" + rule + b")", stream)]
        assert ends, (name, wire)
        for end in ends:  # a rule may match CRLF.CRLF at its CR and at its LF: the same dot
            assert stream[end:].strip(b"\r\n") == b".", (name, wire)
    unstuffed = stream[:-3].replace(b"\r\n.", b"\r\n")[2:]
    assert unstuffed == with_crlf(data)
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", wire)


@given(CONTENTS)
@settings(max_examples=400, deadline=None)
@example(b"")
@example(b".")
@example(b"..")
@example(b".\r\n")
@example(b"\r\n.\r\n")
@example(b"x\r\n\r\n")
@example(b"x\n.")
@example(b"x\r")
@example(b"\x00.")
@example(b"x\n\x00.\x00\r\nMAIL FROM:<>")
def test_whatever_the_content_every_server_finds_one_end(data: bytes) -> None:
    holds(data)


@pytest.mark.parametrize("end", [*ENDS, b"\r\n.\r\n"])
def test_no_smuggling_attempt_leaves_here(end: bytes) -> None:
    holds(BEFORE + end + SMUGGLED)


@given(CONTENTS)
@settings(deadline=None)
def test_by_bdat_the_same_content_goes_out_counted(data: bytes) -> None:
    """And with CRLF line ends only: the next hop may use DATA, and be lax."""
    wire = on_the_wire(data, "CHUNKING")
    assert wire == (b"" if HIDDEN.search(b"\n" + data) else with_crlf(data))


@pytest.mark.long
@seed(chance().getrandbits(32))
@given(st.lists(st.sampled_from([b"\r", b"\n", b".", b"\x00", b" ", b"x"]), max_size=12))
@settings(max_examples=amount(20_000, sampled=5_000), deadline=None)
def test_whatever_the_content_at_length(pieces: list[bytes]) -> None:
    holds(b"".join(pieces))
