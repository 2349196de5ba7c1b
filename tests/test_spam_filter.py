"""The plugin of the page "A spam filter", and a server that answers as rspamd does, or does not."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiosmtplib
import pytest
from support.dialogue import Dialogue, no_more_mail
from support.messages import MESSAGE
from support.plugins import install, module
from support.project import Project, isp, one_message, provider
from support.salmon import Salmon
from support.servers import free_port
from support.world import World, in_the_world

from salmon_revsmtp import Envelope, Reply
from salmon_revsmtp.delivery.trace import AddedFields, Origin
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.smtp.envelope import Client

CONTENT = MESSAGE.replace(b"\r\n", b"\n").removesuffix(b"\n")
ENVELOPE = Envelope("ann@example.net", ("b@example.org",))

#: What a server does with a connection whose request it has read.
Answer = Callable[["Asked"], None]


class Asked(socketserver.StreamRequestHandler):
    """One request: its headers and its body."""

    server: Server

    def handle(self) -> None:
        line, *lines = iter(self.rfile.readline, b"\r\n")
        self.line = line.decode()
        headers = [line.decode().rstrip("\r\n").split(": ", 1) for line in lines]
        self.headers = [(name, value) for name, value in headers]
        self.body = self.rfile.read(int(dict(self.headers)["Content-Length"]))
        self.server.asked.append(self)
        with contextlib.suppress(OSError):  # it did not wait
            self.server.answer(self)

    def says(self, answer: object, status: str = "200 OK") -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)


class Server(socketserver.ThreadingTCPServer):
    """What stands where rspamd would be."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.answer = answer
        self.asked: list[Asked] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[Server]:
    with Server(answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def verdict(action: str | None, text: str | None = None, **keys: Any) -> Answer:
    said: dict[str, Any] = {
        "action": action,
        "score": 7.25,
        "required_score": 15,
        "symbols": {"R_SPF_FAIL": {"score": 1.0}, "RDNS_NONE": {"score": 2.0}},
        "messages": {} if text is None else {"smtp_message": text},
        **keys,
    }
    return lambda asked: asked.says(said)


@pytest.fixture
def rspamd(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's module."""
    found = module("rspamd", monkeypatch)
    found.from_environment.cache_clear()
    return found


def filtered(
    rspamd: Any, url: str, envelope: Envelope = ENVELOPE, content: bytes = CONTENT, **settings: Any
) -> tuple[Reply | None, list[str]]:
    """The plugin's reply, and the lines that it adds."""
    added = AddedFields()
    received = Origin("default", "mail.example.org").received(envelope, "b@example.org")
    reply = rspamd.Rspamd(url, **settings).check(envelope, received + content, added.add)
    return reply, added.lines.decode().splitlines()


# -- what it asks ----------------------------------------------------------------------------------


def question(rspamd: Any, envelope: Envelope, content: bytes = CONTENT) -> Asked:
    with serving(verdict("no action")) as server:
        filtered(rspamd, server.url, envelope, content)
    [asked] = server.asked
    return asked


def test_it_asks_about_the_client_and_not_about_us(rspamd: Any) -> None:
    client = Client("2001:db8::25", 4711, "mail.example.net", "ESMTP", "helo.example.net", "4bXk")
    envelope = Envelope("ann@example.net", ("b@example.org", "c@example.org"), client=client)
    asked = question(rspamd, envelope)
    assert asked.line == "POST /checkv2 HTTP/1.1\r\n"
    ours = [one for one in asked.headers if one[0] not in ("Host", "Accept-Encoding")]
    assert ours == [
        ("From", "<ann@example.net>"),
        ("Rcpt", "<b@example.org>"),
        ("Rcpt", "<c@example.org>"),
        ("IP", "2001:db8::25"),
        ("Hostname", "mail.example.net"),
        ("Helo", "helo.example.net"),
        ("Queue-Id", "4bXk"),
        ("Content-Length", str(len(CONTENT) + 1)),
    ]
    assert asked.body == CONTENT + b"\n", (
        "without our Received line, whose client may be the provider"
    )


@pytest.mark.parametrize("client", [None, Client()])
def test_of_a_client_that_is_not_known_it_says_nothing(rspamd: Any, client: Client | None) -> None:
    asked = question(rspamd, Envelope("", ("b@example.org",), helo="provider", client=client))
    names = [name for name, _ in asked.headers]
    assert ("From", "<>") in asked.headers
    assert not {"IP", "Hostname", "Helo", "Queue-Id", "User"} & set(names)


def test_the_line_of_the_server_before_ours_stays(rspamd: Any) -> None:
    theirs = b"Received: from x ([192.0.2.25])\n\tby mx.example.net\n" + CONTENT
    assert question(rspamd, ENVELOPE, theirs).body == theirs + b"\n"


@pytest.mark.parametrize(
    ("mailbox", "asked_for"),
    [
        ("gr\u00fc\u00dfe@b\u00fccher.example", "<gr??e@xn--bcher-kva.example>"),
        ("\u03b4@\u2603" + "\u00fc" * 100, "<?@?" + "?" * 100 + ">"),
        ("\U0001f600@example.org", "<?@example.org>"),
        ('"a b"@[192.0.2.1]', '<"a b"@[192.0.2.1]>'),
        ("a\u2028b\u0085\r\nIP: 127.0.0.1@example.net", "<a?b???IP: 127.0.0.1@example.net>"),
        ("postmaster", "<postmaster>"),
    ],
)
def test_addresses_are_asked_for_in_ascii(rspamd: Any, mailbox: str, asked_for: str) -> None:
    client = Client("192.0.2.25", helo="h\u00e4\r\nUser: root")
    asked = question(rspamd, Envelope(mailbox, (mailbox,), {"SMTPUTF8": ""}, client=client))
    assert [value for name, value in asked.headers if name in ("From", "Rcpt")] == [asked_for] * 2
    assert ("Helo", "h???User: root") in asked.headers
    assert "User" not in dict(asked.headers)


# -- what comes of the answer ----------------------------------------------------------------------

SCORE = ["X-Spam-Score: 7.25 / 15.00", "X-Spam-Symbols: R_SPF_FAIL, RDNS_NONE"]


@pytest.mark.parametrize(
    ("action", "text", "reply", "spam"),
    [
        ("no action", None, None, "No"),
        ("greylist", None, None, "No"),
        ("add header", None, None, "Yes"),
        ("rewrite subject", None, None, "Yes"),
        ("discard", None, None, "Yes"),
        ("reject", "Gtube pattern", Reply(550, "Gtube pattern", "5.7.1"), None),
        ("reject", None, Reply(550, "this looks like spam", "5.7.1"), None),
        ("soft reject", "Try again later", Reply(451, "Try again later", "4.7.1"), None),
        ("soft reject", "", Reply(451, "try again later", "4.7.1"), None),
    ],
)
def test_what_becomes_of_each_action(
    rspamd: Any, action: str, text: str | None, reply: Reply | None, spam: str | None
) -> None:
    with serving(verdict(action, text)) as server:
        said = filtered(rspamd, server.url)
    assert said == (reply, [] if spam is None else [f"X-Spam: {spam}", *SCORE])


def test_what_would_be_rejected_is_marked_if_the_settings_say_so(rspamd: Any) -> None:
    with serving(verdict("reject", "Gtube pattern")) as server:
        assert filtered(rspamd, server.url, reject="mark") == (None, ["X-Spam: Yes", *SCORE])


def test_nothing_in_an_answer_breaks_out_of_a_reply_or_a_field(rspamd: Any) -> None:
    symbols = ["GOOD", "BAD\nBcc: x", "B\u00c4D", "", "X" * 5000, *(f"S_{n}" for n in range(500))]
    evil: dict[str, Any] = {"symbols": {key: {} for key in symbols}, "score": float("nan")}
    with serving(verdict("add header", **evil)) as server:
        _, lines = filtered(rspamd, server.url)
    assert lines[:2] == ["X-Spam: Yes", "X-Spam-Score: nan / 15.00"]
    assert lines[2].startswith("X-Spam-Symbols: GOOD, S_0, S_1,")
    assert all(line.startswith("\t") for line in lines[3:])
    with serving(verdict("reject", "no\r\n250 ok\r\n\u2028" + "x" * 10_000)) as server:
        reply, lines = filtered(rspamd, server.url)
    assert reply is not None and lines == []
    assert all(line.startswith(b"550") for line in reply.encode().splitlines())


# -- no answer -------------------------------------------------------------------------------------


def slowly(octets: bytes) -> Answer:
    def answer(asked: Asked) -> None:
        for octet in octets * 1000:
            asked.wfile.write(bytes([octet]))
            time.sleep(0.02)

    return answer


def sends(octets: bytes, times: int = 1) -> Answer:
    """These, whatever they are."""

    def answer(asked: Asked) -> None:
        for _ in range(times):
            asked.wfile.write(octets)

    return answer


def says(answer: object, status: str = "200 OK") -> Answer:
    return lambda asked: asked.says(answer, status)


OK = b"HTTP/1.1 200 OK\r\n"
NO_ANSWERS: dict[str, Answer] = {
    "nothing": sends(b""),
    "no HTTP": sends(b"220 mx.example.net ESMTP \x1b[2J\r\n"),
    "500": says({"error": "oops"}, "500 Internal Server Error"),
    "a verdict with 404": says(
        {"action": "no action", "score": 0, "required_score": 15, "symbols": {}}, "404 Not Found"
    ),
    "half of it": sends(OK + b'Content-Length: 1000\r\n\r\n{"action": "reject"'),
    "no JSON": says(b"<html>"),
    "no UTF-8": says(b'{"action": "\xff"}'),
    "no object": says(["reject"]),
    "an empty object": says({}),
    "an action that is none": verdict(None),
    "a score that is none": verdict("no action", score="much"),
    "a score beyond all bounds": verdict("no action", score=10**400),
    "symbols that are none": verdict("no action", symbols=7),
    "messages that are none": verdict("no action", messages=["no"]),
    "deep": says(b"[" * 500_000),
    "large": says(b" " * 2_000_000 + b"{}"),
    "without an end": sends(OK + b"\r\n" + b" " * 65536, times=1000),
    "a header without an end": sends(OK + b"x" * 10**6),
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_without_an_answer_that_it_understands_a_message_is_deferred(
    rspamd: Any, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(answer) as server:
        reply, lines = filtered(rspamd, server.url)
        assert reply is not None and (reply.code, reply.status, lines) == (451, "4.7.1", [])
        said = filtered(rspamd, server.url, unreachable="accept")
    assert len(server.asked) == 2
    assert said == (None, ["X-Spam: Unknown"])
    [deferred, accepted] = [one.getMessage() for one in caplog.records]
    assert deferred.startswith("from='ann@example.net' defer: ")
    assert accepted.startswith("from='ann@example.net' accept: ")
    assert "hello" not in caplog.text, "nothing of the message"
    assert (deferred + accepted).isprintable()


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: asked.rfile.read(),  # until the plugin hangs up
        slowly(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50),
        lambda asked: (asked.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n"), slowly(b" ")(asked)),
    ],
    ids=["silence", "a slow header", "a slow body"],
)
def test_it_waits_no_longer_than_its_timeout(
    rspamd: Any, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    with serving(answer) as server:
        reply, _ = filtered(rspamd, server.url, timeout="0.3")
        assert 0.2 < time.monotonic() - began < 10
    assert reply is not None and reply.code == 451
    assert f"asking rspamd at {server.url.removeprefix('http://')}: " in caplog.text


def test_it_waits_no_longer_for_one_that_does_not_read(rspamd: Any) -> None:
    class Deaf(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            ended.wait(30)

    ended = threading.Event()
    began = time.monotonic()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Deaf) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            reply, _ = filtered(rspamd, url, content=b"\n" + b"x" * 20_000_000, timeout=0.3)
        finally:
            ended.set()
            server.shutdown()
            thread.join()
    assert time.monotonic() - began < 10
    assert reply is not None and reply.code == 451


def test_nobody_listens(rspamd: Any, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    reply, lines = filtered(rspamd, f"http://127.0.0.1:{port}")
    assert reply is not None and (reply.code, lines) == (451, [])
    assert f"asking rspamd at 127.0.0.1:{port}: [Errno 111] Connection refused" in caplog.text


def test_what_is_larger_than_rspamd_takes_is_not_asked_about(
    rspamd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rspamd, "MAX_MESSAGE", len(CONTENT))
    assert filtered(rspamd, f"http://127.0.0.1:{free_port()}") == (None, ["X-Spam: Unknown"])


# -- settings, and the whole way -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "rspamd:11333"}, "RSPAMD_URL: found 'rspamd:11333', allowed: http://HOST:PORT"),
        (
            {"url": "https://me:hunter2@h:1?password=hunter2"},
            "RSPAMD_URL: found '***@h:1', allowed",
        ),
        ({"url": "http://"}, "RSPAMD_URL: found 'http://'"),
        ({"timeout": "0"}, "RSPAMD_TIMEOUT: found '0', allowed: seconds above 0"),
        ({"timeout": "nan"}, "RSPAMD_TIMEOUT: found 'nan'"),
        ({"unreachable": "drop"}, "RSPAMD_UNREACHABLE: found 'drop', allowed: defer, accept"),
        ({"reject": "no"}, "RSPAMD_REJECT: found 'no', allowed: refuse, mark"),
    ],
)
def test_a_wrong_setting_is_named(rspamd: Any, settings: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match="RSPAMD_") as wrong:
        rspamd.Rspamd(**settings)
    assert said in str(wrong.value) and "hunter2" not in str(wrong.value)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return install("rspamd", tmp_path_factory.mktemp("rspamd"))


def test_installed_it_marks_mail_as_env_says(project: Project, installed: str) -> None:
    with serving(verdict("reject")) as server, provider(one_message, no_more_mail) as port:
        project.configure(isp(port))
        with (project.folder / ".env").open("a") as env:
            env.write(f"RSPAMD_URL={server.url}\nRSPAMD_REJECT=mark\n")
        done = project.run("collect", "isp", PYTHONPATH=installed)
    assert done.returncode == 0, done.stderr
    [message] = project.got()
    head, _, rest = message.partition(b"\nX-Spam: Yes\nX-Spam-Score: 7.25 / 15.00\n")
    assert head.startswith(b"Received: ") and b"\nFrom: " in rest and b"\nFrom: " not in head
    logs = "".join(one.read_text() for one in (project.folder / "logs").glob("*.log"))
    assert "from='a@example.net' action='reject' score=7.25" in logs


def test_with_a_wrong_setting_mail_is_deferred(project: Project, installed: str) -> None:
    async def deferred(provider: Dialogue) -> None:
        await provider.reverse()
        assert (await provider.send(MESSAGE)).startswith("451 4.7.1 ")
        await provider.quit()

    with provider(deferred) as port:
        project.configure(isp(port))
        done = project.run("collect", "isp", PYTHONPATH=installed, RSPAMD_REJECT="maybe")
    assert done.returncode == 1
    said = (
        "mail is deferred until this is right: RSPAMD_REJECT: found 'maybe', allowed: refuse, mark"
    )
    assert said in done.stderr


def test_at_a_providers_intake_it_refuses_and_marks_what_is_held(
    salmon: Salmon, rspamd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(asked: Asked) -> None:
        verdict("reject" if b"Subject: spam" in asked.body else "add header")(asked)

    async def work(here: World) -> None:
        await here.send("b@example.org", "c@example.org")
        with pytest.raises(aiosmtplib.SMTPDataError, match="this looks like spam") as refused:
            await here.send("b@example.org", data=MESSAGE.replace(b"hi", b"spam"))
        assert refused.value.code == 550
        [held] = here.held()
        assert b"\r\nX-Spam: Yes\r\nX-Spam-Score: 7.25 / 15.00\r\n" in here.data(held)

    with serving(answer) as server:
        plugins = Plugins.load()
        plugins.register(rspamd, "rspamd")
        monkeypatch.setenv("RSPAMD_URL", server.url)
        in_the_world(salmon, work, plugins=plugins)
        assert len(server.asked) == 2, "once for all recipients"
        assert dict(server.asked[0].headers)["IP"] == "127.0.0.1"
