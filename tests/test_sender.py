"""The client role, as dialogues: what it says to which peer, and what it makes of the answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import Receiver, Transaction
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Broken, Closed, Event, Outgoing, Ready, Sender, Sent

MESSAGE = b"Subject: hi\r\n\r\n.hello\r\n"
FULL = ("PIPELINING", "CHUNKING", "8BITMIME", "SIZE 1000", "PRDR", "SMTPUTF8", "DSN")


def outgoing(*recipients: str, data: bytes = MESSAGE, sender: str = "a@example.net") -> Outgoing:
    return Outgoing("key", Envelope(sender, recipients or ("b@example.org",)), data)


class Peer:
    """The server at the other end of a sender."""

    def __init__(self, *keywords: str, greet: bool = True) -> None:
        self.sender = Sender("odmr.example.net")
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


def test_without_chunking_it_is_data_with_dots_stuffed() -> None:
    peer = Peer("PIPELINING")
    peer.send(outgoing())
    assert peer.hears() == b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
    peer.say("250 ok", "250 ok", "354 go on")
    assert peer.hears() == b"Subject: hi\r\n\r\n..hello\r\n.\r\n"
    peer.say("250 taken")
    assert peer.sent == [[250]]


def test_without_pipelining_it_is_one_command_at_a_time() -> None:
    peer = Peer()
    peer.send(outgoing())
    for command, answer in (
        (b"MAIL FROM:<a@example.net>\r\n", "250 ok"),
        (b"RCPT TO:<b@example.org>\r\n", "250 ok"),
        (b"DATA\r\n", "354 go on"),
        (b"Subject: hi\r\n\r\n..hello\r\n.\r\n", "250 taken"),
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


def test_messages_go_one_after_the_other_and_quit_comes_last() -> None:
    peer = Peer("PIPELINING", "CHUNKING")
    peer.send(outgoing(data=b"1\r\n"))
    peer.send(outgoing(data=b"2\r\n"))
    peer.sender.quit()
    assert peer.hears().endswith(b"BDAT 3 LAST\r\n1\r\n")
    peer.say("250 ok", "250 ok", "250 taken")
    assert peer.hears().endswith(b"BDAT 3 LAST\r\n2\r\n")
    peer.say("250 ok", "250 ok", "250 taken")
    assert peer.hears() == b"QUIT\r\n"
    peer.say("221 bye")
    assert peer.events[-1] == Closed()


@pytest.mark.parametrize(
    "lines",
    [
        ["554 no service"],
        ["220 peer", "421 too busy"],
        ["hello"],
        ["220 peer", "250 hello", "250 nobody asked"],
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
    peer.sender.receive_bytes(b"x" * 100)
    assert peer.sender._parser.idle


def test_421_leaves_the_message_unsent() -> None:
    peer = Peer("PIPELINING", "CHUNKING")
    peer.send(outgoing())
    peer.say("250 ok", "421 closing")
    assert isinstance(peer.events[-1], Broken)
    assert peer.sent == []


END_OF_DATA = [b"\n.\n", b"\r.\r", b"\r\n.\r\n", b"\n.\r\n", b"\r\n.\n", b"\r\n.\r", b".\r\n"]


@pytest.mark.parametrize("keywords", [("PIPELINING",), ("PIPELINING", "CHUNKING")])
@given(content=st.lists(st.one_of(st.sampled_from(END_OF_DATA), st.binary(max_size=9))))
def test_whatever_the_content_one_message_arrives(
    keywords: tuple[str, ...], content: list[bytes]
) -> None:
    """Sender and receiver, with nothing between them: no content ends its message early."""
    data = b"".join(content)
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
