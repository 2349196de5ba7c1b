"""The client role, as dialogues: what it says to which peer, and what it makes of the answers."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.messages import MESSAGE

from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import AheadLimits, Limits
from salmon_revsmtp.smtp.receiver import Receiver, Transaction
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import (
    BeginTls,
    Broken,
    Closed,
    Event,
    Outgoing,
    Ready,
    Sender,
    Sent,
)

# As DATA sends it: RFC 5321 4.5.2.
STUFFED = MESSAGE.replace(b"\r\n.", b"\r\n..") + b".\r\n"
FULL = ("PIPELINING", "CHUNKING", "8BITMIME", "SIZE 1000", "PRDR", "SMTPUTF8", "DSN")


def outgoing(*recipients: str, data: bytes = MESSAGE, sender: str = "a@example.net") -> Outgoing:
    return Outgoing("key", Envelope(sender, recipients or ("b@example.org",)), data)


class Peer:
    """The server at the other end of a sender."""

    def __init__(
        self,
        *keywords: str,
        greet: bool = True,
        ahead: AheadLimits | None = None,
        starttls: bool = False,
    ) -> None:
        self.sender = Sender("odmr.example.net", ahead, starttls=starttls)
        self.events: list[Event] = []
        if greet:
            self.say("220 peer")
            assert self.hears() == b"EHLO odmr.example.net\r\n"
            self.say(*(f"250-{one}" for one in ("peer", *keywords)), "250 HELP")

    def say(self, *lines: str) -> None:
        self.events += self.sender.receive_bytes("".join(f"{one}\r\n" for one in lines).encode())

    def hears(self) -> bytes:
        return b"".join(self.sender.data_to_send())

    def send(self, message: Outgoing) -> None:
        self.events += self.sender.send(message)

    @property
    def sent(self) -> list[list[int]]:
        return [
            [reply.code for reply in event.replies]
            for event in self.events
            if isinstance(event, Sent)
        ]


def test_pipelining_and_chunking_make_one_write() -> None:
    peer = Peer("PIPELINING", "CHUNKING", "SIZE 1000")
    peer.send(outgoing("b@example.org", "c@example.org"))
    assert peer.hears() == (
        b"MAIL FROM:<a@example.net> SIZE=%d\r\nRCPT TO:<b@example.org>\r\n"
        b"RCPT TO:<c@example.org>\r\nBDAT %d LAST\r\n%s"
    ) % (len(MESSAGE), len(MESSAGE), MESSAGE)
    peer.say("250 ok", "250 ok", "550 no c here", "250 taken")
    assert peer.sent == [[250, 550]]


def test_commands_are_written_together_and_content_is_not_copied() -> None:
    peer = Peer("PIPELINING", "CHUNKING")
    large = (b"x" * 76 + b"\r\n") * 50
    for data in (MESSAGE, MESSAGE, large, MESSAGE):
        peer.send(outgoing(data=data))
    before, content, after = peer.sender.data_to_send()
    assert before.count(b"MAIL FROM") == 3 and after.count(b"MAIL FROM") == 1
    assert content is large


def test_without_chunking_it_is_data_with_dots_stuffed() -> None:
    peer = Peer("PIPELINING")
    peer.send(outgoing())
    assert peer.hears() == b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
    peer.say("250 ok", "250 ok", "354 go on")
    assert peer.hears() == STUFFED
    peer.say("250 taken")
    assert peer.sent == [[250]]


def test_without_pipelining_it_is_one_command_at_a_time() -> None:
    peer = Peer()
    peer.send(outgoing())
    for command, answer in (
        (b"MAIL FROM:<a@example.net>\r\n", "250 ok"),
        (b"RCPT TO:<b@example.org>\r\n", "250 ok"),
        (b"DATA\r\n", "354 go on"),
        (STUFFED, "250 taken"),
    ):
        assert peer.hears() == command
        peer.say(answer)
    assert peer.sent == [[250]]
    assert peer.hears() == b""


def test_an_old_server_gets_helo() -> None:
    peer = Peer(greet=False)
    peer.say("220 peer")
    peer.say("502 what?")
    assert peer.hears() == b"EHLO odmr.example.net\r\nHELO odmr.example.net\r\n"
    peer.say("250 hello")
    assert peer.events == [Ready({})]


def test_a_refused_sender_stops_the_transaction() -> None:
    peer = Peer()
    peer.send(outgoing("b@example.org", "c@example.org"))
    peer.hears()
    peer.say("550 not you")
    assert peer.hears() == b"RSET\r\n"
    assert peer.sent == [[550, 550]]
    peer.say("250 ok")
    peer.send(outgoing())
    assert peer.hears() == b"MAIL FROM:<a@example.net>\r\n"


def test_a_refused_sender_with_pipelining_is_one_reply_for_everyone() -> None:
    peer = Peer("PIPELINING", "CHUNKING")
    peer.send(outgoing("b@example.org", "c@example.org"))
    peer.hears()
    peer.say("451 later", "503 what", "503 what", "503 what")
    assert peer.sent == [[451, 451]]
    assert peer.hears() == b"RSET\r\n"


def test_no_accepted_recipient_and_data_wanted_all_the_same() -> None:
    peer = Peer("PIPELINING")
    peer.send(outgoing())
    peer.hears()
    peer.say("250 ok", "550 no", "354 go on")
    assert peer.hears() == b".\r\n"
    peer.say("250 an empty message")
    assert peer.sent == [[550]]


def test_prdr_gives_each_recipient_its_reply() -> None:
    peer = Peer(*FULL)
    peer.send(outgoing("b@example.org", "c@example.org", "d@example.org"))
    assert b" PRDR\r\n" in peer.hears()
    peer.say("250 ok", "250 b", "550 no c", "250 d")
    peer.say("353 each", "250 b has it", "451 d later", "250 all in all")
    assert peer.sent == [[250, 550, 451]]


def test_prdr_is_not_asked_for_one_recipient() -> None:
    peer = Peer(*FULL)
    peer.send(outgoing())
    assert b"PRDR" not in peer.hears()


def test_a_prdr_peer_may_answer_with_one_reply() -> None:
    peer = Peer(*FULL)
    peer.send(outgoing("b@example.org", "c@example.org"))
    peer.say("250 ok", "250 b", "250 c", "554 spam")
    assert peer.sent == [[554, 554]]


def test_8_bit_content_needs_8bitmime() -> None:
    message = outgoing(data="Grüße\r\n".encode())
    peer = Peer("8BITMIME")
    peer.send(message)
    assert peer.hears() == b"MAIL FROM:<a@example.net> BODY=8BITMIME\r\n"
    peer = Peer()
    peer.send(message)
    assert peer.sent == [[554]]
    assert peer.hears() == b""


def test_utf8_addresses_need_smtputf8() -> None:
    message = outgoing("δοκιμή@example.org")
    peer = Peer("SMTPUTF8", "PIPELINING")
    peer.send(message)
    assert peer.hears().startswith(
        "MAIL FROM:<a@example.net> SMTPUTF8\r\nRCPT TO:<δοκιμή@example.org>\r\n".encode()
    )
    peer = Peer()
    peer.send(message)
    assert peer.sent == [[553]]


def test_dsn_parameters_go_to_a_peer_that_knows_them() -> None:
    envelope = Envelope(
        "a@example.net",
        ("b@example.org",),
        {"RET": "HDRS", "ENVID": "7"},
        {"b@example.org": {"NOTIFY": "NEVER"}},
    )
    for keywords, words in ((FULL, (b" RET=HDRS ENVID=7", b" NOTIFY=NEVER")), ((), ())):
        peer = Peer("PIPELINING", *keywords)
        peer.send(Outgoing("key", envelope, MESSAGE))
        heard = peer.hears()
        assert (b"ENVID" in heard, b"NOTIFY" in heard) == (bool(words), bool(words))
        for word in words:
            assert word in heard


@pytest.mark.parametrize(
    ("keyword", "answers"),
    [
        ("PIPELINING", [("250 ok", "250 ok", "354 go on"), ("250 taken",)]),
        ("CHUNKING", [("250 ok",), ("250 ok",), ("250 taken",)]),
    ],
)
def test_messages_go_one_after_the_other_and_quit_comes_last(
    keyword: str, answers: list[tuple[str, ...]]
) -> None:
    peer = Peer(keyword)
    assert peer.sender.room
    peer.send(outgoing(data=b"1\r\n"))
    peer.send(outgoing(data=b"2\r\n"))
    peer.sender.quit()
    for data in (b"1\r\n", b"2\r\n"):
        heard = b""
        for said in answers:
            assert not peer.sender.room
            heard += peer.hears()
            peer.say(*said)
        assert heard.count(b"MAIL") == 1 and data in heard
    assert peer.hears() == b"QUIT\r\n"
    peer.say("221 bye")
    assert peer.events[-1] == Closed()


@pytest.mark.parametrize(
    "lines",
    [
        ["554 no service"],
        ["220 peer", "421 too busy"],
        ["hello"],
        ["220 peer", "250 hello", "250 no one asked"],
        ["220 peer", "354 go on"],
    ],
)
def test_a_peer_that_breaks_the_protocol(lines: list[str]) -> None:
    peer = Peer(greet=False)
    peer.say(*lines)
    assert isinstance(peer.events[-1], Broken)


@pytest.mark.parametrize("keywords", [(), ("PIPELINING",)])
@pytest.mark.parametrize("answer", ["250 taken", "353 each", "334 go on"])
def test_a_message_whose_data_was_never_sent_is_not_taken(
    keywords: tuple[str, ...], answer: str
) -> None:
    peer = Peer(*keywords)
    peer.send(outgoing())
    peer.say("250 ok", "250 ok", answer, "250 taken")
    assert b"hello" not in peer.hears()
    assert peer.sent == []
    assert isinstance(peer.events[-1], Broken)


@pytest.mark.parametrize("answers", [["354 go on"], ["250 ok", "354 go on"]])
def test_3yz_is_no_answer_to_mail_and_rcpt(answers: list[str]) -> None:
    peer = Peer()
    peer.send(outgoing())
    peer.say(*answers)
    assert peer.sent == []
    assert isinstance(peer.events[-1], Broken)


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope("a@example.net", ("b@example.org>\r\nRCPT TO:<evil@example.com",)),
        Envelope("a@example.net\r\nRSET", ("b@example.org",)),
        Envelope("a@example.net> SIZE=1 X=<", ("b@example.org",)),
        Envelope("a@example.net", ("",)),
        Envelope("a\udcff@example.net", ("b@example.org",)),
        Envelope("a@example.net", ("b@example.org",), {"ENVID": "7\r\nQUIT"}),
        Envelope("a@example.net", ("b@example.org",), {}, {"b@example.org": {"NOTIFY": "A B=C"}}),
    ],
)
def test_an_envelope_that_is_more_than_its_command_is_refused(envelope: Envelope) -> None:
    peer = Peer(*FULL)
    peer.send(Outgoing("key", envelope, MESSAGE))
    assert peer.sent == [[553]]
    assert peer.hears() == b""


def test_a_utf8_orcpt_needs_smtputf8() -> None:
    envelope = Envelope(
        "a@example.net", ("b@example.org",), {}, {"b@example.org": {"ORCPT": "utf-8;\u00fc"}}
    )
    for keywords, codes in (((), []), (("DSN",), [[553]]), (("DSN", "SMTPUTF8"), [])):
        peer = Peer(*keywords)
        peer.send(Outgoing("key", envelope, MESSAGE))
        assert peer.sent == codes
    assert peer.hears() == b"MAIL FROM:<a@example.net> SMTPUTF8\r\n"


def test_nothing_is_kept_of_what_a_peer_says_after_the_end() -> None:
    peer = Peer()
    peer.say("421 closing")
    tracemalloc.start()
    try:
        for _ in range(100):
            assert peer.sender.receive_bytes(b"x" * 100_000) == []
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 100_000


@pytest.mark.parametrize("keywords", [("PIPELINING",), ("PIPELINING", "CHUNKING")])
def test_an_end_of_data_that_nuls_hide_is_refused(keywords: tuple[str, ...]) -> None:
    peer = Peer(*keywords)
    peer.send(outgoing(data=b"Subject: x\n\nhello\n\x00.\x00\nMAIL FROM:<evil@example.net>\n"))
    assert peer.hears() == b""
    assert peer.sent == [[554]]


def test_421_leaves_the_message_unsent() -> None:
    peer = Peer("PIPELINING", "CHUNKING")
    peer.send(outgoing())
    peer.say("250 ok", "421 closing")
    assert isinstance(peer.events[-1], Broken)
    assert peer.sent == []


# -- several messages under way ----------------------------------------------------------------

AHEAD = ("PIPELINING", "CHUNKING", "PRDR")
TAKEN = ("250 ok", "250 ok", "250 taken")


def numbered(number: int, *recipients: str, octets: int = 0) -> Outgoing:
    data = b"%d\r\n" % number + b"x" * octets
    return Outgoing(number, Envelope("a@example.net", recipients or ("b@example.org",)), data)


def keys(peer: Peer) -> list[object]:
    return [event.message.key for event in peer.events if isinstance(event, Sent)]


def test_whole_transactions_go_out_without_a_wait_and_quit_behind_all_answers() -> None:
    peer = Peer(*AHEAD)
    for number in range(3):
        peer.send(numbered(number))
    peer.sender.quit()
    first = b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nBDAT 3 LAST\r\n%d\r\n"
    assert peer.hears() == first % 0 + b"RSET\r\n" + first % 1 + b"RSET\r\n" + first % 2
    peer.say(*TAKEN)
    assert keys(peer) == [0]
    peer.say("250 reset", *TAKEN, "250 reset", "250 ok")
    assert (keys(peer), peer.hears()) == ([0, 1], b"")
    peer.say("250 ok", "250 taken")
    assert (keys(peer), peer.hears()) == ([0, 1, 2], b"QUIT\r\n")


def test_a_message_for_which_nothing_is_under_way_needs_no_rset() -> None:
    peer = Peer(*AHEAD)
    for number in range(2):
        peer.send(numbered(number))
        assert b"RSET" not in peer.hears()
        peer.say(*TAKEN)


def test_what_is_under_way_is_bounded_in_messages_and_in_octets() -> None:
    peer = Peer(*AHEAD, ahead=AheadLimits(messages=3, octets=1000))
    for number in range(5):
        assert peer.sender.room is (number < 3)
        peer.send(numbered(number))
    assert peer.hears().count(b"MAIL") == 3
    peer.say(*TAKEN)
    assert peer.hears().count(b"MAIL") == 1

    peer = Peer(*AHEAD, ahead=AheadLimits(messages=99, octets=1000))
    peer.send(numbered(0, octets=5000))  # one may always go
    peer.send(numbered(1, octets=900))
    peer.send(numbered(2, octets=900))
    assert peer.hears().count(b"MAIL") == 1
    assert not peer.sender.room
    peer.say(*TAKEN)
    assert peer.hears().count(b"MAIL") == 1
    peer.say(*TAKEN)
    assert peer.hears().count(b"MAIL") == 1
    peer.say(*TAKEN)
    assert keys(peer) == [0, 1, 2]
    # What is answered takes no room any more.
    for number in range(2):
        peer.send(numbered(number, octets=400))
    assert peer.hears().count(b"MAIL") == 2


@pytest.mark.parametrize(
    ("answers", "codes"),
    [
        (["451 later", "503 what", "503 what", "503 what"], [451, 451]),
        (["250 ok", "550 no b", "551 no c", "554 nobody"], [550, 551]),
        (["250 ok", "550 no b", "551 no c", "503 what"], [550, 551]),
        (["250 ok", "550 no b", "551 no c", "250 if you like"], [550, 551]),
        (["250 ok", "250 b", "452 no c", "552 too big"], [552, 452]),
        (["250 ok", "250 b", "250 c", "353 each", "250 b", "550 c", "250 all"], [250, 550]),
        (["250 ok", "250 b", "250 c", "353 each", "250 b", "250 c", "451 all"], [451, 451]),
    ],
)
def test_a_refusal_in_the_middle_is_of_that_message_only(
    answers: list[str], codes: list[int]
) -> None:
    peer = Peer(*AHEAD)
    peer.send(numbered(0))
    peer.send(numbered(1, "b@example.org", "c@example.org"))
    peer.send(numbered(2))
    heard = peer.hears()
    peer.say(*TAKEN, "250 reset", *answers, "250 reset", *TAKEN)
    assert (keys(peer), peer.sent) == ([0, 1, 2], [[250], codes, [250]])
    # It was cleared before the next, so nothing has to be now.
    assert heard.count(b"RSET") == 2
    assert peer.hears() == b""


def test_the_last_that_was_refused_is_cleared_behind_its_answers() -> None:
    peer = Peer(*AHEAD)
    peer.send(numbered(0))
    peer.send(numbered(1))
    peer.hears()
    peer.say(*TAKEN, "250 reset", "250 ok", "550 no", "554 nobody")
    assert (peer.sent, peer.hears()) == ([[250], [550]], b"RSET\r\n")


@pytest.mark.parametrize("said", range(12))
def test_what_breaks_the_session_leaves_all_that_is_unanswered_unsent(said: int) -> None:
    answers = [*TAKEN, "250 reset", *TAKEN, "250 reset", *TAKEN]
    peer = Peer(*AHEAD)
    for number in range(4):
        peer.send(numbered(number))
    peer.say(*answers[:said], "421 closing", *answers[said:])
    assert isinstance(peer.events[-1], Broken)
    assert keys(peer) == list(range((said + 1) // 4))


def test_a_peer_that_cannot_reset_is_left() -> None:
    peer = Peer(*AHEAD)
    peer.send(numbered(0))
    peer.send(numbered(1))
    peer.say(*TAKEN, "500 what?", *TAKEN)
    assert isinstance(peer.events[-1], Broken)
    assert keys(peer) == [0]


def test_a_message_that_this_peer_cannot_take_is_told_of_in_its_turn() -> None:
    peer = Peer(*AHEAD)
    peer.send(numbered(0))
    peer.send(Outgoing(1, Envelope("a@example.net", ("b@example.org",)), "Grüße".encode()))
    peer.send(numbered(2))
    assert peer.hears().count(b"MAIL") == 2
    assert keys(peer) == []
    peer.say(*TAKEN, "250 reset", *TAKEN)
    assert (keys(peer), peer.sent) == ([0, 1, 2], [[250], [554], [250]])


@st.composite
def conversations(draw: st.DrawFn) -> tuple[int, list[str], list[int]]:
    """The replies to one message, and what they mean for each recipient."""
    recipients = draw(st.integers(1, 3))
    codes = st.sampled_from([250, 450, 550])
    if draw(st.booleans()):
        mail = draw(st.sampled_from([450, 550]))
        return recipients, [f"{mail} no", *["503 what"] * (recipients + 1)], [mail] * recipients
    answers = draw(st.lists(codes, min_size=recipients, max_size=recipients))
    accepted = [number for number, code in enumerate(answers) if code == 250]
    lines, meant = ["250-a", "250 sender"], list(answers)
    lines += [f"{code} recipient" for code in answers]
    if not accepted:
        return recipients, [*lines, draw(st.sampled_from(["503 what", "554 nobody"]))], meant
    if recipients > 1 and draw(st.booleans()):
        each = draw(st.lists(codes, min_size=len(accepted), max_size=len(accepted)))
        last = draw(codes)
        lines += ["353 each", *(f"{code} one" for code in each), f"{last} all"]
        for number, code in zip(accepted, each, strict=True):
            meant[number] = code if code != 250 else last
    else:
        last = draw(codes)
        lines += [f"{last} all"]
        for number in accepted:
            meant[number] = last
    return recipients, lines, meant


@given(
    st.lists(conversations(), min_size=1, max_size=6),
    st.lists(st.integers(1, 40), min_size=1),
    st.integers(1, 4),
    st.data(),
)
def test_every_message_gets_its_own_answers_however_they_come(
    talks: list[tuple[int, list[str], list[int]]], sizes: list[int], ahead: int, data: st.DataObject
) -> None:
    """A peer that answers what it hears, and whose octets are cut anywhere, perhaps for good."""
    peer = Peer(*AHEAD, ahead=AheadLimits(messages=ahead))
    for number, (recipients, _, _) in enumerate(talks):
        peer.send(numbered(number, *(f"{one}@example.org" for one in "bcd"[:recipients])))
    waiting = iter(talks)
    line_is_cut_at = data.draw(st.none() | st.integers(0, 400))
    octets = turn = 0
    while heard := peer.hears():
        stream = b""
        for line in heard.split(b"\r\n"):
            if line == b"RSET":
                stream += b"250 reset\r\n"
            elif line.startswith(b"MAIL"):
                stream += "".join(f"{one}\r\n" for one in next(waiting)[1]).encode()
        while stream:
            size = sizes[turn % len(sizes)]
            piece, stream, turn = stream[:size], stream[size:], turn + 1
            if line_is_cut_at is not None:
                piece = piece[: line_is_cut_at - octets]
            octets += len(piece)
            peer.events += peer.sender.receive_bytes(piece)
            if octets == line_is_cut_at:
                break
        if octets == line_is_cut_at:
            break
    meant = [codes for _, _, codes in talks]
    assert keys(peer) == list(range(len(peer.sent)))
    assert peer.sent == meant[: len(peer.sent)]
    assert not any(isinstance(event, Broken) for event in peer.events)
    if line_is_cut_at is None:
        assert len(peer.sent) == len(talks)


@given(
    st.lists(st.binary(max_size=30), min_size=1, max_size=6),
    st.lists(st.integers(1, 60), min_size=1),
)
def test_written_ahead_every_message_arrives_as_it_is(
    contents: list[bytes], sizes: list[int]
) -> None:
    """Sender and receiver; the receiver's answers come whenever they like."""
    peer = Peer("PIPELINING", "CHUNKING", "8BITMIME")
    for number, content in enumerate(contents):
        envelope = Envelope("a@example.net", (f"{number}@example.org",))
        peer.send(Outgoing(number, envelope, content + b"\r\n"))
    receiver = Receiver("h", Limits(unanswered_messages=2))
    receiver.receive_bytes(b"EHLO x\r\n")
    receiver.data_to_send()
    arrived: list[Transaction] = []
    stream, turn = peer.hears(), 0
    while stream:
        size = sizes[turn % len(sizes)]
        events = list(receiver.receive_bytes(stream[:size]))
        stream, turn = stream[size:], turn + 1
        while events:
            event = events.pop(0)
            assert isinstance(event, Transaction)
            arrived.append(event)
            receiver.answer(event, Reply(250, "ok"))
            events += receiver.advance()
        peer.events += peer.sender.receive_bytes(receiver.data_to_send())
    assert peer.sent == [[250]] * len(contents)
    for number, (one, content) in enumerate(zip(arrived, contents, strict=True)):
        assert one.envelope.recipients == (f"{number}@example.org",)
        lines = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") + b"\n"
        assert one.data.replace(b"\r\n", b"\n").rstrip(b"\n") == lines.rstrip(b"\n")


