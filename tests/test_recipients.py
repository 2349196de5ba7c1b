"""Recipients that are decided on later: in what order, for how long, and what a client hears."""

from __future__ import annotations

import asyncio
import random
import smtplib
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from salmon import utils
from salmon.routing import Router
from support.client import codes
from support.collecting import collect, collect_from
from support.configuration import agent_keys, configuration
from support.dialogue import Dialogue, scripted
from support.listener import listener
from support.messages import MESSAGE
from support.salmon import Salmon

from salmon_revsmtp import Reply, SettingsError, hookimpl
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.service import recipients
from salmon_revsmtp.service.recipients import Recipients
from salmon_revsmtp.smtp.envelope import Envelope
from salmon_revsmtp.smtp.limits import Limits
from salmon_revsmtp.smtp.receiver import (
    LATER,
    Receiver,
    RecipientRequest,
    Transaction,
    Verdict,
)

OK = Reply(250, "delivered")
NO = Reply(550, "no such recipient", "5.1.1")
START = b"EHLO x\r\nMAIL FROM:<a@example.com> PRDR\r\n"


def rcpt(*names: str) -> bytes:
    return b"".join(f"RCPT TO:<{name}@example.org>\r\n".encode() for name in names)


class Client:
    """Speaks to a receiver whose recipients are decided when the test says so: all but those whose
    name says that they are known at once."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.receiver = Receiver("mail.example.org", limits, self._verdict)
        self.asked: list[RecipientRequest] = []
        self.messages: list[Transaction] = []
        self.receiver.data_to_send()

    def _verdict(self, mailbox: str) -> Verdict:
        return {"yes": None, "no": NO}.get(mailbox[:3].rstrip("@0123456789"), LATER)

    def say(self, data: bytes) -> str:
        return self._heard(self.receiver.receive_bytes(data))

    def decide(self, recipient: str, refusal: Reply | None = None) -> str:
        [request] = [one for one in self.asked if one.recipient == f"{recipient}@example.org"]
        self.asked.remove(request)
        self.receiver.answer_recipient(request, refusal)
        return self._heard(self.receiver.advance())

    def _heard(self, events: list[Any]) -> str:
        for event in events:
            if isinstance(event, RecipientRequest):
                self.asked.append(event)
            elif isinstance(event, Transaction):
                self.messages.append(event)
                each = [OK] * len(event.envelope.recipients)
                self.receiver.answer(event, OK, each)
        return codes(self.receiver.data_to_send())


def test_a_recipient_is_answered_when_it_is_decided() -> None:
    client = Client()
    client.say(START)
    assert client.say(rcpt("ann")) == ""
    [request] = client.asked
    assert request.recipient == "ann@example.org"
    assert request.envelope.reverse_path == "a@example.com"
    assert client.decide("ann") == "250"
    assert client.say(b"DATA\r\nhi\r\n.\r\n") == "354 353 250 250"
    assert client.messages[0].envelope.recipients == ("ann@example.org",)


def test_recipients_keep_their_order_whatever_the_order_of_decisions() -> None:
    client = Client()
    client.say(START)
    assert client.say(rcpt("ann", "bob", "yes", "no", "eve") + b"DATA\r\n") == ""
    assert client.decide("eve") == "" and client.decide("bob", NO) == ""
    assert client.decide("ann") == "250 550 250 550 250 354"
    client.say(b"hi\r\n.\r\n")
    [message] = client.messages
    assert message.envelope.recipients == ("ann@example.org", "yes@example.org", "eve@example.org")


def test_what_comes_after_them_waits_and_is_not_read_without_an_end() -> None:
    client = Client()
    client.say(START + rcpt("ann"))
    assert not client.receiver.paused
    assert client.say(b"BDAT 3 LAST\r\nhi") == "" and client.receiver.paused
    assert client.decide("ann", NO) == "550"
    assert not client.receiver.paused
    assert client.say(b"\n") == "554"
    assert client.messages == []


def test_a_chunked_message_finds_its_recipients_decided() -> None:
    client = Client()
    client.say(START + rcpt("ann", "bob") + b"BDAT 4\r\nhi\r\nBDAT 4 LAST\r\nho\r\n" + START[8:])
    assert client.decide("bob") == ""
    assert client.decide("ann") == "250 250 250 353 250 250 250 250"
    assert client.messages[0].data == b"hi\r\nho\r\n"


@pytest.mark.parametrize("command", [b"RSET\r\n", b"QUIT\r\n", b"EHLO y\r\n", b"NOOP\r\n"])
def test_a_command_that_was_sent_ahead_has_its_turn(command: bytes) -> None:
    client = Client()
    client.say(START)
    assert client.say(rcpt("ann") + command) == ""
    code = "221" if command == b"QUIT\r\n" else "250"
    assert client.decide("ann") == f"250 {code}"
    if command == b"RSET\r\n":
        assert client.say(b"DATA\r\n") == "503"


def test_a_line_that_is_none_is_answered_in_its_turn() -> None:
    client = Client(Limits(command_line=100))
    client.say(START)
    assert client.say(rcpt("ann") + b"RCPT TO:<b@" + b"x" * 200 + b"\r\nRCPT nonsense\r\n") == ""
    assert client.decide("ann") == "250 500 501"


def test_half_a_command_is_waited_for() -> None:
    client = Client()
    client.say(START + rcpt("ann"))
    assert client.say(b"rc") == "" and not client.receiver.paused
    assert client.say(b"pt to:<bob@example.org>\r\n") == ""
    assert len(client.asked) == 2
    assert client.say(b"DA") == "" and not client.receiver.paused


def test_the_limit_of_recipients_counts_those_that_are_asked_for() -> None:
    client = Client(Limits(recipients=2))
    client.say(START)
    assert client.say(rcpt("ann", "bob", "eve")) == ""
    assert len(client.asked) == 2
    assert client.decide("bob", NO) == ""
    assert client.decide("ann") == "250 550 452"
    assert client.say(rcpt("eve")) == "" and client.decide("eve") == "250"


def test_those_that_are_refused_cost_no_envelope() -> None:
    client = Client(Limits(envelope=1000))
    client.say(START)
    for _ in range(10):
        client.say(rcpt("ann"))
        assert client.decide("ann", NO) == "550"


def test_a_session_that_is_sent_away_says_so_of_each() -> None:
    client = Client()
    client.say(START + rcpt("ann", "bob"))
    [ann, bob] = client.asked
    client.receiver.send_away(Reply(421, "busy", "4.3.2"))
    assert codes(client.receiver.data_to_send()) == "451 451 421"
    assert client.receiver.closed
    client.receiver.answer_recipient(ann, None)  # too late, and no one minds
    client.receiver.answer_recipient(bob, NO)
    assert client.receiver.data_to_send() == b""


def test_a_shutdown_does_not_wait_for_a_decision() -> None:
    client = Client()
    client.say(START + rcpt("ann"))
    client.receiver.shut_down()
    assert codes(client.receiver.data_to_send()) == "451 421" and client.receiver.closed


def test_a_client_that_is_gone_is_answered_nothing() -> None:
    client = Client()
    client.say(START + rcpt("ann", "bob"))
    client.receiver.lost()
    client.receiver.answer_recipient(client.asked[0], None)
    assert client.receiver.data_to_send() == b"" and client.receiver.closed


def test_too_many_refusals_in_a_row_end_it() -> None:
    client = Client(Limits(refusals=2))
    client.say(START + rcpt("a1", "a2", "a3", "a4"))
    assert client.decide("a1", NO) == "550" and client.decide("a3", NO) == ""
    assert client.decide("a2", NO) == "550 550 451 421"
    assert client.receiver.closed


def test_the_answer_to_a_message_before_comes_first() -> None:
    receiver = Receiver("mail.example.org", None, lambda mailbox: LATER)
    receiver.data_to_send()
    said = b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\n"
    [request] = receiver.receive_bytes(said)
    assert isinstance(request, RecipientRequest)
    receiver.answer_recipient(request, None)
    message, second = receiver.receive_bytes(b"BDAT 1 LAST\r\nx" + said[8:])
    assert isinstance(message, Transaction) and isinstance(second, RecipientRequest)
    receiver.data_to_send()
    receiver.answer_recipient(second, NO)
    assert receiver.data_to_send() == b""
    receiver.answer(message, OK)
    assert codes(receiver.data_to_send()) == "250 250 550"


@given(st.integers(), st.lists(st.booleans(), min_size=1, max_size=8), st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_later_and_at_once_come_to_the_same(seed: int, accept: list[bool], piece: int) -> None:
    """Whatever the order of the decisions and the pieces that came."""
    chance = random.Random(seed)
    names = [f"{'yes' if one else 'no'}{number}" for number, one in enumerate(accept)]
    said = START + rcpt(*names) + b"BDAT 4\r\nhi\r\nBDAT 4 LAST\r\nho\r\nNOOP\r\nQUIT\r\n"
    at_once = Client()
    expected = at_once.say(said)
    later = Client()
    later._verdict = lambda mailbox: LATER if chance.random() < 0.7 else at_once._verdict(mailbox)  # type: ignore[method-assign]
    later.receiver = Receiver("mail.example.org", None, later._verdict)
    later.receiver.data_to_send()
    heard = []
    for start in range(0, len(said), piece):
        heard.append(later.say(said[start : start + piece]))
        while later.asked and chance.random() < 0.5:
            one = chance.choice(later.asked).recipient.partition("@")[0]
            heard.append(later.decide(one, NO if one.startswith("no") else None))
    while later.asked:
        one = chance.choice(later.asked).recipient.partition("@")[0]
        heard.append(later.decide(one, NO if one.startswith("no") else None))
    assert " ".join(filter(None, heard)) == expected
    assert [(one.envelope.recipients, one.data) for one in later.messages] == [
        (one.envelope.recipients, one.data) for one in at_once.messages
    ]


# -- the hook --------------------------------------------------------------------------------------


class Decides:
    """A plugin that decides on recipients by their names."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.go = threading.Event()

    @hookimpl
    def recipient_requested(self, agent: Any, envelope: Any, recipient: str) -> Reply | None:
        self.calls.append((agent, envelope.reverse_path, envelope.recipients, recipient))
        name = recipient.partition("@")[0]
        if name == "hangs":
            self.go.wait(30)
        if name == "raises":
            raise RuntimeError("a bug of the plugin's")
        if name == "exits":
            raise SystemExit("a bug of the plugin's, too")
        if name == "positive":
            return Reply(250, "this refuses nothing")
        return {"later": Reply(450, "mailbox busy", "4.2.1"), "never": NO}.get(name)


