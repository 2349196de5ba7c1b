"""What the world sends for the accounts: what is held, what is refused, and what senders hear."""

from __future__ import annotations

import asyncio
import random
import smtplib
import threading
import time
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
from salmon.mail import MailRequest
from salmon.routing import nolocking, route, stateless
from salmon.server import SMTPError
from support.configuration import PASSWORD, agent_keys, configuration
from support.messages import MESSAGE
from support.salmon import Salmon
from support.world import ACME, OTHER, World, in_the_world

from salmon_revsmtp import Reply, SettingsError, hold, hookimpl
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector
from salmon_revsmtp.smtp.addresses import domain_of
from salmon_revsmtp.smtp.receiver import Receiver, Transaction


def test_mail_for_an_account_is_held_with_our_received_line(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        assert await here.send("b@EXAMPLE.org") == {}
        [held] = here.held()
        assert held.envelope.recipients == ("b@EXAMPLE.org",)
        assert held.envelope.reverse_path == "a@example.net"
        data = here.data(held)
        assert data.startswith(b"Received: from ") and data.endswith(MESSAGE)
        assert b"by mx.example.net" in data and b"for <b@EXAMPLE.org>" in data
        assert b"\r\n" in data and b"\n" not in data.replace(b"\r\n", b"")

    in_the_world(salmon, work)


def test_recipients_of_several_accounts_are_each_ones_own(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        await here.send("b@example.org", "x@example.com", "c@example.org")
        assert [one.envelope.recipients for one in here.held()] == [
            ("b@example.org", "c@example.org")
        ]
        [other] = here.held("other")
        assert other.envelope.recipients == ("x@example.com",)
        data = here.data(other)
        assert b"b@example.org" not in data, "they need not know of each other"

    in_the_world(salmon, work)


STRANGERS = (
    "b@example.net",
    "b@sub.example.org",
    "b@example.org.example.net",
    "b%example.net@mx.example.net",
    "example.net!b@mx.example.net",
    "@example.org:b@example.net",
    '"b@example.org"@example.net',
    "b@[127.0.0.1]",
    "b@[192.0.2.1]",
    "b@xn--bcher-kva.example.net",
    "b@example.org@example.net",
)


@pytest.mark.parametrize("recipient", STRANGERS)
def test_this_host_relays_for_no_one(salmon: Salmon, recipient: str) -> None:
    async def work(here: World) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.mx)
        said = f"EHLO x\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<{recipient}>\r\nQUIT\r\n"
        writer.write(said.encode())
        heard = (await asyncio.wait_for(reader.read(), 60)).decode()
        writer.close()
        assert heard.splitlines()[-2][:4] in ("550 ", "501 "), heard
        assert here.store.usages() == {}

    in_the_world(salmon, work)


def test_a_postmaster_without_a_domain_is_that_of_our_own_name(salmon: Salmon) -> None:
    async def refused(here: World) -> None:
        assert await postmaster(here) == "550"

    async def taken(here: World) -> None:
        assert await postmaster(here) == "250"

    async def postmaster(here: World) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.mx)
        writer.write(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<Postmaster>\r\nQUIT\r\n")
        heard = (await asyncio.wait_for(reader.read(), 60)).decode()
        writer.close()
        return heard.splitlines()[-2][:3]

    in_the_world(salmon, refused)
    ours = {**OTHER, "domains": ["mx.example.net"]}
    in_the_world(salmon, taken, accounts=[ACME, ours])


@pytest.mark.parametrize("quota", [{"quota_messages": 2}, {"quota_bytes": 400}])
def test_over_its_quota_senders_keep_an_accounts_mail(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, quota: dict[str, int]
) -> None:
    told: list[str] = []

    class Watcher:
        @hookimpl
        def quota_exceeded(self, account: str, messages: int, octets: int) -> None:
            told.append(account)

    plugins = Plugins.load()
    plugins.register(Watcher())

    async def work(here: World) -> None:
        for _ in range(2):
            await here.send("b@example.org")
        for _ in range(3):
            with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as refused:
                await here.send("b@example.org")
            [one] = refused.value.recipients
            assert (one.code, one.message[:5]) == (452, "4.2.2")
        assert await here.send("b@example.org", "x@example.com") != {}
        assert (len(here.held()), len(here.held("other"))) == (2, 1)
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    in_the_world(salmon, work, plugins=plugins, accounts=[{**ACME, **quota}, OTHER])
    assert told == ["acme"]
    assert caplog.text.count("its quota is used up") == 1


def test_a_message_that_goes_in_circles_is_refused(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        data = b"Received: from x\r\n" * 100 + MESSAGE
        with pytest.raises(aiosmtplib.SMTPDataError) as refused:
            await here.send("b@example.org", data=data)
        assert (refused.value.code, refused.value.message[:5]) == (554, "5.4.6")
        assert here.store.usages() == {}

    in_the_world(salmon, work)


@pytest.mark.parametrize("first", [b"no field\r\n", b" folded\r\n", b"\r\n"])
def test_nothing_of_a_message_becomes_part_of_our_line(salmon: Salmon, first: bytes) -> None:
    async def work(here: World) -> None:
        await here.send("b@example.org", data=first + b"the rest\r\n")
        [held] = here.held()
        head, _, body = here.data(held).partition(b"\r\n\r\n")
        assert head.startswith(b"Received: ") and b"the rest" not in head
        assert first.strip() in body

    in_the_world(salmon, work)


def test_a_plugin_sees_what_is_held_and_may_refuse(salmon: Salmon) -> None:
    seen: list[Any] = []
    clients: list[Any] = []

    class Filter:
        @hookimpl
        def message_received(self, agent: Any, envelope: Any, message: bytes) -> Reply | None:
            seen.append(message)
            clients.append(envelope.client)
            spam = envelope.recipients[0].startswith("spam")
            return Reply(550, "5.7.1 we do not like it") if spam else None

        @hookimpl
        def message_held(self, account: str, envelope: Any, key: int) -> None:
            seen.append((account, envelope.recipients, key))

    plugins = Plugins.load()
    plugins.register(Filter())

    async def work(here: World) -> None:
        await here.send("b@example.org")
        with pytest.raises(aiosmtplib.SMTPDataError, match="we do not like it"):
            await here.send("spam@example.org")
        [held] = here.held()
        assert seen[1] == ("acme", ("b@example.org",), held.key)
        assert seen[0].startswith(b"Received: ") and b"\r\n" not in seen[0]
        assert len(seen) == 3
        for client in clients:
            assert (client.address, client.protocol) == ("127.0.0.1", "ESMTP")
            assert client.port > 0 and client.helo

    in_the_world(salmon, work, plugins=plugins)


@pytest.mark.parametrize("lines", [1, 20_000], ids=["small", "on the disk as it came"])
def test_what_a_plugin_adds_is_held_and_handed_over(salmon: Salmon, lines: int) -> None:
    class Filter:
        @hookimpl
        def message_received(self, envelope: Any, add_field: Any) -> None:
            if envelope.client is not None:  # at the provider, not at home
                add_field("X-Spam", "Yes")

    salmon.handle(".*")
    data = b"X-Spam: No\r\nSubject: x\r\n\r\n" + b"a line of the message\r\n" * lines
    plugins = Plugins.load()
    plugins.register(Filter())

    async def work(here: World) -> None:
        await here.send("b@example.org", "c@example.org", data=data)
        [held] = here.held()
        octets = here.data(held)
        assert held.size == len(octets)
        assert octets.startswith(b"Received: ") and octets.endswith(b"\r\nX-Spam: Yes\r\n" + data)
        valid = configuration(agent_keys(here.odmr), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [report] = await collector.collect(valid.agents)
        assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)

    in_the_world(salmon, work, plugins=plugins)
    assert [message.To for message in salmon.handled] == ["b@example.org", "c@example.org"]
    for message in salmon.handled:
        assert b"\nX-Spam: Yes\n" + data[:14].replace(b"\r\n", b"\n") in message.Data


class Takes:
    """A plugin that takes its time for some messages, and ends the process for others."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    @hookimpl
    def message_received(self, agent: Any, envelope: Any, message: bytes) -> None:
        if envelope.recipients[0].startswith("slow"):
            self.begun.set()
            self.go.wait(60)
        if envelope.recipients[0].startswith("exits"):
            raise SystemExit(1)


def test_no_message_waits_for_a_plugin_that_looks_at_another(salmon: Salmon) -> None:
    takes, plugins = Takes(), Plugins.load()
    plugins.register(takes)

    async def work(here: World) -> None:
        slow = [asyncio.ensure_future(here.send("slow@example.org")) for _ in range(3)]
        await asyncio.to_thread(takes.begun.wait, 60)
        await here.send("b@example.org")
        with pytest.raises(aiosmtplib.SMTPDataError, match="internal error"):
            await here.send("exits@example.org")
        assert len(here.held()) == 1 and not any(one.done() for one in slow)
        takes.go.set()
        await asyncio.gather(*slow)
        assert len(here.held()) == 4

    try:
        in_the_world(salmon, work, plugins=plugins)
    finally:
        takes.go.set()


def test_a_plugin_that_hangs_costs_its_message_an_answer(salmon: Salmon) -> None:
    takes, plugins = Takes(), Plugins.load()
    plugins.register(takes)

    async def work(here: World) -> None:
        with pytest.raises(aiosmtplib.SMTPDataError, match="not looked at in") as error:
            await here.send("slow@example.org")
        assert error.value.code == 451
        takes.go.set()
        await here.send("b@example.org")
        assert [one.envelope.recipients for one in here.held()] == [("b@example.org",)]

    try:
        in_the_world(salmon, work, plugins=plugins, handler_timeout=2)
    finally:
        takes.go.set()


def test_what_is_held_is_collected_by_a_customer_in_the_same_process(salmon: Salmon) -> None:
    salmon.handle(".*")

    async def work(here: World) -> None:
        await here.send("b@example.org", sender="")
        plugins = Plugins.load()
        valid = configuration(agent_keys(here.odmr), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [report] = await collector.collect(valid.agents)
        assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)
        assert here.store.usages() == {}

    in_the_world(salmon, work)
    [message] = salmon.handled
    assert message.Data.count(b"Received: ") == 2


@pytest.mark.parametrize("how", ["DATA", "BDAT"])
def test_a_large_message_goes_to_the_disk_as_it_comes_and_from_there(
    salmon: Salmon, how: str
) -> None:
    salmon.handle(".*")
    data = b"Subject: large\r\n\r\n" + b".line that begins with a dot\r\n" * 100_000
    octets = data.replace(b"\r\n.", b"\r\n..") + b".\r\n"
    if how == "BDAT":
        octets = b"BDAT 1000\r\n%bBDAT %d LAST\r\n%b" % (
            *(data[:1000], len(data) - 1000, data[1000:]),
        )

    async def work(here: World) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.mx)
        writer.write(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\n")
        writer.write(b"DATA\r\n" if how == "DATA" else b"")
        writer.write(octets + b"QUIT\r\n")
        heard = (await asyncio.wait_for(reader.read(), 60)).decode()
        writer.close()
        assert "250 2.6.0 held as" in heard
        [held] = here.held()
        assert here.data(held).endswith(b"\r\n" + data)
        assert not isinstance(here.store.load([held.key])[held.key], bytes)
        plugins = Plugins.load()
        valid = configuration(agent_keys(here.odmr), plugins=plugins)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            [report] = await collector.collect(valid.agents)
        assert (report.outcome, report.messages) == (Outcome.COLLECTED, 1)
        assert here.store.usages() == {}
        assert list((salmon.folder / "run/hold/bodies").iterdir()) == []

    in_the_world(salmon, work)
    [message] = salmon.handled
    assert message.Data.endswith(data.replace(b"\r\n", b"\n").removesuffix(b"\n"))


def test_a_large_message_that_breaks_off_leaves_nothing(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        tmp = salmon.folder / "run/hold/tmp"
        _, writer = await asyncio.open_connection("127.0.0.1", here.mx)
        writer.write(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
        writer.write(b"x" * 70 + b"\r\n" * 10)
        writer.write((b"x" * 70 + b"\r\n") * 20_000)
        while not list(tmp.iterdir()):
            await asyncio.sleep(0.01)
        writer.transport.abort()
        while list(tmp.iterdir()):
            await asyncio.sleep(0.01)
        assert here.store.usages() == {}

    in_the_world(salmon, work)


# -- hold, from a handler --------------------------------------------------------------------------


def request(
    data: bytes = b"Subject: x\n\nhello\n", sender: str = "a@example.net", to: str = "b@example.org"
) -> MailRequest:
    return MailRequest(("192.0.2.1", 25), sender, to, data)


def test_a_handler_has_a_message_held(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        await asyncio.to_thread(hold, request())
        [held] = here.held()
        assert held.envelope.reverse_path == "a@example.net"
        assert here.store.load([held.key]) == {held.key: b"Subject: x\r\n\r\nhello\r\n"}
        for to, code in (("b@example.net", 550), ("b@sub.example.org", 550)):
            with pytest.raises(SMTPError) as refused:
                await asyncio.to_thread(hold, request(to=to))
            assert refused.value.code == code
        assert len(here.held()) == 1

    in_the_world(salmon, work)


def test_what_a_handler_adds_goes_on_top_and_the_octets_stay(salmon: Salmon) -> None:
    """So a signature over them stays valid."""
    data = b"Subject:  odd   spaces \nX-Odd: =?utf-8?q?=FC?=\n\n\xff\xfe body\n"

    async def work(here: World) -> None:
        message = request(data)
        message["X-Spam-Score"] = "5\nBcc: evil@example.net"
        await asyncio.to_thread(hold, message)
        changed = request(b"Subject: x\nX-Y: z\n\nhello\n")
        changed["Subject"] = "changed"
        await asyncio.to_thread(hold, changed)
        first, second = (here.data(one) for one in here.held())
        assert first == (
            b"X-Spam-Score: 5 Bcc: evil@example.net\r\n" + data.replace(b"\n", b"\r\n")
        )
        assert b"Subject: changed\r\n" in second and b"Subject: x" not in second

    in_the_world(salmon, work)


@pytest.mark.parametrize(
    ("sender", "data", "expected"),
    [
        ("<>", b"From: Mailer <a@example.net>\n\nx\n", ""),
        ("", b"From: Mailer <a@example.net>\n\nx\n", ""),
        ("a@example.net", b"From: Ann <ann@example.net>\n\nx\n", "a@example.net"),
    ],
)
def test_the_null_sender_stays_null(
    salmon: Salmon, sender: str, data: bytes, expected: str
) -> None:
    async def work(here: World) -> None:
        await asyncio.to_thread(hold, request(data, sender))
        assert here.held()[0].envelope.reverse_path == expected

    in_the_world(salmon, work)


def test_a_handler_of_a_service_of_ours_has_the_envelope_as_it_came(salmon: Salmon) -> None:
    """Salmon puts the header's From in the place of the null sender."""
    salmon.handle(".*", hold)

    async def work(here: World) -> None:
        data = b"From: a@example.net\r\nSubject: x\r\n\r\nhello\r\n"
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=here.mx, start_tls=False) as client:
            await client.sendmail("", ["b@example.org"], data)
        [held] = here.held()
        assert (held.envelope.reverse_path, held.envelope.recipients) == ("", ("b@example.org",))
        assert held.envelope.helo

    in_the_world(salmon, work, delivery="router", domains=["example.org"])


def test_handlers_that_run_at_the_same_time_hold_each_its_own(salmon: Salmon) -> None:
    meeting = threading.Barrier(3)

    def handler(message: MailRequest, **captures: str) -> None:
        meeting.wait(60)
        hold(message)

    route(".*")(stateless(nolocking(handler)))

    async def send(port: int, name: str) -> None:
        data = f"From: other@example.net\r\nSubject: {name}\r\n\r\nhello\r\n".encode()
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False) as client:
            await client.sendmail(f"{name}@example.net", [f"{name}@example.org"], data)

    async def work(here: World) -> None:
        await asyncio.gather(*(send(here.mx, name) for name in "abc"))
        held = sorted((one.envelope.reverse_path, one.envelope.recipients) for one in here.held())
        assert held == [(f"{name}@example.net", (f"{name}@example.org",)) for name in "abc"]

    service = {"delivery": "router", "delivery_threads": 3, "domains": ["example.org"]}
    in_the_world(salmon, work, **service)