END_OF_DATA = [b"\n.\n", b"\r.\r", b"\r\n.\r\n", b"\n.\r\n", b"\r\n.\n", b"\r\n.\r", b".\r\n"]


@pytest.mark.parametrize("keywords", [("PIPELINING",), ("PIPELINING", "CHUNKING")])
@given(content=st.lists(st.one_of(st.sampled_from(END_OF_DATA), st.binary(max_size=9))))
def test_whatever_the_content_one_message_arrives(
    keywords: tuple[str, ...], content: list[bytes]
) -> None:
    """Sender and receiver, with nothing between them: no content ends its message early."""
    data = b"".join(content)
    assume(not re.search(rb"(?:\A|[\r\n])\x00+\.", data))  # that may be refused
    peer = Peer(*keywords, "8BITMIME")
    peer.send(outgoing(data=data))
    receiver = Receiver("h", Limits())
    receiver.receive_bytes(b"EHLO x\r\n")
    receiver.data_to_send()
    messages = []
    for _ in range(3):
        for event in receiver.receive_bytes(peer.hears()):
            assert isinstance(event, Transaction)
            messages.append(event.data)
            receiver.answer(event, Reply(250, "ok"))
        peer.events += peer.sender.receive_bytes(receiver.data_to_send())
    [arrived] = messages
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert arrived.replace(b"\r\n", b"\n") == (
        lines + b"\n" if lines and not lines.endswith(b"\n") else lines
    )
    assert peer.sent == [[250]]


