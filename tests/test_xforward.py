"""XFORWARD at both machines, as dialogues: who is told of a message's client, who is believed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.client import Client as Speaker
from support.client import codes, replies
from support.messages import MESSAGE

from salmon_revsmtp.smtp.envelope import Client, Envelope
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import LATER, Receiver, RecipientRequest, Refused, Transaction
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.sender import Broken, Event, NotForwarded, Outgoing, Sender, Sent
from salmon_revsmtp.smtp.xforward import ATTRIBUTES, command_lines, told, words

ORIGIN = Client("203.0.113.9", 41234, "mail.example.com", "ESMTP", "helo.example.com", "4711")
SAID = (
    b"XFORWARD NAME=mail.example.com ADDR=203.0.113.9 PORT=41234 PROTO=ESMTP "
    b"HELO=helo.example.com IDENT=4711\r\n"
)
ONE = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nBDAT 3 LAST\r\nx\r\n"


def believing(limits: Limits | None = None) -> Speaker:
    """A client that is believed, after its EHLO."""
    client = Speaker(limits)
    client.receiver.xforward = True
    client.receiver.client = ("192.0.2.1", 25)
    assert client.say(b"EHLO provider.example.net\r\n") == "250"
    return client


def client_of(speaker: Speaker, said: bytes) -> Client | None:
    """The client of a message that comes after this."""
    assert set(speaker.say(said + ONE).split()) == {"250"}
    return speaker.messages[-1].envelope.client


# -- the server role ------------------------------------------------------------------------------


def test_what_is_told_of_the_client_is_in_the_envelope() -> None:
    client = believing()
    [_, ehlo] = replies(client.heard)
    assert "XFORWARD NAME ADDR PORT PROTO HELO IDENT" in ehlo.text.split("\n")
    assert client_of(client, SAID) == ORIGIN
    envelope = client.messages[0].envelope
    assert (envelope.helo, envelope.forwarded_by) == ("helo.example.com", "provider.example.net")
    assert envelope.peer == ("203.0.113.9", 41234)
    assert envelope.esmtp


def test_several_commands_add_up_and_the_last_word_counts() -> None:
    said = (
        b"XFORWARD NAME=first.example.com ADDR=203.0.113.9\r\nXFORWARD name=mail.example.com "
        b"port=41234\r\nxforward Proto=ESMTP HELO=helo.example.com\r\nXFORWARD IDENT=4711\r\n"
    )
    assert client_of(believing(), said) == ORIGIN


def test_what_is_not_told_is_not_known_and_never_ours() -> None:
    client = believing()
    assert client_of(client, b"XFORWARD ADDR=203.0.113.9\r\n") == Client("203.0.113.9")
    assert client.messages[0].envelope.helo == ""
    unavailable = b" ".join(b"%s=[unavailable]" % one.encode() for one in ATTRIBUTES)
    assert client_of(client, b"XFORWARD " + unavailable + b"\r\n") == Client()
    assert client.messages[1].envelope.peer is None


def test_the_messages_own_name_says_nothing_of_a_host() -> None:
    """As Postfix has it, which says no more than this of mail of its own."""
    client = believing()
    own = Client("192.0.2.1", 25, "", "ESMTP", "provider.example.net", "4711")
    assert client_of(client, b"XFORWARD IDENT=4711 SOURCE=LOCAL\r\n") == own
    assert client.messages[0].envelope.forwarded_by == ""
    client.receiver.client = None  # a reversed connection
    assert client_of(client, b"XFORWARD IDENT=4711\r\n") == Client(ident="4711")
    assert client_of(client, b"XFORWARD SOURCE=REMOTE\r\n") is None


@pytest.mark.parametrize(
    "ends",
    [
        ONE,
        b"RSET\r\n",
        b"EHLO x\r\n",
        b"HELO x\r\nEHLO x\r\n",
        b"MAIL FROM:<a@example.com>\r\nRSET\r\n",
        b"MAIL FROM:<a@example.com> SIZE=99999\r\n",
        b"MAIL FROM:<a@example.com> NO=SUCH\r\n",
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<x@example.net>\r\nDATA\r\n",
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nBDAT 9999 LAST\r\n" + b"x" * 9999,
    ],
)
def test_it_holds_for_one_transaction(ends: bytes) -> None:
    client = believing(Limits(message=500))
    client.say(SAID + ends)
    own = client_of(client, b"")
    assert own is not None and own.address == "192.0.2.1"
    assert client.messages[-1].envelope.forwarded_by == ""


def test_under_pipelining_each_message_has_its_own() -> None:
    client = believing()
    flight = SAID + ONE + ONE + b"XFORWARD ADDR=198.51.100.7\r\n" + ONE
    assert client.say(flight) == " ".join(["250"] * 11)
    assert [one.envelope.peer for one in client.messages] == [
        ("203.0.113.9", 41234),
        ("192.0.2.1", 25),
        ("198.51.100.7", 0),
    ]


def test_what_was_told_in_the_clear_is_forgotten_under_tls() -> None:
    receiver = Receiver("mail.example.org", starttls=True, xforward=True)
    receiver.receive_bytes(b"EHLO x\r\n" + SAID + b"STARTTLS\r\n")
    receiver.tls_started()
    [message] = receiver.receive_bytes(b"EHLO x\r\n" + ONE)
    assert isinstance(message, Transaction) and message.envelope.client is None


def test_it_stands_between_transactions() -> None:
    client = Speaker()
    client.receiver.xforward = True
    assert client.say(SAID) == "503"
    client.begin()
    assert client.say(SAID) == "503"
    assert client.say(b"BDAT 1 LAST\r\nx" + SAID) == "250 250"
    assert client.messages[0].envelope.client is None


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"ADDR",
        b"ADDR=",
        b"=203.0.113.9",
        b"CITY=Paris",
        b"ADDR=203.0.113.9 CITY=Paris",
        b"ADDR=203.0.113",
        b"ADDR=203.0.113.9/24",
        b"ADDR=IPv6:203.0.113.9",
        b"ADDR=IPv6:",
        b"ADDR=mail.example.com",
        b"ADDR=[203.0.113.9]",
        b"ADDR=203.0.113.9+0D+0AX-Evil:+20x",
        b"PORT=65536",
        b"PORT=-1",
        b"PORT=smtp",
        b"PORT=123456",
        b"PROTO=" + b"x" * 65,
        b"NAME=" + b"x." * 127 + b"xx",
        b"NAME=mail..example.com",
        b"NAME=203.0.113.9",
        b"NAME=mail+20example",
        "NAME=b\u00fccher.example".encode(),
        b"HELO=" + b"x" * 256,
        b"IDENT=" + b"x" * 256,
        b"SOURCE=MARS",
    ],
)
def test_what_is_malformed_is_refused_and_changes_nothing(said: bytes) -> None:
    client = believing()
    assert client.say(b"XFORWARD " + said + b"\r\n") == "501"
    found = client_of(client, b"")
    assert found is not None and found.address == "192.0.2.1"


@pytest.mark.parametrize(
    ("said", "address"),
    [
        (b"203.0.113.9", "203.0.113.9"),
        (b"IPV6:2001:DB8:0::1", "2001:db8::1"),
        (b"ipv6:2001:db8::1", "2001:db8::1"),
        (b"2001:db8::1", "2001:db8::1"),
        (b"2001+3Adb8::1", "2001:db8::1"),
        (b"::ffff:203.0.113.9", "203.0.113.9"),
        (b"IPv6:fe80::1%<eth0>", "fe80::1"),
        (b"[Unavailable]", ""),
    ],
)
def test_an_address_is_one(said: bytes, address: str) -> None:
    found = client_of(believing(), b"XFORWARD ADDR=%s\r\n" % said)
    assert found is not None and found.address == address


def test_what_could_do_harm_becomes_a_question_mark() -> None:
    """Postfix before 2.3 sent values as they are."""
    said = 'HELO=a+0D+0AX-Evil:+20b(c)<d>"e"\\;@ IDENT=+1B[2J+00+C3+BC PROTO=E=S(M)TP'
    found = client_of(believing(), f"XFORWARD {said}\r\n".encode())
    assert found is not None
    assert found.helo == "a??X-Evil:?b?c??d??e????"
    assert found.ident == "?[2J??"
    assert found.protocol == "E=S?M?TP"


def test_a_client_that_is_not_believed_is_refused_it() -> None:
    client = Speaker()
    client.receiver.client = ("192.0.2.1", 25)
    client.say(b"EHLO x\r\n")
    assert b"XFORWARD" not in client.heard
    assert client.say(SAID) == "550"
    found = client_of(client, b"")
    assert found == Client("192.0.2.1", 25, "", "ESMTP", "x")
    assert client.messages[0].envelope.forwarded_by == ""
    for _ in range(30):
        client.say(SAID)
    assert client.receiver.closed, "whoever goes on with it is sent away"


def test_one_before_each_mail_is_no_junk_and_nothing_but_these_is() -> None:
    client = believing()
    for _ in range(300):
        assert client.say(b"RSET\r\n" + SAID + SAID + ONE) == "250 250 250 250 250 250"
    client.say(SAID * 200)
    assert replies(client.heard)[-1].code == 421


def test_a_refusal_says_whom_it_was_about() -> None:
    client = believing(Limits(message=500))
    client.say(SAID + b"MAIL FROM:<a@example.com>\r\nRCPT TO:<x@example.net>\r\nRSET\r\n")
    client.say(SAID + b"MAIL FROM:<a@example.com> SIZE=501\r\nMAIL FROM:<a@example.com>\r\n")
    client.say(b"RSET\r\n" + SAID + ONE.partition(b"BDAT")[0] + b"BDAT 501 LAST\r\n" + b"x" * 501)
    client.say(ONE.replace(b"example.org", b"example.net"))
    refused = [one.forwarded for one in client.events if isinstance(one, Refused)]
    assert refused == [ORIGIN, ORIGIN, ORIGIN, None]


def test_who_decides_on_a_recipient_knows_the_client() -> None:
    receiver = Receiver("mail.example.org", None, lambda mailbox: LATER, xforward=True)
    receiver.receive_bytes(b"EHLO provider.example.net\r\n")
    [asked] = receiver.receive_bytes(SAID + ONE)
    assert isinstance(asked, RecipientRequest) and asked.envelope.client == ORIGIN
    assert asked.envelope.forwarded == ORIGIN and asked.envelope.helo == "helo.example.com"
    receiver.answer_recipient(asked, Reply(550, "no"))
    [refused] = receiver.advance()
    assert isinstance(refused, Refused) and refused.forwarded == ORIGIN


# -- the values -----------------------------------------------------------------------------------


TEXT = st.text(max_size=300)


@given(
    st.builds(
        Client,
        address=st.one_of(st.ip_addresses().map(str), TEXT),
        port=st.integers(-1, 70000),
        name=TEXT,
        protocol=TEXT,
        helo=TEXT,
        ident=TEXT,
    ),
    st.lists(st.sampled_from(ATTRIBUTES), unique=True),
)
def test_whatever_a_client_is_it_can_be_said_and_is_understood(
    client: Client, listed: list[str]
) -> None:
    fields: dict[str, object] = {}
    for line in command_lines(client, listed):
        assert len(line) + 2 <= 512
        assert re.fullmatch(rb"XFORWARD(?: [A-Z]+=[!-~]{1,255})+", line)
        for word in line.split()[1:]:
            assert word.partition(b"=")[0].decode() in listed
        fields.update(told(line.decode().partition(" ")[2]))
    found = Client(**fields)  # type: ignore[arg-type]
    assert Client(**told(" ".join(words(found)))) == found, "and it stays as it is"


def test_a_client_is_told_of_as_it_is() -> None:
    assert [line + b"\r\n" for line in command_lines(ORIGIN, ATTRIBUTES)] == [SAID]
    assert list(words(Client("2001:db8::1"), ("ADDR", "IDENT", "HELO"))) == [
        "ADDR=IPv6:2001:db8::1",
        "HELO=[UNAVAILABLE]",
    ]
    # A name that is cut is another name, and what is no host name is none.
    strange = Client("x", 70000, "a b", "E" * 65, "h" * 256)
    assert list(words(strange)) == [f"{one}=[UNAVAILABLE]" for one in ATTRIBUTES if one != "IDENT"]
    assert list(words(Client(helo="a+b=c", name="x.example."), ("HELO", "NAME"))) == [
        "NAME=x.example",
        "HELO=a+2Bb+3Dc",
    ]


def test_what_is_too_long_for_a_line_is_two_commands() -> None:
    name = ".".join(["x" * 63] * 3)
    client = Client("2001:db8::1", 25, name, "ESMTP", "h" * 255, "i" * 255)
    lines = command_lines(client, ATTRIBUTES)
    assert len(lines) == 2 and max(map(len, lines)) <= 510
    fields = {**told(lines[0].decode()[9:]), **told(lines[1].decode()[9:])}
    assert Client(**fields) == client


# -- the client role ------------------------------------------------------------------------------


class Peer:
    """The server at the other end of a sender."""

    def __init__(self, *keywords: str) -> None:
        self.sender = Sender("odmr.example.net")
        self.events: list[Event] = []
        self.say("220 peer")
        assert self.hears() == b"EHLO odmr.example.net\r\n"
        self.say(*(f"250-{one}" for one in ("peer", *keywords)), "250 HELP")

    def say(self, *lines: str) -> None:
        self.events += self.sender.receive_bytes("".join(f"{one}\r\n" for one in lines).encode())

    def hears(self) -> bytes:
        return b"".join(self.sender.data_to_send())

    def verbs(self) -> str:
        """What the commands are that are heard now."""
        lines = self.hears().split(b"\r\n")
        known = (b"XFORWARD", b"RSET", b"MAIL", b"RCPT", b"BDAT", b"DATA")
        return " ".join(line.split()[0].decode() for line in lines if line.split(b" ")[0] in known)

    def send(self, client: Client | None = ORIGIN) -> None:
        envelope = Envelope("a@example.net", ("b@example.org",), client=client)
        self.events += self.sender.send(Outgoing("key", envelope, MESSAGE))

    @property
    def sent(self) -> list[int]:
        return [one.replies[0].code for one in self.events if isinstance(one, Sent)]

    @property
    def refusals(self) -> list[Reply]:
        return [one.reply for one in self.events if isinstance(one, NotForwarded)]


ALL = "XFORWARD NAME ADDR PORT PROTO HELO IDENT"


def test_a_peer_that_lists_it_is_told_before_mail_without_a_wait() -> None:
    peer = Peer("PIPELINING", "CHUNKING", ALL)
    peer.send()
    heard = peer.hears()
    assert heard.startswith(SAID + b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nBDAT ")
    peer.say("250 ok", "250 ok", "250 ok", "250 taken")
    assert peer.sent == [250] and peer.refusals == []


def test_a_peer_is_told_what_it_lists_and_no_more() -> None:
    peer = Peer("PIPELINING", "CHUNKING", "XFORWARD name Addr proto CITY")
    peer.send()
    said = b"XFORWARD NAME=mail.example.com ADDR=203.0.113.9 PROTO=ESMTP\r\nMAIL "
    assert peer.hears().startswith(said)
    for keywords in ((), ("XFORWARD",), ("XFORWARD CITY",)):
        peer = Peer("PIPELINING", "CHUNKING", *keywords)
        peer.send()
        assert peer.hears().startswith(b"MAIL ")


def test_without_pipelining_it_is_one_command_at_a_time() -> None:
    peer = Peer(ALL)
    peer.send()
    for command in (SAID, b"MAIL FROM:<a@example.net>\r\n", b"RCPT TO:<b@example.org>\r\n"):
        assert peer.hears() == command
        peer.say("250 ok")
    assert peer.hears() == b"DATA\r\n"


def test_written_ahead_it_comes_after_the_rset_and_no_message_inherits_it() -> None:
    peer = Peer("PIPELINING", "CHUNKING", ALL)
    for client in (ORIGIN, None, Client("198.51.100.7")):
        peer.send(client)
    assert peer.verbs() == (
        "XFORWARD MAIL RCPT BDAT RSET MAIL RCPT BDAT RSET XFORWARD MAIL RCPT BDAT"
    )


def test_a_peer_that_is_asked_for_recipients_knows_the_client() -> None:
    peer = Peer("PIPELINING", "CHUNKING", ALL)
    envelope = Envelope("a@example.net", ("b@example.org",), client=ORIGIN)
    peer.events += peer.sender.send(Outgoing("key", envelope, None))
    peer.send(None)
    assert peer.verbs() == "XFORWARD MAIL RCPT RSET RSET MAIL RCPT BDAT"


def test_after_a_refused_sender_the_next_message_is_told_of_anew() -> None:
    peer = Peer("PIPELINING", "CHUNKING", ALL)
    peer.send()
    peer.hears()
    peer.say("250 ok", "550 no", "503 no", "503 no")
    peer.send(None)
    assert peer.verbs() == "RSET MAIL RCPT BDAT"


@pytest.mark.parametrize("reply", ["451 4.3.0 not now", "501 5.5.4 bad", "550 5.7.0 not you"])
@pytest.mark.parametrize("keywords", [(ALL,), ("PIPELINING", ALL), ("PIPELINING", "CHUNKING", ALL)])
def test_a_refusal_holds_no_mail_up(reply: str, keywords: tuple[str, ...]) -> None:
    peer = Peer(*keywords)
    for _ in range(2):
        peer.send()
        while heard := peer.hears():
            for line in heard.split(b"\r\n"):
                verb = line.partition(b" ")[0]
                if verb == b"XFORWARD":
                    peer.say(reply)
                elif verb in (b"MAIL", b"RCPT", b"BDAT", b".") or line == b"RSET":
                    peer.say("250 ok")
                elif line == b"DATA":
                    peer.say("354 go on")
    assert peer.sent == [250, 250]
    assert [one.code for one in peer.refusals] == [int(reply[:3])], "it is told once"
    assert not any(isinstance(one, Broken) for one in peer.events)


def test_a_peer_that_refuses_it_for_good_hears_no_more_of_it() -> None:
    """It may count what it refuses as errors, and send us away."""
    peer = Peer("PIPELINING", "CHUNKING", ALL)
    for _ in range(30):
        peer.send()
    verbs = peer.verbs().split()
    assert verbs.count("XFORWARD") == verbs.count("MAIL") == 8
    peer.say(*("550 5.7.0 no" if verb == "XFORWARD" else "250 ok" for verb in verbs))
    verbs = peer.verbs().split()
    assert verbs.count("XFORWARD") == 0 and verbs.count("MAIL") == 22
    peer.say(*("250 ok" for _ in verbs))
    assert peer.sent == [250] * 30 and len(peer.refusals) == 1


def test_a_peer_that_has_taken_one_is_told_on_whatever_it_refuses_later() -> None:
    peer = Peer("PIPELINING", "CHUNKING", ALL)
    for reply in ("250 ok", "501 5.5.4 bad HELO", "250 ok"):
        peer.send()
        assert peer.verbs() == "XFORWARD MAIL RCPT BDAT"
        peer.say(reply, "250 ok", "250 ok", "250 taken")
    for _ in range(30):
        peer.send()
    assert peer.verbs().count("XFORWARD") == 30


def test_both_ends_agree() -> None:
    """Each client arrives with its own message, whatever the others are."""
    receiver = Receiver("mail.example.org", xforward=True)
    sender = Sender("odmr.example.net")
    clients = [None, ORIGIN, Client(), None, Client("2001:db8::1", 25, helo="h\u00fc (x)"), ORIGIN]
    for client in clients:
        envelope = Envelope("a@example.net", ("b@example.org",), client=client)
        sender.send(Outgoing("key", envelope, MESSAGE))
    found: list[Transaction] = []
    while True:
        sender.receive_bytes(receiver.data_to_send())
        said = b"".join(sender.data_to_send())
        if not said:
            break
        for event in receiver.receive_bytes(said):
            assert isinstance(event, Transaction)
            found.append(event)
            receiver.answer(event, Reply(250, "ok"))
    assert codes(receiver.data_to_send()) == ""
    last = Client("2001:db8::1", 25, helo="h???x?")
    assert [one.envelope.client for one in found] == [None, ORIGIN, Client(), None, last, ORIGIN]