def test_another_process_has_the_server_hold_it(salmon: Salmon, tmp_path: Path) -> None:
    from salmon_revsmtp.server import holding

    async def work(here: World) -> None:
        holding._here.clear()  # as it is in another process
        await asyncio.to_thread(hold, request())
        assert len(here.held()) == 1
        with pytest.raises(SMTPError) as refused:
            await asyncio.to_thread(hold, request(to="b@example.net"))
        assert refused.value.code == 550
        assert list(here.collector.providing.incoming.iterdir()) == []

    (salmon.folder / "ourconfig.py").write_text(
        f"customer_accounts = [{ACME!r}]\nprovider = {{}}\nrelay = None\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALMON_SETTINGS_MODULE", "ourconfig")
        patch.setattr(holding, "PROJECT", salmon.folder)
        patch.syspath_prepend(str(salmon.folder))
        in_the_world(salmon, work)
        hold(request())  # and no server runs any more


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"accounts": []}, "customer_accounts: missing"),
        ({"accounts": "acme"}, "customer_accounts: found a text, allowed: a list of dicts"),
        ({"accounts": [ACME, ACME]}, 'account "acme": name: found twice'),
        ({"accounts": [{**ACME, "domains": []}]}, 'account "acme": domains: found'),
        ({"accounts": [{**ACME, "password": ""}]}, "password: found that value"),
        (
            {"accounts": [ACME, {**OTHER, "domains": ["EXAMPLE.org"]}]},
            "'example.org' is that of account 'acme'",
        ),
        ({"accounts": [{**ACME, "password": "SCRAM-SHA-256$x"}]}, "password: found that value"),
        ({"accounts": [{**ACME, "quota": 5}]}, "did you mean quota_bytes?"),
        ({"accounts": [{**ACME, "push": "sometimes"}]}, "True, False or 'always'"),
        ({"provider": {"listen": "366"}}, "provider: listen: found"),
        ({"provider": {"listen_implicit": "[::]:367"}}, "it needs a tls_cert"),
        ({"provider": {"listen": None}}, "name an address"),
        ({"provider": {"tls_cert": "/nosuch.pem"}}, "No such file"),
        ({"provider": {"keepalive": 0}}, "seconds, 1 to 3600"),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(keys: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"accounts": [ACME], "provider": {}, **keys}
    with pytest.raises(SettingsError) as error:
        configuration(**given)
    [problem] = error.value.problems
    assert said in problem
    assert PASSWORD not in str(error.value)


