"""The server role, as dialogues: what a client sends, and what it hears."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.client import OK, Client, codes, only_example, replies, transactions

from salmon_revsmtp.smtp.commands import Commands
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import Quit, Receiver, Refused, Transaction
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.smtp.turn import Turn


def test_a_plain_session() -> None:
    client = Client()
    assert client.heard.startswith(b"220 mail.example.org ")
    assert client.say(b"EHLO provider.example.net\r\n") == "250"
    assert client.say(b"MAIL FROM:<a@example.com> SIZE=30\r\n") == "250"
    assert client.say(b"RCPT TO:<B@example.org>\r\n") == "250"
    assert client.say(b"DATA\r\n") == "354"
    assert client.say(b"Subject: hi\r\n\r\nhello\r\n.\r\n") == "250"
    assert client.say(b"QUIT\r\n") == "221"
    assert client.receiver.closed
    [message] = client.messages
    assert message.data == b"Subject: hi\r\n\r\nhello\r\n"
    assert message.envelope.reverse_path == "a@example.com"
    assert message.envelope.recipients == ("B@example.org",)
    assert message.envelope.helo == "provider.example.net"
    assert message.envelope.esmtp


def test_ehlo_lists_what_the_design_promises() -> None:
    client = Client(Limits(message=1234))
    client.say(b"EHLO x\r\n")
    [_, ehlo] = replies(client.heard)
    lines = ehlo.text.split("\n")
    assert lines[0] == "mail.example.org"
    assert set(lines[1:]) >= {
        "SIZE 1234",
        "8BITMIME",
        "PIPELINING",
        "ENHANCEDSTATUSCODES",
        "CHUNKING",
        "SMTPUTF8",
        "PRDR",
    }


def test_helo_takes_mail_without_parameters() -> None:
    client = Client()
    assert client.say(b"HELO provider\r\n") == "250"
    assert client.say(b"MAIL FROM:<a@example.com> SIZE=3\r\n") == "555"
    assert client.say(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\n") == "250 250"
    assert client.say(b"DATA\r\nx\r\n.\r\n") == "354 250"
    assert not client.messages[0].envelope.esmtp


def test_every_reply_has_an_enhanced_status_code_but_greeting_ehlo_and_3yz() -> None:
    client = Client()
    client.begin()
    client.say(b"NOOP\r\nVRFY x\r\nHELP\r\nBAD\r\nDATA\r\n.\r\nRSET\r\nQUIT\r\n")
    for reply in replies(client.heard)[2:]:
        if reply.code != 354:
            assert reply.text.startswith(f"{reply.code // 100}."), reply


def test_pipelined_transactions_in_one_packet() -> None:
    client = Client()
    one = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nBDAT 3 LAST\r\nx\r\n"
    assert client.say(b"EHLO p\r\n" + one + one + b"QUIT\r\n") == (
        "250 250 250 250 250 250 250 221"
    )
    assert [message.data for message in client.messages] == [b"x\r\n", b"x\r\n"]


def test_replies_keep_their_order_behind_an_unanswered_transaction() -> None:
    receiver = Receiver("h", Limits(), only_example)
    receiver.data_to_send()
    one = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nBDAT 1 LAST\r\nx"
    [*messages, end] = receiver.receive_bytes(b"EHLO p\r\n" + one + one + b"QUIT\r\n")
    [first, second] = transactions(messages)
    assert codes(receiver.data_to_send()) == "250 250 250"
    receiver.answer(second, Reply(451, "later"))
    assert receiver.data_to_send() == b""
    assert isinstance(end, Quit)
    assert not receiver.closed
    receiver.answer(first, OK)
    assert codes(receiver.data_to_send()) == "250 250 250 451 221"
    assert receiver.closed


def test_reading_ahead_is_bounded_and_goes_on_after_an_answer() -> None:
    receiver = Receiver("h", Limits(unanswered_messages=2), only_example)
    one = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nBDAT 1 LAST\r\nx"
    [first, _] = transactions(receiver.receive_bytes(b"EHLO p\r\n" + one * 3))
    assert receiver.paused
    receiver.answer(first, OK)
    [third] = transactions(receiver.advance())
    assert receiver.paused
    receiver.answer(third, OK)
    assert not receiver.paused


def test_replies_that_wait_behind_a_transaction_are_bounded() -> None:
    receiver = Receiver("h", Limits(unanswered_octets=1000), only_example)
    begin = b"EHLO p\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 1 LAST\r\nx"
    [event] = transactions(receiver.receive_bytes(begin + b"HELP\r\n" * 100))
    receiver.data_to_send()
    assert receiver.paused
    receiver.answer(event, OK)
    assert not receiver.paused
    receiver.advance()
    assert codes(receiver.data_to_send()) == "250" + " 214" * 100


def test_a_shutdown_ends_the_session_when_the_transaction_is_given_up() -> None:
    for begun, rest, heard in (
        (b"BDAT 1\r\nx", b"RSET\r\n", "250 421"),
        (b"RSET\r\nBDAT 2 LAST\r\nx", b"x", "503 421"),
    ):
        client = Client()
        client.begin()
        client.say(begun)
        client.receiver.shut_down()
        assert client.say(rest + b"MAIL FROM:<a@example.com>\r\n") == heard
        assert client.receiver.closed


def test_a_shutdown_does_not_end_a_transaction_with_a_recipient() -> None:
    """Its client may take the end for the success of the recipients accepted before."""
    client = Client()
    client.begin("b@example.org")
    client.receiver.shut_down()
    assert client.say(b"RCPT TO:<c@example.org>\r\nDATA\r\n") == "250 354"
    assert client.say(b"x\r\n.\r\n") == "250 421"
    assert client.messages[0].envelope.recipients == ("b@example.org", "c@example.org")
    assert client.receiver.closed


def test_a_shutdown_before_the_first_recipient_ends_the_session() -> None:
    client = Client()
    client.say(b"EHLO p\r\nMAIL FROM:<a@example.com>\r\n")
    client.receiver.shut_down()
    assert client.say(b"RCPT TO:<b@example.org>\r\n") == "421"
    assert client.receiver.closed


def test_a_shutdown_during_the_handshake_is_the_end() -> None:
    receiver = Receiver("h", Limits(), only_example, starttls=True)
    receiver.receive_bytes(b"EHLO p\r\nSTARTTLS\r\n")
    receiver.shut_down()
    receiver.tls_started()
    receiver.advance()
    receiver.data_to_send()
    assert receiver.receive_bytes(b"EHLO p\r\n") == []
    assert receiver.data_to_send() == b""
    assert receiver.closed


def test_an_answer_is_given_once() -> None:
    receiver = Receiver("h", Limits(), only_example)
    [event] = transactions(
        receiver.receive_bytes(
            b"EHLO p\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 1 LAST\r\nx"
        )
    )
    receiver.answer(event, OK)
    with pytest.raises(KeyError):
        receiver.answer(event, OK)


def test_chunks_make_one_message() -> None:
    client = Client()
    client.begin()
    assert client.say(b"BDAT 4\r\nab\r\n") == "250"
    assert client.say(b"MAIL FROM:<x@example.com>\r\n") == "503"
    assert client.say(b"BDAT 5\r\n.\r\n\r\nBDAT 0 LAST\r\n") == "250 250"
    assert client.messages[0].data == b"ab\r\n.\r\n\r\n"


def test_bdat_octets_are_never_commands_even_when_refused() -> None:
    client = Client()
    trap = b"QUIT\r\nMAIL FROM:<evil@example.com>\r\n"
    assert client.say(b"BDAT %d LAST\r\n%sEHLO p\r\n" % (len(trap), trap)) == "503 250"
    assert client.say(b"BDAT %d LAST\r\n%s" % (len(trap), trap)) == "503"
    assert client.say(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<x@example.net>\r\n") == "250 550"
    assert client.say(b"BDAT %d LAST\r\n%s" % (len(trap), trap)) == "554"
    assert client.say(b"MAIL FROM:<a@example.com>\r\n") == "250"
    assert client.messages == []


def test_octets_thrown_away_before_a_transaction_do_not_count_against_it() -> None:
    client = Client(Limits(message=10))
    assert client.say(b"EHLO p\r\nBDAT 9 LAST\r\n123456789") == "250 503"
    assert client.say(b"MAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\n") == "250 250"
    assert client.say(b"BDAT 9 LAST\r\n123456789") == "250"


def test_no_message_comes_of_the_rest_when_its_first_chunk_had_no_recipient() -> None:
    client = Client()
    client.say(b"EHLO p\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<x@example.net>\r\n")
    assert client.say(b"BDAT 6\r\nfirst ") == "554"
    assert client.say(b"RCPT TO:<b@example.org>\r\nBDAT 4 LAST\r\nlast") == "503 554"
    assert client.messages == []


@pytest.mark.parametrize(
    "argument", [b"", b"-1", "3 LA\u017fT".encode(), b"0x10 LAST", b"9" * 21, b"1 LAST x", b"1 2"]
)
def test_a_bdat_whose_octets_cannot_be_counted_ends_the_session(argument: bytes) -> None:
    client = Client()
    client.begin()
    assert client.say(b"BDAT " + argument + b"\r\nMAIL FROM:<evil@example.com>\r\n") == "421"
    assert client.receiver.closed


def test_prdr_answers_each_recipient() -> None:
    receiver = Receiver("h", Limits(), only_example)
    [event] = transactions(
        receiver.receive_bytes(
            b"EHLO p\r\nMAIL FROM:<a@example.com> PRDR\r\nRCPT TO:<b@example.org>\r\n"
            b"RCPT TO:<c@example.org>\r\nDATA\r\nx\r\n.\r\n"
        )
    )
    receiver.data_to_send()
    receiver.answer(event, Reply(250, "for some"), [OK, Reply(550, "no c here", "5.1.1")])
    assert receiver.data_to_send() == (
        b"353 one reply per recipient follows\r\n"
        b"250 2.0.0 delivered\r\n550 5.1.1 no c here\r\n250 2.0.0 for some\r\n"
    )


def test_dots_are_unstuffed_and_only_where_a_line_begins() -> None:
    client = Client()
    client.begin()
    client.say(b"DATA\r\n..\r\n...\r\n.a\r\nb.\r\n..c\r\n \r\n..\r\n.\r\n")
    assert client.messages[0].data == b".\r\n..\r\na\r\nb.\r\n.c\r\n \r\n.\r\n"


def test_an_empty_message() -> None:
    client = Client()
    client.begin()
    assert client.say(b"DATA\r\n.\r\n") == "354 250"
    assert client.messages[0].data == b""


SMUGGLED = b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\nevil\r\n"


@pytest.mark.parametrize(
    "end",
    [
        b"\n.\n",
        b"\n.\r\n",
        b"\r.\r",
        b"\r\n.\n",
        b"\r\n.\r",
        b"\r.\r\n",
        b"\n.\r",
        b"\r\n\x00.\r\n",
        b"\r\n.\x00\r\n",
        b"\r\r\n.\r\r\n",
    ],
)
def test_only_crlf_dot_crlf_ends_data(end: bytes) -> None:
    client = Client()
    client.begin()
    assert client.say(b"DATA\r\nhello" + end + SMUGGLED + b"\r\n.\r\n") == "354 250"
    [message] = client.messages
    assert b"evil@example.com" in message.data


def test_bare_line_ends_in_data_stay() -> None:
    client = Client()
    client.begin()
    client.say(b"DATA\r\na\nb\rc\x00d\r\n.\r\n")
    assert client.messages[0].data == b"a\nb\rc\x00d\r\n"


@pytest.mark.parametrize("line", [b"NOOP\nQUIT", b"NOOP\rQUIT", b"NO\x00OP", b"NOOP \xff", b"\n"])
def test_a_command_with_bare_line_ends_or_strange_octets_is_an_error(line: bytes) -> None:
    client = Client()
    assert client.say(line + b"\r\n") == "500"
    assert client.say(b"NOOP\r\n") == "250"


def test_a_command_full_of_spaces_costs_no_more_than_another() -> None:
    def seconds(line: bytes) -> float:
        client, start = Client(), time.process_time()
        client.say(line * 10)
        return time.process_time() - start

    assert seconds(b"HELO x" + b" " * 4000 + b"x\r\n") < 50 * seconds(
        b"HELO x" + b"x" * 4001 + b"\r\n"
    )


def test_a_command_line_that_is_too_long_is_one_error() -> None:
    client = Client(Limits(command_line=100))
    assert client.say(b"NOOP " + b"x" * 94) == ""
    assert client.say(b"x" * 1000) == ""
    assert client.say(b"\r\nNOOP\r\n") == "500 250"


def test_a_message_that_is_too_big_is_refused_and_the_session_goes_on() -> None:
    client = Client(Limits(message=10))
    client.begin()
    assert client.say(b"DATA\r\n12345678\r\n.\r\n") == "354 250"
    client.begin()
    assert client.say(b"DATA\r\n123456789\r\n.\r\n") == "354 552"
    client.begin()
    assert client.say(b"BDAT 11\r\n123456789\r\nBDAT 1 LAST\r\nx") == "552 552"
    assert client.say(b"MAIL FROM:<a@example.com> SIZE=11\r\n") == "552"
    assert client.say(b"MAIL FROM:<a@example.com> SIZE=10\r\n") == "250"
    assert [message.data for message in client.messages] == [b"12345678\r\n"]
    refused = [event for event in client.events if isinstance(event, Refused)]
    assert [event.recipients for event in refused] == [("b@example.org",)] * 2 + [()]


def test_a_message_of_exactly_the_limit_arrives_whole_however_it_is_split() -> None:
    for size in range(1, 12):
        client = Client(Limits(message=10))
        client.begin()
        data = b"DATA\r\n12345678\r\n.\r\n"
        for start in range(0, len(data), size):
            client.say(data[start : start + size])
        assert client.messages[0].data == b"12345678\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"." * 8 + b"\r\n",
        b".\r\n" * 3 + b"x",
        b".\r\nx\r\n.\r\n.",
        b".x\r\n..\r\n\r\n",
        b"\r\n.\n.\r.\r\n.",
    ],
)
def test_size_counts_content_and_no_dots_that_were_stuffed(data: bytes) -> None:
    """RFC 1870 4: 552 when the content is larger than announced, and only then."""
    data = data.removesuffix(b"\r\n") + b"\r\n"
    stuffed = (b"\r\n" + data).replace(b"\r\n.", b"\r\n..")[2:]
    stream = b"DATA\r\n" + stuffed + b".\r\nNOOP\r\n"
    fits, less = len(data), len(data) - 1
    for limits, heard in (
        (Limits(message=fits), "354 250 250"),
        (Limits(message=fits, read_through=fits), "354 250 250"),
        (Limits(message=less), "354 552 250"),
        (Limits(message=less, read_through=less), "354 421"),
    ):
        for size in range(1, len(stream) + 1):
            client = Client(limits)
            client.begin()
            said = [client.say(stream[at : at + size]) for at in range(0, len(stream), size)]
            assert " ".join(filter(None, said)) == heard, (limits, size)
            assert [one.data for one in client.messages] == [data] * (limits.message == fits)


def test_memory_is_bounded_while_stuffed_dots_come() -> None:
    client = Client(Limits(message=3000))
    client.begin()
    client.say(b"DATA\r\n")
    for _ in range(20_000):
        client.say(b"..\r\n")
        assert len(client.receiver._content) <= 4020
    assert client.say(b".\r\n") == "552"


def test_a_text_line_that_is_too_long() -> None:
    client = Client(Limits(text_line=1000))
    client.begin()
    assert client.say(b"DATA\r\n" + b"x" * 998 + b"\r\n.\r\n") == "354 250"
    client.begin()
    assert client.say(b"DATA\r\nshort\r\n" + b"x" * 999 + b"\r\n.\r\n") == "354 554"
    client.begin()
    assert client.say(b"BDAT 1002 LAST\r\n" + b"x" * 1002) == "554"


def test_too_many_recipients_are_deferred() -> None:
    client = Client(Limits(recipients=2))
    client.begin("a@example.org", "b@example.org")
    assert client.say(b"RCPT TO:<c@example.org>\r\n") == "452"
    assert client.say(b"DATA\r\nx\r\n.\r\n") == "354 250"
    assert client.messages[0].envelope.recipients == ("a@example.org", "b@example.org")


def test_recipients_elsewhere_are_refused_and_a_session_goes_on() -> None:
    client = Client()
    client.begin()
    assert client.say(b"RCPT TO:<b@example.net>\r\n") == "550"
    assert client.say(b"RCPT TO:<@example.org:b@example.net>\r\n") == "550"
    assert client.say(b"RCPT TO:<b@[127.0.0.1]>\r\n") == "550"
    assert client.say(b"DATA\r\nx\r\n.\r\n") == "354 250"
    assert client.messages[0].envelope.recipients == ("b@example.org",)


def test_data_with_no_valid_recipient_ends_the_transaction() -> None:
    client = Client()
    client.say(b"EHLO p\r\n")
    assert client.say(b"MAIL FROM:<>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n") == "250 550 554"
    assert client.say(b"MAIL FROM:<>\r\n") == "250"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (b"MAIL FROM:<>", "250"),
        (b"mail from: <a@example.com>", "250"),
        (b'MAIL FROM:<"a b\\" >"@example.com>', "250"),
        (b"MAIL FROM:<@x.example,@y.example:a@example.com>", "250"),
        (b"MAIL FROM:<a@[IPv6:::1]>", "250"),
        (b"MAIL FROM:<a@example.com> BODY=8BITMIME SIZE=5 RET=HDRS ENVID=x+2By", "250"),
        ("MAIL FROM:<用户@例え.example> SMTPUTF8".encode(), "250"),
        ("MAIL FROM:<用户@例え.example>".encode(), "553"),
        (b"MAIL FROM:a@example.com", "501"),
        (b"MAIL FROM:<a@example.com", "501"),
        (b"MAIL FROM:<a b@example.com>", "501"),
        (b"MAIL TO:<a@example.com>", "501"),
        (b"MAIL", "501"),
        (b"MAIL FROM:<a@example.com>SIZE=5", "501"),
        (b"MAIL FROM:<a@example.com> SIZE=x", "501"),
        (b"MAIL FROM:<a@example.com> SIZE=1 SIZE=1", "501"),
        (b"MAIL FROM:<a@example.com> BODY=BINARYMIME", "501"),
        (b"MAIL FROM:<a@example.com> AUTH=<>", "555"),
        (b"MAIL FROM:<a@example.com> =x", "501"),
        (b"EXPN list", "502"),
        (b"ATRN example.org", "502"),
        (b"DATA", "503"),
        (b"RCPT TO:<b@example.org>", "503"),
        (b"GET / HTTP/1.1", "500"),
    ],
)
def test_commands_between_transactions(command: bytes, code: str) -> None:
    client = Client()
    client.say(b"EHLO p\r\n")
    assert client.say(command + b"\r\n") == code


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (b"RCPT TO:<Postmaster>", "250"),
        (b"RCPT TO:<b@example.org> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b@example.org", "250"),
        (b"RCPT TO:<b@example.org> NOTIFY=NEVER", "250"),
        (b"RCPT TO:<b@example.org> NOTIFY=NEVER,FAILURE", "501"),
        ("RCPT TO:<b@example.org> NOTIFY=\u017fUCCESS".encode(), "501"),
        (b"RCPT TO:<>", "501"),
        (b"RCPT TO:<b>", "501"),
        (b"MAIL FROM:<a@example.com>", "503"),
        (b"EHLO", "501"),
        (b"RSET", "250"),
        (b"RSET x", "501"),
        (b"DATA x", "501"),
    ],
)
def test_commands_in_a_transaction(command: bytes, code: str) -> None:
    client = Client()
    client.begin()
    assert client.say(command + b"\r\n") == code


def test_only_a_space_separates_parameters() -> None:
    client = Client()
    client.begin()
    assert (
        client.say("RCPT TO:<c@example.org> ORCPT=utf-8;a\u00a0NOTIFY=NEVER\r\n".encode()) == "501"
    )
    assert client.say("RCPT TO:<c@example.org>  ORCPT=utf-8;a\u00a0b\r\n".encode()) == "250"


def test_rset_and_ehlo_forget_the_transaction() -> None:
    for command in (b"RSET\r\n", b"EHLO again\r\n"):
        client = Client()
        client.begin()
        assert client.say(command) == "250"
        assert client.say(b"DATA\r\n") == "503"


def test_mail_before_ehlo() -> None:
    assert Client().say(b"MAIL FROM:<a@example.com>\r\n") == "503"


def test_too_many_errors_end_the_session() -> None:
    client = Client(Limits(errors=3))
    assert client.say(b"A\r\nB\r\nC\r\nNOOP\r\n") == "500 500 421"
    assert client.receiver.closed
    assert client.say(b"NOOP\r\n") == ""


def test_policy_refusals_are_no_errors() -> None:
    client = Client(Limits(errors=3))
    client.begin()
    for _ in range(10):
        assert client.say(b"RCPT TO:<x@example.net>\r\n") == "550"


def test_nothing_is_heard_after_quit() -> None:
    client = Client()
    assert client.say(b"QUIT\r\nNOOP\r\n") == "221"
    assert client.say(b"NOOP\r\n") == ""


# -- any split, any bytes ------------------------------------------------------------------------

LINES = [
    b"EHLO provider.example.net\r\n",
    b"HELO x\r\n",
    b"MAIL FROM:<a@example.com>\r\n",
    b"MAIL FROM:<> SIZE=40 PRDR\r\n",
    b"RCPT TO:<b@example.org>\r\n",
    b"RCPT TO:<c@example.org> NOTIFY=NEVER\r\n",
    b"RCPT TO:<d@example.net>\r\n",
    b"DATA\r\n",
    b"BDAT 7\r\n",
    b"BDAT 3 LAST\r\n",
    b"BDAT 60 LAST\r\n",
    b"BDAT 0 LAST\r\n",
    b".\r\n",
    b"..\r\n",
    b"\r\n.\r\n",
    b"\n.\n",
    b"Subject: x\r\n\r\nhello\r\n.\r\n",
    b"x" * 45,
    b"RSET\r\n",
    b"NOOP\r\n",
    b"QUIT\r\n",
    b"\r",
    b"\n",
    b"\x00\xff",
]
STREAMS = st.lists(st.one_of(st.sampled_from(LINES), st.binary(max_size=30)), max_size=40).map(
    b"".join
)
SMALL = Limits(message=50, command_line=60, text_line=40, recipients=2, errors=6)


def outcome(client: Client) -> tuple[bytes, list[object]]:
    seen: list[object] = [
        (event.envelope, event.data) if isinstance(event, Transaction) else event
        for event in client.events
    ]
    return client.heard, seen


@given(STREAMS, st.lists(st.integers(1, 50), min_size=1))
@settings(max_examples=500)
def test_any_split_of_the_bytes_gives_the_same_events_and_replies(
    stream: bytes, sizes: list[int]
) -> None:
    whole, pieces, single = Client(SMALL), Client(SMALL), Client(SMALL)
    whole.say(stream)
    start, turn = 0, 0
    while start < len(stream):
        size = sizes[turn % len(sizes)]
        pieces.say(stream[start : start + size])
        start, turn = start + size, turn + 1
    for octet in stream:
        single.say(bytes([octet]))
    assert outcome(whole) == outcome(pieces) == outcome(single)


@given(st.lists(st.binary(max_size=200), max_size=60), STREAMS)
def test_arbitrary_bytes_never_raise_and_never_outgrow_the_limits(
    noise: list[bytes], stream: bytes
) -> None:
    client = Client(SMALL)
    client.say(stream)
    for data in noise:
        client.say(data)
        held = len(client.receiver._buffer) + len(client.receiver._content)
        assert held <= SMALL.message + SMALL.command_line + 200
    for event in client.events:
        if isinstance(event, Transaction):
            assert len(event.data) <= SMALL.message
            assert 1 <= len(event.envelope.recipients) <= SMALL.recipients


@given(st.binary(max_size=300), st.lists(st.integers(1, 60), min_size=1))
def test_any_content_arrives_unchanged_by_data_and_by_bdat(
    content: bytes, sizes: list[int]
) -> None:
    """What a client stuffs and we unstuff is what it had; BDAT needs no stuffing at all."""
    text = content.replace(b"\r", b"\n").replace(b"\n", b"\r\n") + b"\r\n"
    stuffed = (b"\r\n" + text).replace(b"\r\n.", b"\r\n..")[2:]
    for stream, expected in (
        (b"DATA\r\n" + stuffed + b".\r\n", text),
        (b"BDAT %d LAST\r\n" % len(content) + content, content),
    ):
        client = Client()
        client.begin()
        start, turn = 0, 0
        while start < len(stream):
            size = sizes[turn % len(sizes)]
            client.say(stream[start : start + size])
            start, turn = start + size, turn + 1
        assert [message.data for message in client.messages] == [expected]


def test_no_handshake_while_a_message_waits_for_its_answer() -> None:
    """What is said to the message would come after the 220, and be read as said under TLS."""
    receiver = Receiver("h", Limits(), only_example, starttls=True)
    data = b"EHLO p\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nBDAT 1 LAST\r\nxSTARTTLS\r\n"
    [event] = transactions(receiver.receive_bytes(data))
    receiver.answer(event, OK)
    assert receiver.advance() == []
    assert codes(receiver.data_to_send()) == "220 250 250 250 250 503"


@pytest.mark.parametrize("machine", [Receiver, Turn])
def test_no_row_of_the_table_passes_over_a_method_of_its_own(machine: type[Commands]) -> None:
    for verb in machine.VERBS.values():
        assert getattr(machine, verb.run.__name__) is verb.run
    for reader in machine.READERS.values():
        assert getattr(machine, reader.__name__) is reader


@pytest.mark.parametrize(
    "mail", [b"MAIL FROM:<a@example.com> SIZE=999999999\r\n", b"MAIL FROM:<a@example.com> X=1\r\n"]
)
@pytest.mark.parametrize("data", [b"DATA\r\n", b"BDAT 3 LAST\r\nx\r\n"])
def test_what_was_sent_ahead_for_a_refused_sender_is_no_error(mail: bytes, data: bytes) -> None:
    """RFC 2920 3.1: the client did not know yet.  The next message is taken."""
    client = Client()
    client.say(b"EHLO p\r\n")
    client.say(mail + b"RCPT TO:<b@example.org>\r\n" * 200 + data)
    assert [type(event) for event in client.events] == [Refused], "it is refused once"
    client.begin()
    assert client.say(b"BDAT 1 LAST\r\nx") == "250"
    assert len(client.messages) == 1


@pytest.mark.parametrize(
    "command",
    [
        b"MAIL FROM:<a@example.com> X=1\r\n",
        b"MAIL FROM:a@example.com\r\n",
        "MAIL FROM:<\xfc@example.com>\r\n".encode(),
        b"MAIL FROM:<>\r\nRCPT TO:<b>\r\n",
        b"MAIL FROM:<>\r\nRCPT TO:<b@example.org> X=1\r\n",
    ],
)
def test_an_address_that_is_refused_for_its_form_counts_as_refused(command: bytes) -> None:
    client = Client()
    client.say(b"EHLO p\r\n" + command)
    [event] = client.events
    assert isinstance(event, Refused) and event.reply.permanent
