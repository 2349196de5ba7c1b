"""Handing mail on by LMTP and SMTP: to servers as they should be, and to hostile ones.

A 250 of ours without theirs would lose mail; each test of a hostile server ends with a 451.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from salmon import queue
from support.collecting import exchange
from support.nexthop import Call, Script, deliver, load, next_host
from support.salmon import Salmon
from support.tls import server_tls

from salmon_revsmtp import QueueConsumer
from salmon_revsmtp.handlers import nexthop
from salmon_revsmtp.smtp.envelope import Client, Envelope

KINDS = {"lmtp": "LHLO", "smtp": "EHLO"}

Server = Callable[..., str]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def new_connections(salmon: Salmon) -> Iterator[None]:
    """Connections are kept open between messages, but not between tests."""
    nexthop.next_hop.cache_clear()
    yield
    nexthop.next_hop.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, server: str, kind: str = "lmtp") -> None:
    load(monkeypatch, kind, **{f"{kind}_server": server})


def said(caplog: pytest.LogCaptureFixture, level: int = logging.ERROR) -> list[str]:
    """What the log says of the server."""
    texts = [(one.levelno, one.getMessage()) for one in caplog.records]
    return [text for number, text in texts if number >= level and "_server=" in text]


# -- as it should be -------------------------------------------------------------------------------


def test_a_message_goes_on_as_it_is(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    got: list[object] = []

    def script(call: Call) -> None:
        call.greet("SIZE", "8BITMIME", "CHUNKING", hello=KINDS[kind])
        got.append(call.asks("MAIL FROM:", "250 ok"))
        got.append(call.asks("RCPT TO:", "250 ok"))
        call.asks("DATA", "354 go ahead")
        got.append(call.data())
        call.say("250 2.0.0 saved")

    content = b"Subject: x\n\n.\n..x\n\xff\xfe \nFrom here\n\n"
    with next_host(script) as server:
        use(monkeypatch, server, kind)
        reply = deliver(content, "Bob@example.org", trace=b"Received: y\n")
    assert reply.code == 250
    wire = b"Received: y\r\nSubject: x\r\n\r\n..\r\n...x\r\n\xff\xfe \r\nFrom here\r\n\r\n\r\n"
    size = len(wire) - 2  # the dots that are not stuffed
    assert got == [
        f"MAIL FROM:<ann@example.net> SIZE={size} BODY=8BITMIME",
        *("RCPT TO:<Bob@example.org>", wire),
    ]


def test_a_bounce_keeps_its_null_sender(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    heard = []

    def script(call: Call) -> None:
        call.greet(hello=KINDS[kind])
        heard.append(call.asks("MAIL", "250 ok"))
        call.asks("RCPT", "550 5.7.1 no")
        call.asks("RSET", "250 ok")

    with next_host(script) as server:
        use(monkeypatch, server, kind)
        assert deliver(b"From: mailer@example.net\n\nx", sender="").code == 550
    assert heard == ["MAIL FROM:<>"]


def test_a_large_message_is_whole(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    got = []

    def script(call: Call) -> None:
        call.greet("PIPELINING", hello=KINDS[kind])
        got.append(call.message())

    lines = b"".join(b".%d\n" % number for number in range(200_000))
    with next_host(script) as server:
        use(monkeypatch, server, kind)
        assert deliver(b"Subject: x\n\n" + lines[:-1]).code == 250
    assert got[0] == b"Subject: x\r\n\r\n" + lines.replace(b"\n", b"\r\n").replace(b".", b"..")


def test_a_unix_socket(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(call: Call) -> None:
        call.greet()
        call.message()

    with next_host(script, path="socket") as server:
        assert server == "unix:socket"
        use(monkeypatch, server)
        assert deliver().code == 250


@pytest.mark.parametrize("extensions", [(), ("PIPELINING",)])
@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA", "the message"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("550 5.1.1 no <bob@example.org> here", "550 5.1.1 no <bob@example.org> here"),
        ("452 4.2.2 over quota", "452 4.2.2 over quota"),
        ("450-4.2.0 try\r\n450 4.2.0 later", "450 4.2.0 try later"),
        ("552 no code", "552 5.0.0 no code"),
        # What they mean is that we are not to talk to them, and not that the mail is to bounce.
        ("530 5.7.0 authentication required", "451 4.3.5 "),
        ("503 5.5.1 bad sequence", "451 4.3.5 "),
        ("504 5.5.4 parameter not implemented", "451 4.3.5 "),
        ("555 5.5.4 unsupported option", "451 4.3.5 "),
        # And these are about an address.
        (
            "504 5.5.2 <root@nas>: Sender address rejected: need fully-qualified address",
            "504 5.5.2",
        ),
        ("555 5.1.3 bad syntax", "555 5.1.3 "),
    ],
)
def test_their_reply_becomes_ours(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    theirs: str,
    ours: str,
    extensions: tuple[str, ...],
) -> None:
    def script(call: Call) -> None:
        call.greet(*extensions)
        for command in ("MAIL", "RCPT", "DATA"):
            refused = command == step
            call.asks(command, theirs if refused else "354 go" if command == "DATA" else "250 ok")
            if refused and extensions and command == "RCPT":
                call.asks("DATA", "503 5.5.1 no recipient")
            elif refused and extensions and command == "MAIL":
                call.asks("RCPT", "503 5.5.1 no sender")
                call.asks("DATA", "503 5.5.1 no recipient")
            if refused:
                break
        else:
            call.data()
            call.say(theirs)
        call.asks("RSET", "250 ok")
        call.message()  # on the same connection

    with next_host(script) as server:
        use(monkeypatch, server)
        assert str(deliver()).startswith(ours)
        assert deliver().code == 250
    assert salmon.undeliverable() == []


def test_a_connection_is_used_again(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    got: list[bytes] = []

    def script(call: Call) -> None:
        call.greet(hello=KINDS[kind])
        got.extend(call.message() for _ in range(3))

    with next_host(script) as server:
        use(monkeypatch, server, kind)
        assert [deliver(b"\n%d" % one).code for one in range(3)] == [250, 250, 250]
    assert got == [b"\r\n0\r\n", b"\r\n1\r\n", b"\r\n2\r\n"]


def test_an_idle_connection_is_closed_with_a_word(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: Call) -> None:
        call.greet()
        call.message()
        call.hear("QUIT")
        call.silence()

    monkeypatch.setattr(nexthop, "IDLE", 0.05)
    with next_host(script) as server:
        use(monkeypatch, server)
        assert deliver().code == 250


@pytest.mark.parametrize("listed", ["XFORWARD NAME ADDR PORT PROTO HELO", "XCLIENT ADDR"])
def test_the_original_client_is_told_where_that_is_offered(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    heard = []

    def script(call: Call) -> None:
        call.greet(listed)
        if listed.startswith("XFORWARD"):
            heard.append(call.asks("XFORWARD", "250 ok"))
        call.message()

    client = Client("203.0.113.9", 41234, "mail.example.com", "ESMTP", "helo.example.com")
    with next_host(script) as server:
        use(monkeypatch, server)
        assert deliver(client=client).code == 250
    attributes = "NAME=mail.example.com ADDR=203.0.113.9 PORT=41234 PROTO=ESMTP"
    assert heard in ([], [f"XFORWARD {attributes} HELO=helo.example.com"])
    assert bool(heard) is listed.startswith("XFORWARD")


def test_utf8_goes_where_it_is_taken(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def script(call: Call) -> None:
        call.greet("SMTPUTF8", "8BITMIME")
        heard.append(call.asks("MAIL", "250 ok"))
        heard.append(call.asks("RCPT", "250 ok"))
        call.asks("DATA", "354 go")
        call.data()
        call.say("250 ok")

    with next_host(script) as server:
        use(monkeypatch, server)
        options = {"SMTPUTF8": ""}
        assert deliver(recipient="jos\u00e9@b\u00fccher.example", mail_options=options).code == 250
    assert heard == [
        "MAIL FROM:<ann@example.net> SMTPUTF8",
        "RCPT TO:<jos\u00e9@xn--bcher-kva.example>",
    ]


def test_utf8_goes_nowhere_else(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def script(call: Call) -> None:
        call.greet("8BITMIME")
        heard.append(call.asks("MAIL", "250 ok"))
        heard.append(call.asks("RCPT", "250 ok"))
        call.asks("DATA", "354 go")
        call.data()
        call.say("250 ok")

    with next_host(script) as server:
        use(monkeypatch, server)
        options = {"SMTPUTF8": ""}
        refused = deliver(recipient="jos\u00e9@example.org", mail_options=options)
        assert str(refused).startswith("553 5.6.7 ")
        refused = deliver("Subject: \u00e9\n\nx".encode(), mail_options=options)
        assert str(refused).startswith("553 5.6.7 ")
        # Nothing in it needs it but the word of its sender.
        taken = deliver(recipient="bob@b\u00fccher.example", mail_options=options)
        assert taken.code == 250
    assert heard == ["MAIL FROM:<ann@example.net>", "RCPT TO:<bob@xn--bcher-kva.example>"]


def test_eight_bits_are_refused_where_they_are_not_taken(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with next_host(lambda call: call.greet()) as server:
        use(monkeypatch, server)
        assert str(deliver(b"Subject: x\n\n\xff")).startswith("554 5.6.3 ")


def test_no_dot_that_is_hidden_by_nuls(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    with next_host() as server:
        use(monkeypatch, server)
        assert str(deliver(b"Subject: x\n\nhello\n\0.\nMAIL FROM:<eve@example.com>")) == (
            "554 5.6.0 a line of the message is a dot hidden by NULs"
        )


# -- tls -------------------------------------------------------------------------------------------


def test_tls_where_it_is_offered_by_another_machine(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexthop._Dialogue, "_is_near", lambda self: False)

    def script(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.asks("STARTTLS", "220 go ahead")
        with server_tls().wrap_socket(call.socket, server_side=True) as encrypted:
            call = Call(encrypted)
            call.asks("EHLO", "250 next.example.org")
            call.message()
            call.message()

    with next_host(script) as server:
        use(monkeypatch, server, "smtp")
        assert [deliver().code, deliver().code] == [250, 250]


def test_tickets_that_follow_a_handshake_are_no_words_out_of_turn(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nexthop._Dialogue, "_is_near", lambda self: False)
    begin = nexthop._Dialogue._begin_tls

    def begun_and_waited(dialogue: nexthop._Dialogue, until: float) -> None:
        begin(dialogue, until)
        poll = select.poll()
        poll.register(dialogue.fileno(), select.POLLIN)
        assert poll.poll(20_000), "the tickets"

    monkeypatch.setattr(nexthop._Dialogue, "_begin_tls", begun_and_waited)

    def script(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.asks("STARTTLS", "220 go ahead")
        with server_tls().wrap_socket(call.socket, server_side=True) as encrypted:
            call = Call(encrypted)
            call.asks("EHLO", "250 next.example.org")
            call.message()

    with next_host(script) as server:
        use(monkeypatch, server, "smtp")
        assert deliver().code == 250


def test_tls_that_fails_is_done_without(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nexthop._Dialogue, "_is_near", lambda self: False)

    def broken(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.asks("STARTTLS", "220 go ahead")
        assert call.socket.recv(1), "a handshake begins"
        call.say("no TLS")

    def script(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.message()

    with next_host(broken, script) as server:
        use(monkeypatch, server, "smtp")
        assert deliver().code == 250
    [line] = said(caplog, logging.WARNING)
    assert "TLS failed" in line and line.endswith("calling again in the clear")


def test_tls_is_tried_again_after_a_while(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    """One handshake that fails, which anyone in between can see to, is not the end of it."""
    monkeypatch.setattr(nexthop._Dialogue, "_is_near", lambda self: False)
    monkeypatch.setattr(nexthop, "CLEAR", 0.0)

    def broken(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.asks("STARTTLS", "220 go ahead")
        assert call.socket.recv(1), "a handshake begins"
        call.say("no TLS")

    def clear(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.message()

    def encrypts(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.asks("STARTTLS", "220 go ahead")
        with server_tls().wrap_socket(call.socket, server_side=True) as encrypted:
            call = Call(encrypted)
            call.asks("EHLO", "250 next.example.org")
            call.message()

    with next_host(broken, clear, encrypts) as server:
        use(monkeypatch, server, "smtp")
        assert [deliver().code, deliver().code] == [250, 250]


def test_what_comes_with_the_answer_to_starttls_is_no_reply(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is in between has put it there (CVE-2011-0411)."""
    monkeypatch.setattr(nexthop._Dialogue, "_is_near", lambda self: False)

    def script(call: Call) -> None:
        call.greet("STARTTLS", hello="EHLO")
        call.asks("STARTTLS", "220 go ahead\r\n250 next.example.org")
        call.silence()

    with next_host(script) as server:
        use(monkeypatch, server, "smtp")
        assert deliver().code == 451
    [line] = said(caplog)
    assert "more came with the answer to STARTTLS" in line