def test_smtplib_can_send_here_too(salmon: Salmon) -> None:
    def send(port: int) -> None:
        with smtplib.SMTP("127.0.0.1", port, local_hostname="client.example.net") as client:
            client.sendmail("a@example.net", ["b@xn--bcher-kva.example"], MESSAGE)

    async def work(here: World) -> None:
        await asyncio.to_thread(send, here.mx)
        assert [one.envelope.recipients for one in here.held()] == [("b@xn--bcher-kva.example",)]

    in_the_world(salmon, work)


def test_ten_thousand_tricks_with_a_recipient_get_nothing_relayed(salmon: Salmon) -> None:
    """Whatever an address is made to look like, what is held is for a domain of an account."""
    chance = random.Random(5321)
    words = ["b", "example.org", "example.net", "xn--bcher-kva.example", "127.0.0.1", "localhost"]
    signs = ["@", "%", "!", ".", ":", ",", '"', "\\", " ", "[", "]", "(x)", "<", ">", "", "\t", "/"]
    tricks = ["".join(chance.choices(words + signs, k=chance.randint(1, 9))) for _ in range(10_000)]

    async def work(here: World) -> None:
        policy = here.collector._intake("mx").policy
        accepted: set[str] = set()
        for trick in tricks:
            receiver = Receiver("h", None, policy)
            said = f"EHLO x\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<{trick}>\r\nBDAT 1 LAST\r\nx"
            for event in receiver.receive_bytes(said.encode()):
                if isinstance(event, Transaction):
                    accepted.update(event.envelope.recipients)
        ours = ("example.org", "xn--bcher-kva.example", "example.com")
        assert accepted, "there are some that are no tricks"
        assert [one for one in accepted if domain_of(one) not in ours] == []

    in_the_world(salmon, work)