@pytest.fixture
def decides() -> Decides:
    return Decides()


@pytest.fixture
def plugins(decides: Decides) -> Plugins:
    plugins = Plugins.load()
    plugins.register(decides, "decides")
    return plugins


def in_listener(salmon: Salmon, work: Callable[[int], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with listener(salmon, **options) as one:
            await work(one.port)

    asyncio.run(main())


def session_of(port: int, *recipients: str) -> list[int]:
    """What each recipient hears, and then the message."""
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as client:
        client.ehlo()
        client.mail("a@example.net")
        heard = [client.rcpt(f"{one}@example.org")[0] for one in recipients]
        try:
            return [*heard, client.data(MESSAGE)[0]]
        except smtplib.SMTPDataError as error:
            return [*heard, error.smtp_code]


def test_a_plugin_decides_on_recipients(
    salmon: Salmon, plugins: Plugins, decides: Decides, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*")

    async def work(port: int) -> None:
        names = ("ann", "never", "later", "raises", "positive", "exits")
        heard = await asyncio.to_thread(session_of, port, *names)
        assert heard == [250, 550, 450, 250, 250, 451, 250]

    in_listener(salmon, work, plugins=plugins)
    assert [one["To"] is not None for one in salmon.handled] == [True] * 3
    assert decides.calls[1] == (None, "a@example.net", ("ann@example.org",), "never@example.org")
    assert "plugin=decides hook=recipient_requested raised" in caplog.text
    assert "which refuses nothing" in caplog.text


@pytest.mark.parametrize(
    ("first", "second", "heard"),
    [(None, NO, NO), (NO, None, NO), (None, None, OK), (LATER, LATER, OK)],
)
def test_who_has_no_question_is_not_asked(first: Verdict, second: Verdict, heard: Reply) -> None:
    """Where no plugin decides, its threads have no part in what the customer at home decides."""

    class Says:
        def __init__(self, verdict: Verdict) -> None:
            self._verdict = verdict

        def verdict(self, mailbox: str) -> Verdict:
            return self._verdict

        async def decide(self, request: RecipientRequest) -> Reply | None:
            assert self._verdict is LATER, "it had no question"
            return OK

    recipients = Recipients(lambda _: None, Says(first), Says(LATER), Says(second))
    request = RecipientRequest(Envelope("a@example.net", ()), "b@example.org", {})
    assert asyncio.run(recipients.decide(request)) == heard


def test_a_plugin_is_not_asked_for_strangers(
    salmon: Salmon, plugins: Plugins, decides: Decides
) -> None:
    async def work(port: int) -> None:
        def say() -> int:
            with smtplib.SMTP("127.0.0.1", port, timeout=30) as client:
                client.ehlo()
                client.mail("a@example.net")
                return client.rcpt("ann@elsewhere.example")[0]

        assert await asyncio.to_thread(say) == 550

    in_listener(salmon, work, plugins=plugins)
    assert decides.calls == []


def test_a_plugin_that_hangs_costs_its_recipient_an_answer_and_no_one_else_time(
    salmon: Salmon, plugins: Plugins, decides: Decides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipients, "DECIDE_IN", 3.0)
    salmon.handle(".*")

    async def work(port: int) -> None:
        hanging = asyncio.ensure_future(asyncio.to_thread(session_of, port, "hangs"))
        while not decides.calls:
            await asyncio.sleep(0.01)
        assert await asyncio.to_thread(session_of, port, "ann") == [250, 250]
        assert await hanging == [451, 554]

    try:
        in_listener(salmon, work, plugins=plugins)
    finally:
        decides.go.set()


def test_a_plugin_decides_on_a_reversed_connection(
    salmon: Salmon, plugins: Plugins, decides: Decides
) -> None:
    salmon.handle(".*")

    async def provider(dialogue: Dialogue) -> None:
        await dialogue.reverse()
        recipients = [f"RCPT TO:<{one}@example.org>" for one in names]
        dialogue.say("MAIL FROM:<a@example.net>", *recipients)
        await dialogue.replied(250)
        for code in (250, 550, 450):
            await dialogue.replied(code)
        dialogue.say("RSET")
        await dialogue.replied(250)
        await dialogue.quit()

    names = ("ann", "never", "later")
    report = collect_from(salmon, provider, plugins=plugins)
    assert report.refused == 2
    assert [call[0].name for call in decides.calls] == ["isp"] * 3


# -- routes ----------------------------------------------------------------------------------------


def test_recipients_without_a_route_are_refused_where_that_is_wanted(salmon: Salmon) -> None:
    salmon.handle("ann@example.org")
    salmon.handle(r"(list_name)-(action)@example\.org")

    async def work(port: int) -> None:
        heard = await asyncio.to_thread(session_of, port, "Ann", "bob", "x(list_name)-(action)")
        assert heard == [250, 550, 550, 250]

    in_listener(salmon, work, unknown_recipients="refuse")
    assert len(salmon.handled) == 1, "what matches is not called at RCPT"


def test_while_a_handler_is_missing_no_recipient_is_refused_for_good(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    salmon.handle("ann@example.org")
    listed = SimpleNamespace(handlers=["app.handlers.orders"])
    monkeypatch.setattr(utils, "settings", listed)

    async def work(port: int) -> None:
        heard = await asyncio.to_thread(session_of, port, "ann", "bob")
        assert heard == [250, 451, 250]
        monkeypatch.setitem(Router.HANDLERS, "app.handlers.orders", "")
        assert (await asyncio.to_thread(session_of, port, "bob"))[0] == 550

    in_listener(salmon, work, unknown_recipients="refuse")


def test_by_default_they_are_kept(salmon: Salmon) -> None:
    salmon.handle("ann@example.org")

    async def work(port: int) -> None:
        assert await asyncio.to_thread(session_of, port, "bob") == [250, 250]

    in_listener(salmon, work)
    assert len(salmon.undeliverable()) == 1


def test_without_any_routes_nothing_bounces(salmon: Salmon) -> None:
    async def work(port: int) -> None:
        assert await asyncio.to_thread(session_of, port, "bob") == [250, 250]

    in_listener(salmon, work, unknown_recipients="refuse")
    assert len(salmon.undeliverable()) == 1


def test_a_recipient_is_refused_on_a_reversed_connection(salmon: Salmon) -> None:
    salmon.handle("ann@example.org")

    async def provider(dialogue: Dialogue) -> None:
        await dialogue.reverse()
        dialogue.say("MAIL FROM:<a@example.net>", "RCPT TO:<bob@example.org>")
        await dialogue.replied(250)
        assert "5.1.1" in await dialogue.replied(550)
        await dialogue.quit()

    async def main() -> None:
        async with scripted(provider) as port:
            service = {"hostname": "mail.example.org", "unknown_recipients": "refuse"}
            [report] = await collect(salmon, agent_keys(port), default=service)
        assert report.refused == 1

    asyncio.run(main())


def test_held_mail_has_no_routes() -> None:
    account = {"name": "acme", "password": "secret", "domains": ["example.org"]}
    mx = {"delivery": "hold", "unknown_recipients": "refuse"}
    with pytest.raises(SettingsError, match=r'service "mx".*held mail has no routes'):
        configuration(accounts=[account], mx=mx)


def test_while_handlers_are_loaded_again_recipients_wait(salmon: Salmon) -> None:
    """With ``Router.RELOAD`` there are no routes while the handlers are being imported."""
    salmon.handle("ann@example.org")

    async def work(port: int) -> None:
        loaded = threading.Event()
        loading = threading.Event()

        def load() -> None:
            with Router.lock:
                order = Router.ORDER[:]
                Router.ORDER.clear()
                loading.set()
                loaded.wait(30)
                Router.ORDER.extend(order)

        thread = threading.Thread(target=load)
        thread.start()
        loading.wait(30)
        asking = asyncio.ensure_future(asyncio.to_thread(session_of, port, "bob", "ann"))
        # The event loop goes on: another connection is greeted.
        greeted = await asyncio.open_connection("127.0.0.1", port)
        assert (await greeted[0].readline()).startswith(b"220")
        greeted[1].close()
        loaded.set()
        assert await asking == [550, 250, 250]
        await asyncio.to_thread(thread.join)

    in_listener(salmon, work, unknown_recipients="refuse")