# -- a server that is not there, or goes away ------------------------------------------------------


def test_a_server_that_is_down_is_said_once(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.INFO)
    with next_host() as server:
        pass
    use(monkeypatch, server, kind)
    assert [str(deliver())[:9] for _ in range(3)] == 3 * ["451 4.4.1"]
    [line] = said(caplog)
    assert line == (
        f"{kind}_server={server} Connection refused; mail for it is answered with 451, and its "
        "senders keep it"
    )
    assert salmon.undeliverable() == []


def test_a_server_that_is_there_again_is_said_and_used(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    use(monkeypatch, "unix:socket")
    assert [deliver().code, deliver().code] == [451, 451]

    def script(call: Call) -> None:
        call.greet()
        call.message()
        call.message()

    with next_host(script, path="socket"):
        assert [deliver().code, deliver().code] == [250, 250]
    assert deliver().code == 451
    assert [line.partition(" ")[2].partition(";")[0] for line in said(caplog, logging.INFO)] == [
        *("No such file or directory", "takes mail again", "Connection refused"),
    ]


def test_another_trouble_is_said_too_but_not_for_each_message(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(monkeypatch, "unix:socket")
    monkeypatch.setattr(nexthop, "SILENCE", 0.0)
    assert deliver().code == 451

    def script(words: str) -> Script:
        return lambda call: call.say(words)

    monkeypatch.setattr(nexthop, "SILENCE", 60.0)
    with next_host(*(script(f"{one} is no reply") for one in "abc"), path="socket"):
        assert [deliver().code for _ in range(3)] == [451, 451, 451]
    lines = [line.partition(" ")[2].partition(";")[0] for line in said(caplog)]
    assert lines == ["No such file or directory", "b'a is no reply' is no SMTP reply"]


def test_one_that_hangs_up_at_once(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Who it was cannot be asked any more."""
    connect, made = nexthop.Server.connect, []
    connected = threading.Event()

    def hangs_up(call: Call) -> None:
        assert connected.wait(60)
        call.reset()

    def connect_and_wait(server: nexthop.Server) -> socket.socket:
        made.append(connect(server))
        connected.set()
        poll = select.poll()
        poll.register(made[-1], 0)
        while not poll.poll(20_000)[0][1] & select.POLLHUP:  # the error is there a moment before
            pass
        return made[-1]

    monkeypatch.setattr(nexthop.Server, "connect", connect_and_wait)
    with next_host(hangs_up) as server:
        use(monkeypatch, server, kind)
        assert str(deliver()).startswith("451 4.4.1 ")
    assert salmon.undeliverable() == []
    assert [one.fileno() for one in made] == [-1]


@pytest.mark.parametrize("host", ["mail..lan", "x" * 64 + ".lan", "\ud800"])
def test_a_host_that_is_none(salmon: Salmon, host: str) -> None:
    hop = nexthop.NextHop("smtp", nexthop.Server(host, 25), "us.example.org", 60.0)
    envelope = Envelope("ann@example.net", ("bob@example.org",))
    assert str(hop.hand_on(envelope, b"Subject: x\n\n")).startswith("451 4.4.1 ")


def test_a_machine_without_a_thread_to_spare_takes_back_no_250(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(timer: threading.Timer) -> None:
        raise RuntimeError("can't start new thread")

    def once(call: Call) -> None:
        call.greet()
        call.message()
        call.hear("QUIT")

    def twice(call: Call) -> None:
        call.greet()
        call.message()
        call.message()

    with next_host(once, once, twice) as server:
        use(monkeypatch, server)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Timer, "start", no_thread)
            assert [deliver().code, deliver().code] == [250, 250]
        # There are threads again, and connections are kept as before.
        assert [deliver().code, deliver().code] == [250, 250]
    assert salmon.undeliverable() == []


def test_a_kept_connection_that_has_been_closed_under_us_costs_nothing(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def script(call: Call) -> None:
        call.greet()
        call.message()
        call.silence()

    dialogues: list[nexthop._Dialogue] = []

    def greeted(dialogue: nexthop._Dialogue, until: float) -> None:
        dialogues.append(dialogue)
        greet(dialogue, until)

    greet = nexthop._Dialogue.greet
    monkeypatch.setattr(nexthop._Dialogue, "greet", greeted)
    with next_host(script, script) as server:
        use(monkeypatch, server)
        assert deliver().code == 250
        dialogues[0]._socket.close()
        assert deliver().code == 250
        dialogues[1]._socket.close()
    assert salmon.undeliverable() == []


@pytest.mark.parametrize("step", ["connect", "greet", "send", "rest"])
@pytest.mark.parametrize("error", [OSError("odd"), ValueError("odd"), UnicodeError("odd")])
def test_nothing_that_the_network_raises_makes_mail_undeliverable(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    def script(call: Call) -> None:
        with contextlib.suppress(AssertionError, ConnectionError):
            call.greet()
            call.message()

    owner = nexthop.Server if step == "connect" else nexthop._Dialogue
    monkeypatch.setattr(owner, step, fails)
    with next_host(*[script] * (step != "connect")) as server:
        use(monkeypatch, server)
        assert deliver().code == (250 if step == "rest" else 451)
    assert salmon.undeliverable() == []


@pytest.mark.parametrize("goodbye", ["", "421 4.4.2 idle for too long"])
@pytest.mark.parametrize("reset", [True, False])
def test_a_connection_that_was_closed_meanwhile_costs_nothing(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    goodbye: str,
    reset: bool,
) -> None:
    closed = threading.Event()

    def closes(call: Call) -> None:
        call.greet()
        call.message()
        if goodbye:
            call.say(goodbye)
        call.reset() if reset else call.close()
        closed.set()

    def script(call: Call) -> None:
        call.greet()
        call.message()

    with next_host(closes, script) as server:
        use(monkeypatch, server)
        assert deliver().code == 250
        assert closed.wait(60)
        assert deliver().code == 250
    assert said(caplog) == []


@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA", "the content"])
@pytest.mark.parametrize("says", ["", "421 4.3.2 shutting down"])
def test_one_that_closes_before_the_end_is_called_again_once(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, step: str, says: str
) -> None:
    """Of a connection that was used before: it may have been closed for its age."""

    def closes(call: Call) -> None:
        call.greet()
        call.message()
        closes_at(call, step, says)

    def script(call: Call) -> None:
        call.greet()
        call.message()

    large = b"Subject: x\n\n" + b"x" * 40_000_000 if step == "the content" else b"\nx"
    with next_host(closes, script) as server:
        use(monkeypatch, server)
        assert [deliver().code, deliver(large).code] == [250, 250]


def closes_at(call: Call, step: str, says: str) -> None:
    for command in ("MAIL", "RCPT", "DATA"):
        if command == step:
            call.hear(command)
            if says:
                call.say(says)
            return
        call.asks(command, "354 go" if command == "DATA" else "250 ok")
    call.hear("Subject")
    if says:
        call.say(says)
    call.reset()


def test_one_that_closes_each_time_is_called_twice_only(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def first(call: Call) -> None:
        call.greet()
        call.message()
        call.hear("MAIL")

    def second(call: Call) -> None:
        call.greet()
        call.hear("MAIL")

    with next_host(first, second) as server:
        use(monkeypatch, server)
        assert [deliver().code, deliver().code] == [250, 451]
    [line] = said(caplog)
    assert "it closed the connection; mail for it is answered with 451" in line


@pytest.mark.parametrize("used_before", [True, False])
def test_a_message_that_may_have_been_taken_is_not_sent_again_by_us(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, used_before: bool
) -> None:
    def takes_and_drops(call: Call) -> None:
        call.greet()
        if used_before:
            call.message()
        call.up_to_data()
        call.data()
        call.reset()

    with next_host(takes_and_drops) as server:
        use(monkeypatch, server)
        codes = [deliver().code for _ in range(1 + used_before)]
    assert codes == [*([250] * used_before), 451]


# -- hostile ones ----------------------------------------------------------------------------------


def never_greets(call: Call) -> None:
    call.silence()


def endless(call: Call) -> None:
    call.say("220 hello")
    call.hear()
    for number in itertools.count():
        try:
            call.say(f"250-{number} and more")
        except OSError:
            return


def endless_reply_to_the_message(call: Call) -> None:
    call.greet()
    call.up_to_data()
    call.data()
    for number in itertools.count():
        try:
            call.say(f"250-{number} and more")
        except OSError:
            return


def huge_line(call: Call) -> None:
    call.greet()
    call.up_to_data()
    call.data()
    try:
        call.socket.sendall(b"250 " + b"x" * 10_000_000)
    except OSError:
        return


def huge_greeting(call: Call) -> None:
    try:
        call.socket.sendall(b"x" * 10_000_000)
    except OSError:
        return


def a_reply_for_each_of_two(call: Call) -> None:
    call.greet()
    call.asks("MAIL", "250 ok")
    call.asks("RCPT", "250 ok\r\n250 ok")
    call.silence()


def two_replies_to_a_pipeline(call: Call) -> None:
    call.greet("PIPELINING", "CHUNKING")
    call.hear("MAIL")
    call.hear("RCPT")
    call.hear("DATA")
    call.say("250 ok\r\n250 ok\r\n250 ok\r\n354 go")
    call.silence()


def says_yes_before_the_data(call: Call) -> None:
    call.greet()
    call.asks("MAIL", "250 ok")
    call.asks("RCPT", "250 ok")
    call.asks("DATA", "354 go\r\n250 2.0.0 saved")
    call.silence()


def says_yes_instead_of_go_on(call: Call) -> None:
    call.greet()
    call.asks("MAIL", "250 ok")
    call.asks("RCPT", "250 ok")
    call.asks("DATA", "250 2.0.0 saved")
    call.silence()


def half_a_reply(call: Call) -> None:
    call.greet()
    call.up_to_data()
    call.data()
    call.socket.sendall(b"250 2.0.0 sa")


def half_of_many_lines(call: Call) -> None:
    call.greet()
    call.up_to_data()
    call.data()
    call.say("250-2.0.0 saved")


def another_code(call: Call) -> None:
    call.greet()
    call.up_to_data()
    call.data()
    call.say("250-2.0.0 saved", "550 5.0.0 or not")
    call.silence()


def goes_on_and_on(call: Call) -> None:
    call.greet()
    call.up_to_data()
    call.data()
    call.say("354 more")
    call.silence()


def is_a_web_server(call: Call) -> None:
    call.say("HTTP/1.1 400 Bad Request", "")
    call.silence()


def has_no_service(call: Call) -> None:
    call.say("554 5.7.1 go away")
    call.silence()


def closes_at_once(call: Call) -> None:
    call.say("421 4.3.2 too busy")
    call.silence()


def does_not_know_lhlo(call: Call) -> None:
    call.say("220 smtp.example.org ESMTP")
    call.asks("LHLO", "500 5.5.2 command not recognized")
    call.silence()


def never_354(call: Call) -> None:
    call.greet()
    call.asks("MAIL", "250 ok")
    call.asks("RCPT", "250 ok")
    call.hear("DATA")
    call.silence()


def never_ends(call: Call) -> None:
    call.greet()
    call.up_to_data()
    call.data()
    call.silence()


def drips(call: Call) -> None:
    """An octet at a time, and never a whole reply."""
    call.greet()
    call.up_to_data()
    call.data()
    with_space = b"250" + b" " * 8000
    for number in range(len(with_space)):
        try:
            call.socket.sendall(with_space[number : number + 1])
        except OSError:
            return
        time.sleep(0.01)


HOSTILE: list[Script] = [
    *(endless, endless_reply_to_the_message, huge_line, huge_greeting, a_reply_for_each_of_two),
    *(two_replies_to_a_pipeline, says_yes_before_the_data, says_yes_instead_of_go_on),
    *(half_a_reply, half_of_many_lines, another_code, goes_on_and_on, is_a_web_server),
    *(has_no_service, closes_at_once, does_not_know_lhlo),
]
SILENT: list[Script] = [never_greets, never_354, never_ends, drips]


@pytest.mark.parametrize("script", HOSTILE, ids=lambda script: script.__name__)
def test_a_hostile_server_has_never_taken_a_message(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: Script,
) -> None:
    with next_host(script) as server:
        use(monkeypatch, server)
        reply = deliver()
    assert str(reply) == "451 4.4.2 the next server does not take it now, try again later"
    [line] = said(caplog)
    assert line.startswith(f"lmtp_server={server} ") and len(line) < 1000
    assert salmon.undeliverable() == []


@pytest.mark.parametrize("script", SILENT, ids=lambda script: script.__name__)
def test_one_that_says_nothing_is_given_up_in_time_and_left_alone_for_a_while(
    salmon: Salmon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: Script,
) -> None:
    monkeypatch.setattr(nexthop, "REPLY", 0.3)
    with next_host(script) as server:
        load(
            *(monkeypatch, "lmtp"),
            lmtp_server=server,
            smtp_services={"default": {"handler_timeout": 1}},
        )
        began = time.monotonic()
        assert str(deliver()).startswith("451 4.4.2 ")
        assert time.monotonic() - began < 10  # a second, on a machine that has nothing else to do
        assert str(deliver()).startswith("451 4.4.1 ")  # and it is not called
    assert len(said(caplog)) == 1


def test_a_message_that_is_given_up_in_the_middle_ends_with_a_reset(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server, however lax, takes the part of it that has come for a message."""
    given_up = threading.Event()

    def stands_still(call: Call) -> None:
        call.greet()
        call.up_to_data()
        assert given_up.wait(60)
        with pytest.raises(ConnectionResetError):
            while call.socket.recv(1_000_000):
                pass

    with next_host(stands_still) as server:
        services = {"default": {"handler_timeout": 1}}
        load(monkeypatch, "lmtp", lmtp_server=server, smtp_services=services)
        assert deliver(b"Subject: x\n\n" + b"x" * 40_000_000).code == 451
        given_up.set()


def test_one_that_answers_twice_is_not_believed_the_next_time(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reply is not that to the next message."""

    def twice(call: Call) -> None:
        call.greet()
        call.message("250 2.0.0 saved\r\n250 2.0.0 saved")
        call.silence()

    def refuses(call: Call) -> None:
        call.greet()
        call.message("550 5.7.1 no")
        call.asks("RSET", "250 ok")

    with next_host(twice, refuses) as server:
        use(monkeypatch, server)
        assert [deliver().code, deliver().code] == [250, 550]


# -- in queue mode ---------------------------------------------------------------------------------


def test_the_consumer_keeps_what_the_next_server_defers_until_it_takes_it(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange(salmon, "b@example.org", delivery="queue")

    def defers(call: Call) -> None:
        call.greet()
        call.message("452 4.2.2 over quota")
        call.asks("RSET", "250 ok")
        call.message()

    with next_host(defers) as server:
        use(monkeypatch, server)
        QueueConsumer("run/inbound").start(one_shot=True)
        assert (len(queue.Queue("run/inbound")), salmon.undeliverable()) == (1, [])
        QueueConsumer("run/inbound").start(one_shot=True)
    assert (len(queue.Queue("run/inbound")), salmon.undeliverable()) == (0, [])


def test_the_consumer_tells_the_sender_of_what_the_next_server_refuses(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange(salmon, "b@example.org", delivery="queue")

    def refuses(call: Call) -> None:
        call.greet()
        call.asks("MAIL", "250 ok")
        call.asks("RCPT", "550 5.1.1 unknown")
        call.asks("RSET", "250 ok")

    with next_host(refuses) as server:
        use(monkeypatch, server)
        consumer = QueueConsumer("run/inbound", relay=lambda: salmon.relay)
        consumer.start(one_shot=True)
    [(_, to, text)] = salmon.relayed
    assert to == "ann@example.net" and "550 5.1.1 unknown" in text
    assert (len(queue.Queue("run/inbound")), salmon.undeliverable()) == (0, [])