@given(st.lists(st.integers(1, 20), min_size=1))
def test_any_split_of_the_replies_gives_the_same(sizes: list[int]) -> None:
    stream = (
        b"220 peer\r\n250-peer\r\n250-PIPELINING\r\n250 CHUNKING\r\n"
        b"250 ok\r\n250-two\r\n250 lines\r\n550 no\r\n250 taken\r\n221 bye\r\n"
    )
    peer = Peer(greet=False)
    peer.send(outgoing("b@example.org", "c@example.org"))
    peer.sender.quit()
    heard, start, turn = b"", 0, 0
    while start < len(stream):
        size = sizes[turn % len(sizes)]
        peer.events += peer.sender.receive_bytes(stream[start : start + size])
        heard += peer.hears()
        start, turn = start + size, turn + 1
    assert peer.sent == [[250, 550]]
    assert peer.events[-1] == Closed()
    assert heard.count(b"\r\n") == 6 + MESSAGE.count(b"\r\n")
    assert heard.endswith(b"QUIT\r\n")


def asking(*recipients: str, sender: str = "a@example.net", size: str = "9") -> Outgoing:
    envelope = Envelope(sender, recipients or ("b@example.org",), {"SIZE": size})
    return Outgoing("key", envelope, None)


def test_a_peer_is_asked_for_recipients_without_a_message() -> None:
    peer = Peer("PIPELINING", "SIZE 1000")
    peer.send(asking("b@example.org", "c@example.org"))
    assert peer.hears() == (
        b"MAIL FROM:<a@example.net> SIZE=9\r\nRCPT TO:<b@example.org>\r\n"
        b"RCPT TO:<c@example.org>\r\nRSET\r\n"
    )
    peer.say("250 ok", "251 2.1.5 will forward", "550 5.1.1 who?", "250 reset")
    [sent] = [event for event in peer.events if isinstance(event, Sent)]
    assert [reply.text for reply in sent.replies] == ["2.1.5 will forward", "5.1.1 who?"]
    assert sent.asked


