"""Clients that mean harm, as dialogues with the SMTP machine: what they hear, and what it costs."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from support.client import Client, codes

from salmon_revsmtp.service.policy import Service
from salmon_revsmtp.service.settings import ServiceSettings
from salmon_revsmtp.smtp.limits import GIB, MIB, Limits
from salmon_revsmtp.smtp.receiver import Quit, Receiver, Refused


def sent_away(client: Client, words: str) -> bool:
    """The last thing that it heard is a 421 with these words, and the session is over."""
    last = client.heard.decode().splitlines()[-1]
    assert last.startswith("421 ") and words in last, last
    assert isinstance(client.events[-1], Quit)
    return client.receiver.closed and client.say(b"NOOP\r\n") == ""


# -- BDAT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("octets", [2**63, 2**63 - 1, 2**64, 4 * GIB + 1, 10**20 - 1])
@pytest.mark.parametrize("last", [b"", b" LAST"])
def test_a_chunk_of_an_absurd_size_is_not_waited_for(octets: int, last: bytes) -> None:
    client = Client()
    client.begin()
    assert client.say(b"BDAT %d%s\r\nQUIT\r\n" % (octets, last)) == "421"
    assert sent_away(client, "octets are taken")


def test_an_absurd_size_is_refused_outside_a_transaction_too() -> None:
    client = Client()
    assert client.say(b"BDAT %d\r\n" % 2**63) == "421"
    assert sent_away(client, "octets are taken")


def test_a_chunk_that_is_only_too_big_is_read_through_and_bounces() -> None:
    """RFC 3030 4.2: the client hears 552 when it has sent it all, and the session goes on."""
    client = Client(Limits(message=1 * MIB))
    client.begin()
    block = (b"MAIL FROM:<evil@example.com>\r\n" * 40_000)[: 1 * MIB]
    assert client.say(b"BDAT %d LAST\r\n" % (256 * MIB)) == ""
    for _ in range(255):
        assert client.say(block) == ""
        assert len(client.receiver._content) == 0
    assert client.say(block) == "552"
    assert client.say(b"MAIL FROM:<a@example.com>\r\n") == "250"
    [refused] = [event for event in client.events if isinstance(event, Refused)]
    assert (refused.recipients, refused.reply.code) == (("b@example.org",), 552)


def test_four_gigabytes_are_waited_for() -> None:
    client = Client()
    client.begin()
    assert client.say(b"BDAT %d LAST\r\n" % (4 * GIB)) == ""
    assert not client.receiver.closed


def test_chunks_that_are_absurd_together_end_the_session() -> None:
    client = Client(Limits(message=100, read_through=1000))
    client.begin()
    assert client.say(b"BDAT 600\r\n" + b"x" * 600) == "552"
    assert client.say(b"BDAT 400\r\n" + b"x" * 400) == "552"
    assert client.say(b"BDAT 1\r\n") == "421"
    assert sent_away(client, "octets are taken")


@pytest.mark.parametrize("size", [1, 7, 3000])
def test_data_without_an_end_is_not_thrown_away_for_ever(size: int) -> None:
    client = Client(Limits(message=100, read_through=1000))
    client.begin()
    client.say(b"DATA\r\n")
    heard, sent = "", 0
    while not heard:
        heard = client.say(b"y" * size)
        sent += size
        assert len(client.receiver._content) <= 110
        assert sent <= 1010 + size
    assert heard == "421"
    assert sent_away(client, "octets are taken")


@pytest.mark.parametrize("size", [1, 10, 2000])
def test_how_much_is_read_through_does_not_depend_on_packets(size: int) -> None:
    """1,000 octets hear 552, one more hears 421, however they are cut."""
    for octets, expected in ((1000, "354 552"), (1001, "354 421")):
        client = Client(Limits(message=100, read_through=1000))
        client.begin()
        before = len(client.heard)
        stream = b"DATA\r\n" + b"y" * (octets - 2) + b"\r\n.\r\n"
        for start in range(0, len(stream), size):
            client.say(stream[start : start + size])
        assert codes(client.heard[before:]) == expected


@pytest.mark.parametrize("argument", [b"-5", b"+5", b"0x5", b"5.", b"1e3", b"5 LASTLY", b"5,LAST"])
def test_a_chunk_that_is_counted_strangely_ends_the_session(argument: bytes) -> None:
    client = Client()
    client.begin()
    assert client.say(b"BDAT " + argument + b"\r\nQUIT\r\n") == "421"
    assert sent_away(client, "BDAT takes a number of octets")
    assert client.messages == []


def test_a_number_that_looks_octal_is_decimal() -> None:
    """RFC 3030 2: 1*DIGIT.  As octal, 8 octets would be content and QUIT a command."""
    client = Client()
    client.begin()
    assert client.say(b"BDAT 010 LAST\r\n1234QUIT\r\n") == "250"
    assert [message.data for message in client.messages] == [b"1234QUIT\r\n"]


def test_a_message_in_a_great_many_tiny_chunks_ends_the_session() -> None:
    client = Client(Limits(chunks=1000))
    client.begin()
    assert client.say(b"BDAT 1\r\nx" * 1000) == " ".join(["250"] * 1000)
    assert client.say(b"BDAT 1 LAST\r\nx") == "421"
    assert sent_away(client, "1000 chunks")


def test_the_largest_message_in_chunks_of_a_kilobyte_is_taken() -> None:
    for size in (1 * MIB, 50 * MIB, 1 * GIB):
        limits = Service("x", ServiceSettings(max_message_size=size)).limits
        assert limits.chunks * 1024 >= limits.message == size


def test_empty_chunks_are_no_progress() -> None:
    client = Client()
    client.begin()
    client.say(b"BDAT 0\r\n" * 101)
    assert sent_away(client, "unproductive")


def test_chunks_for_nobody_lose_the_message_and_not_only_its_beginning() -> None:
    """A recipient that is accepted after the first chunk was thrown away would get half of it."""
    client = Client()
    client.say(b"EHLO p\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<x@example.net>\r\n")
    assert client.say(b"BDAT 3\r\nabcRCPT TO:<b@example.org>\r\nBDAT 3 LAST\r\ndef") == (
        "554 503 554"
    )
    assert client.messages == []
    assert client.say(b"MAIL FROM:<a@example.com>\r\n") == "250"


def test_octets_outside_a_transaction_do_not_count_for_the_next_one() -> None:
    client = Client(Limits(message=10))
    client.say(b"EHLO p\r\n")
    assert client.say(b"BDAT 9 LAST\r\n123456789") == "503"
    assert client.say(b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 9 LAST\r\n123456789") == (
        "250 250 250"
    )


@pytest.mark.parametrize("end", [b"RSET\r\n", b"EHLO again\r\n", b"BDAT 0 LAST\r\n"])
def test_a_shutdown_in_the_middle_of_chunks_is_not_escaped(end: bytes) -> None:
    client = Client()
    client.begin()
    client.say(b"BDAT 3\r\nab\n")
    client.receiver.shut_down()
    assert client.receiver.advance() == []
    assert client.say(end + b"MAIL FROM:<a@example.com>\r\n") == "250 421"
    assert client.receiver.closed


# -- recipients ------------------------------------------------------------------------------------


def test_thousands_of_recipients_beyond_the_limit_are_deferred_and_then_sent_away() -> None:
    client = Client(Limits(recipients=10, refusals=100))
    client.begin(*(f"r{number}@example.org" for number in range(10)))
    assert client.say(b"RCPT TO:<more@example.org>\r\n" * 100) == " ".join(["452"] * 100)
    assert client.say(b"RCPT TO:<more@example.org>\r\nDATA\r\n") == "421"
    assert sent_away(client, "100 refusals in a row")
    assert client.messages == []


def test_refusals_are_counted_over_transactions_until_a_message_is_taken() -> None:
    client = Client(Limits(refusals=3))
    nobody = b"MAIL FROM:<>\r\nRCPT TO:<x@example.net>\r\nRSET\r\n"
    somebody = b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 1 LAST\r\nx"
    client.say(b"EHLO p\r\n")
    assert client.say(nobody * 3 + somebody + nobody * 3) == (
        "250 550 250 250 550 250 250 550 250 250 250 250 250 550 250 250 550 250 250 550 250"
    )
    assert client.say(nobody) == "250 421"


def test_a_service_bounds_refusals_at_ten_times_its_recipients() -> None:
    def refusals(recipients: int) -> int:
        return Service("x", ServiceSettings(max_recipients=recipients)).limits.refusals

    assert [refusals(number) for number in (1, 1000, 5000)] == [10_000, 10_000, 50_000]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (b"b@example.net", "550"),
        (b"b@example.org.example.net", "550"),
        (b"b@notexample.org", "550"),
        (b"b@sub.example.org", "550"),
        (b"b%example.net@example.org", "250"),  # ours: whoever it is, nothing goes to example.net
        (b"example.net!b@example.org", "250"),
        (b'"b@example.net"@example.org', "250"),
        (b'"b@example.org"@example.net', "550"),
        (b"b@example.net@example.org", "501"),
        (b"b@example.org@example.net", "501"),
        (b"@example.org:b@example.net", "550"),
        (b"@example.net,@example.com:b@example.org", "250"),
        (b"@example.net", "501"),
        (b"b@[192.0.2.1]", "550"),
        (b"b@[IPv6:::1]", "550"),
        (b"b@[example.org]", "550"),
        (b"b@[192.0.2.1].example.org", "501"),
        (b"b@example.org,c@example.net", "501"),
        (b"b@example.org:25", "501"),
        (b"b@example.org\\@example.net", "501"),
        (b"b(example.net)@example.org", "501"),
        (b"b@example.org.", "250"),
        (b"b@EXAMPLE.ORG", "250"),
        (b"b@example\xe3\x80\x82org", "553"),  # an ideographic full stop, without SMTPUTF8
        (b"postmaster", "250"),
        (b'"postmaster"', "501"),
        (b"root", "501"),
        (b'""@example.org', "250"),
        (b"", "501"),
    ],
)
def test_which_paths_are_ours(path: bytes, code: str) -> None:
    policy = Service("x", ServiceSettings(domains=("example.org",))).recipient_policy(())
    receiver = Receiver("h", Limits(), policy)
    receiver.receive_bytes(b"EHLO p\r\nMAIL FROM:<>\r\n")
    receiver.data_to_send()
    receiver.receive_bytes(b"RCPT TO:<" + path + b">\r\n")
    assert codes(receiver.data_to_send()) == code


# -- commands that bring nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [b"NOOP", b"NOOP x", b"RSET", b"VRFY root", b"HELP", b"EHLO p", b"HELO p"]
)
def test_commands_that_bring_nothing_are_not_answered_for_ever(command: bytes) -> None:
    client = Client()
    client.say(b"EHLO p\r\n")
    for _ in range(99):
        assert client.say(command + b"\r\n")[:1] == "2"
    assert client.say(command + b"\r\n") == "421"
    assert sent_away(client, "unproductive")


@pytest.mark.parametrize(
    "nothing",
    [
        b"MAIL FROM:<>\r\nDATA\r\n",
        b"MAIL FROM:<>\r\nBDAT 1 LAST\r\nx",
        b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nRSET\r\n",
        b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nEHLO p\r\n",
    ],
)
def test_transactions_that_never_have_data_are_not_begun_for_ever(nothing: bytes) -> None:
    client = Client()
    client.say(b"EHLO p\r\n" + nothing * 101)
    assert sent_away(client, "unproductive")


@pytest.mark.parametrize(
    "transaction",
    [
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<x@example.net>\r\nRSET\r\n",
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<x@example.net>\r\nDATA\r\nRSET\r\n",
        b"MAIL FROM:<a@example.com> SIZE=999999999999\r\nRSET\r\n",
        b"RSET\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 1 LAST\r\nxRSET\r\nNOOP\r\n",
        b"MAIL FROM:<>\r\nRCPT TO:<x@example.net>\r\n" + b"BDAT 1\r\nx" * 50 + b"BDAT 0 LAST\r\n",
    ],
)
def test_hundreds_of_honest_transactions_are_not_junk(transaction: bytes) -> None:
    client = Client()
    client.say(b"EHLO p\r\n")
    for _ in range(500):
        client.say(transaction)
    assert client.say(b"NOOP\r\n") == "250"


# -- what is no command ----------------------------------------------------------------------------


def test_mail_with_ten_thousand_parameters() -> None:
    client = Client()
    client.say(b"EHLO p\r\n")
    many = b"".join(b" X%d=1" % number for number in range(10_000))
    assert client.say(b"MAIL FROM:<a@example.com>" + many + b"\r\n") == "500"
    assert client.say(b"MAIL FROM:<a@example.com>" + b" RET=FULL" * 400 + b"\r\n") == "501"
    assert client.say(b"MAIL FROM:<a@example.com>\r\n") == "250"


@pytest.mark.parametrize(
    "command",
    [
        b"MAIL FROM:<a\x00@example.com>",
        b"MAIL FROM:<a@example.com>\x00",
        b"\x00MAIL FROM:<a@example.com>",
        b"MAIL FROM:<\xff@example.com>",
        b"MAIL FROM:<\xc0\x80@example.com> SMTPUTF8",
        b"MAIL FROM:<\xed\xa0\x80@example.com> SMTPUTF8",
        b"MAIL FROM:<a@example.com>\x0bRCPT TO:<b@example.org>",
        b"MAIL FROM:<a@example.com>\x7f",
        "\uff2d\uff21\uff29\uff2c FROM:<a@example.com>".encode(),
    ],
)
def test_nul_and_strange_octets_in_a_command_are_one_error(command: bytes) -> None:
    client = Client()
    client.say(b"EHLO p\r\n")
    assert client.say(command + b"\r\nRCPT TO:<b@example.org>\r\n") == "500 503"


@pytest.mark.parametrize("verb", ["GET", "HEAD", "POST", "PUT", "CONNECT", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("size", [1, 1000])
def test_a_browser_is_sent_away_at_its_first_line(verb: str, size: int) -> None:
    """Its form may have SMTP commands in it, and they are no worse for that."""
    client = Client()
    request = (
        f"{verb} /{'x' * 5000} HTTP/1.1\r\nHost: mail.example.org\r\n\r\nEHLO evil\r\n"
        "MAIL FROM:<evil@example.net>\r\nRCPT TO:<b@example.org>\r\nDATA\r\nevil\r\n.\r\n"
    ).encode()
    for start in range(0, len(request), size):
        client.say(request[start : start + size])
    assert codes(client.heard) == "220 421"
    assert sent_away(client, "not HTTP")
    assert client.messages == []


def test_a_browser_that_ends_lines_with_lf_is_sent_away_too() -> None:
    client = Client()
    assert client.say(b"POST / HTTP/1.1\nHost: x\n\nEHLO evil\r\nNOOP\r\n") == "421"
    assert sent_away(client, "not HTTP")


@pytest.mark.parametrize("split", [False, True])
def test_a_tls_handshake_on_the_plain_port_is_sent_away_at_once(split: bool) -> None:
    client = Client()
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32))
    for piece in [hello[:1], hello[1:]] if split else [hello]:
        client.say(piece)
    assert codes(client.heard) == "220 421"
    assert sent_away(client, "not TLS")


# -- what it costs ---------------------------------------------------------------------------------


def test_an_endless_line_costs_no_memory() -> None:
    client = Client()
    block = b"NOOP " + b"x" * 65_531
    tracemalloc.start()
    for _ in range(500):
        assert client.say(block) == ""
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 * MIB
    assert client.say(b"\r\nNOOP\r\n") == "500 250"


@pytest.mark.parametrize(
    "line",
    [
        b"NOOP x" + b" " * 4000 + b"y",
        b"RCPT TO:<b@example.net>" + b" " * 4000 + b"x",
        b"RCPT TO:<b@" + "ü.".encode() * 1300 + b"example.net>",
        b"RCPT TO:<" + b"@a," * 1300 + b"@a:b@example.net>",
        b'RCPT TO:<"' + b"\\a" * 1900 + b">",
        b"RCPT TO:<b@example.org> ORCPT=" + b"a-" * 1900,
        b"MAIL FROM:<a@example.com> ENVID=" + b"+2B" * 1300,
    ],
)
def test_no_command_takes_long(line: bytes) -> None:
    """The time that a line takes grows with its length and not with the square of it: a quarter of
    a second of our CPU for fifty of them, and that on a slow machine."""
    assert len(line) < Limits().command_line
    policy = Service("x", ServiceSettings(domains=("example.org",))).recipient_policy(())
    receiver = Receiver("h", Limits(errors=10_000, junk=10_000), policy)
    receiver.receive_bytes(b"EHLO p\r\nMAIL FROM:<> SMTPUTF8\r\n")
    before = time.process_time()
    receiver.receive_bytes((line + b"\r\n") * 50)
    assert time.process_time() - before < 0.25