def test_a_peer_without_pipelining_is_asked_step_by_step() -> None:
    peer = Peer()
    peer.send(asking())
    for command, answer in ((b"MAIL", "250 ok"), (b"RCPT", "450 busy"), (b"RSET", "250 ok")):
        assert peer.hears().startswith(command)
        peer.say(answer)
    assert peer.sent == [[450]]
    peer.send(outgoing())
    assert peer.hears().startswith(b"MAIL FROM")


@pytest.mark.parametrize("keywords", [(), FULL])
def test_a_sender_that_is_refused_is_the_answer_for_its_recipients(
    keywords: tuple[str, ...],
) -> None:
    peer = Peer(*keywords)
    peer.send(asking("b@example.org", "c@example.org"))
    peer.hears()
    peer.say("550 5.7.1 not you", *(["503 no", "503 no", "250 reset"] if keywords else []))
    assert peer.sent == [[550, 550]]


def test_questions_go_out_among_messages() -> None:
    peer = Peer(*FULL)
    for message in (outgoing(), asking(), outgoing("c@example.org"), asking("d@example.org")):
        peer.send(message)
    assert peer.hears().count(b"RSET\r\n") == 5  # before each that is written ahead, and two more
    ok = "250 ok"
    peer.say(ok, ok, "250 taken", ok, ok, "550 no", ok, ok, ok, ok, "251 taken", ok, ok, ok, ok)
    assert peer.sent == [[250], [550], [251], [250]]


def test_what_a_peer_cannot_be_asked_is_told_apart() -> None:
    peer = Peer("PIPELINING")
    peer.send(asking("b\u00fc@example.org"))
    [sent] = [event for event in peer.events if isinstance(event, Sent)]
    assert not sent.asked and sent.replies[0].code == 553
    peer.send(asking())
    peer.say("250 ok", "553 not here", "250 ok")
    assert [event.asked for event in peer.events if isinstance(event, Sent)] == [False, True]


def test_a_message_of_which_nothing_has_gone_out_can_be_withdrawn() -> None:
    peer = Peer("PIPELINING", "CHUNKING", ahead=AheadLimits(messages=1))
    first, second, third = outgoing(), outgoing("c@example.org"), asking("d@example.org")
    for message in (first, second, third):
        peer.send(message)
    assert peer.hears().count(b"MAIL") == 1
    assert peer.sender.withdraw(second) and not peer.sender.withdraw(first)
    peer.say("250 ok", "250 ok", "250 taken")
    assert b"d@example.org" in peer.hears()
    peer.say("250 ok", "250 ok", "250 ok")
    assert [one.message for one in peer.events if isinstance(one, Sent)] == [first, third]


class Slow:
    """Content that goes out in many pieces."""

    size, ascii = 600_000, True

    def pieces(self) -> Iterator[bytes]:
        for _ in range(self.size // 100):
            yield b"x" * 98 + b"\r\n"

    def beginning(self, octets: int) -> bytes:
        return b""


@pytest.mark.parametrize("refusal", [["550 not you"], ["250 ok", "550 no such recipient"]])
def test_a_refusal_while_content_goes_out_costs_no_message_after_it(refusal: list[str]) -> None:
    peer = Peer("PIPELINING", "CHUNKING")
    peer.send(Outgoing("large", Envelope("a@example.net", ("b@example.org",)), Slow()))
    peer.send(outgoing("c@example.org"))
    heard = peer.hears() + peer.hears()
    peer.say(*refusal)
    while peer.sender.streaming:
        heard += peer.hears()
    heard += peer.hears()
    assert heard.count(b"MAIL FROM") == 2
    peer.say(*(["503 no"] if len(refusal) == 1 else []), "554 no one", "250 reset", "250 ok")
    peer.say("250 ok", "250 taken")
    assert peer.sent == [[550], [250]]


def test_tls_is_used_where_it_is_offered_and_what_was_said_before_is_forgotten() -> None:
    peer = Peer("STARTTLS", "CHUNKING", "PIPELINING", starttls=True)
    peer.send(outgoing())
    assert peer.hears() == b"STARTTLS\r\n"
    peer.say("220 go ahead")
    assert peer.events == [BeginTls()] and peer.hears() == b""
    peer.sender.tls_started()
    assert peer.sender.advance() == []
    assert peer.hears() == b"EHLO odmr.example.net\r\n"
    peer.say("250-peer", "250-STARTTLS", "250 SIZE")
    assert peer.events[1:] == [Ready({"STARTTLS": "", "SIZE": ""})]
    assert peer.hears() == b"MAIL FROM:<a@example.net> SIZE=%d\r\n" % len(MESSAGE)


def test_without_tls_it_goes_on_in_the_clear() -> None:
    for keywords, answers in ([], []), (["STARTTLS"], ["454 no"]), (["STARTTLS"], ["502 no"]):
        peer = Peer(*keywords, starttls=True)
        if answers:
            assert peer.hears() == b"STARTTLS\r\n"
            peer.say(*answers)
        assert isinstance(peer.events[-1], Ready)
    assert Peer("STARTTLS").hears() == b"", "and no one is asked who did not want it"


@pytest.mark.parametrize("after", ["250 evil", "250-ev"])
def test_what_comes_glued_to_the_answer_to_starttls_is_no_reply(after: str) -> None:
    peer = Peer("STARTTLS", starttls=True)
    peer.hears()
    peer.events += peer.sender.receive_bytes(f"220 go ahead\r\n{after}".encode())
    assert peer.sender.pending, "the driver looks, and does no handshake"
    peer = Peer("STARTTLS", starttls=True)
    peer.say("220 go ahead", "250 evil")
    assert isinstance(peer.events[-1], Broken)


# -- LMTP, and a peer that is not trusted to count ------------------------------------------------


def test_lmtp_says_lhlo_and_never_helo() -> None:
    sender = Sender("mail.example.org", lmtp=True)
    sender.receive_bytes(b"220 store\r\n")
    assert sender.data_to_send() == [b"LHLO mail.example.org\r\n"]
    [event] = sender.receive_bytes(b"500 5.5.2 what?\r\n")
    assert event == Broken("the peer answers LHLO with 500 5.5.2 what?")


def test_by_lmtp_a_message_has_one_recipient() -> None:
    """There would be a reply for each of several."""
    sender = Sender("mail.example.org", lmtp=True)
    with pytest.raises(ValueError, match="one recipient"):
        sender.send(outgoing("a@example.org", "b@example.org"))


def test_without_chunking_content_waits_for_the_354_of_a_peer_that_offers_it() -> None:
    sender = Sender("mail.example.org", chunking=False)
    sender.receive_bytes(b"220 peer\r\n")
    sender.data_to_send()
    sender.receive_bytes(b"250-peer\r\n250-PIPELINING\r\n250 CHUNKING\r\n")
    sender.send(outgoing())
    commands = b"".join(sender.data_to_send())
    assert commands == b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
    sender.receive_bytes(b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert b"".join(sender.data_to_send()) == STUFFED
