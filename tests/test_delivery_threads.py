"""A service with several delivery threads: what runs side by side, what waits for what."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from salmon import queue
from salmon.mail import MailRequest
from salmon.routing import Router, ShelveStorage, nolocking, route, stateless
from salmon.server import SMTPError
from support.configuration import DEFAULT, agent_keys, configuration
from support.dialogue import Dialogue, Script, no_more_mail, scripted
from support.nexthop import Call, load, next_host
from support.salmon import Salmon

from salmon_revsmtp import Agent, Reply, SettingsError, hookimpl
from salmon_revsmtp.customer.report import Report
from salmon_revsmtp.delivery.inhand import InHand
from salmon_revsmtp.delivery.maildir import keep_together, push_safely
from salmon_revsmtp.files import exclusive_lock
from salmon_revsmtp.handlers import mailboxes, nexthop
from salmon_revsmtp.journal.deliveries import MessageKey
from salmon_revsmtp.net.outcome import Outcome
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.server.collector import Collector

LONG = 20.0
# Seconds in which two handlers would meet that must not; long enough for a thread to wake up.
SHORT = 0.05


def beside(
    salmon: Salmon, pattern: str, action: Callable[[MailRequest], object] = lambda message: None
) -> None:
    """Route addresses to a handler that Salmon runs beside others."""

    def handler(message: MailRequest, **captures: str) -> None:
        salmon.handled.append(message)
        action(message)

    route(pattern)(stateless(nolocking(handler)))


class Meeting:
    """Handlers that go on when so many of them have come, and defer the mail otherwise."""

    def __init__(self, handlers: int, seconds: float = LONG) -> None:
        self._barrier = threading.Barrier(handlers)
        self._seconds = seconds

    def __call__(self, message: MailRequest | None = None) -> None:
        try:
            self._barrier.wait(self._seconds)
        except threading.BrokenBarrierError:
            raise SMTPError(451, "the others did not come") from None


class Gate:
    """A handler that goes on when it may."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, message: MailRequest) -> None:
        self.reached.set()
        if not self.opened.wait(LONG):
            raise SMTPError(451, "no one has opened the gate")


def transaction(*names: str, text: str = "", sender: str = "ann@example.net") -> bytes:
    """A message for these at example.org, as it is written down ahead of all answers."""
    recipients = [f"{name}@example.org" for name in names]
    data = f"Subject: {text or names[0]}\r\n\r\nhello\r\n".encode()
    lines = [f"MAIL FROM:<{sender}>", *(f"RCPT TO:<{one}>" for one in recipients)]
    commands = "".join(f"{line}\r\n" for line in lines).encode()
    return commands + b"BDAT %d LAST\r\n" % len(data) + data


async def answers_to(
    provider: Dialogue, *transactions: bytes, heard: Callable[[int], object] = lambda number: None
) -> list[str]:
    """Send these in one piece; returns the answers to the data.  ``heard`` is told how many there
    are so far."""
    provider.say(b"".join(transactions) + b"NOOP")
    answers: list[str] = []
    while len(answers) < len(transactions):
        line = await provider.hear()
        if not line.startswith("250 2.1."):  # to MAIL or RCPT
            answers.append(line)
            heard(len(answers))
    await provider.hear("250 2.0.0 ok")
    return answers


def sends(*transactions: bytes, code: int = 250) -> Script:
    """A provider that sends these, and hears this code for each."""

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        answers = await answers_to(provider, *transactions)
        assert [answer[:3] for answer in answers] == [str(code)] * len(transactions)
        await provider.quit()

    if code != 250:
        script.in_vain = True  # type: ignore[attr-defined]
    return script


def collected(
    salmon: Salmon, script: Script, *, plugins: Plugins | None = None, **service: Any
) -> Report:
    """Collect once from a provider with this script."""
    [report] = all_collected(salmon, script, plugins=plugins, default=service)
    return report


def all_collected(
    salmon: Salmon,
    *scripts: Script,
    plugins: Plugins | None = None,
    agents: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda agents: agents,
    **services: dict[str, Any],
) -> list[Report]:
    """Collect at the same time from providers with these scripts; each has an agent of its own."""
    plugins = plugins or Plugins.load()

    async def start(scripts: list[Script], ports: list[int]) -> list[Report]:
        if scripts:
            # Who has brought nothing is not called again.
            again = () if hasattr(scripts[0], "in_vain") else (no_more_mail,)
            async with scripted(scripts[0], *again) as port:
                return await start(scripts[1:], [*ports, port])
        keys = agents([agent_keys(port, name=f"isp{port}") for port in ports])
        given: dict[str, Any] = {
            name: {**DEFAULT, "delivery_threads": 2, **keys} for name, keys in services.items()
        }
        valid = configuration(*keys, plugins=plugins, **given)
        with Collector(valid, plugins, lambda: salmon.relay) as collector:
            return await collector.collect(valid.agents)

    return asyncio.run(start(list(scripts), []))


def to(salmon: Salmon) -> list[str]:
    """Who has been served, in order."""
    return [message.To.partition("@")[0] for message in salmon.handled]


# -- side by side ---------------------------------------------------------------------------------


def test_handlers_run_at_the_same_time_for_one_session(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    beside(salmon, ".*", Meeting(3))
    messages = [transaction(f"r{number}") for number in range(6)]
    report = collected(salmon, sends(*messages), delivery_threads=3)
    assert (report.outcome, report.messages) == (Outcome.COLLECTED, 6)
    for number in range(6):
        assert caplog.text.count(f"to=<r{number}@example.org>") == 1, "one line for each"
    assert "delivery_threads" not in caplog.text


def test_no_more_run_than_there_are_threads(salmon: Salmon) -> None:
    beside(salmon, ".*", Meeting(3, SHORT))
    messages = [transaction(f"r{number}") for number in range(6)]
    collected(salmon, sends(*messages, code=451), delivery_threads=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_service_does_not_wait_for_the_slow_handlers_of_another(
    salmon: Salmon, threads: int
) -> None:
    """Whichever of them has threads of its own."""
    gate = Gate()
    beside(salmon, "slow@.*", gate)
    beside(salmon, "quick@.*")

    async def slow(provider: Dialogue) -> None:
        await sends(transaction("slow", text="1"), transaction("slow", text="2"))(provider)

    async def quick(provider: Dialogue) -> None:
        await provider.reverse()
        assert await asyncio.to_thread(gate.reached.wait, LONG)
        [answer] = await answers_to(provider, transaction("quick"))
        assert answer.startswith("250 ")
        gate.opened.set()
        await provider.quit()

    def agents(keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**keys[0], "service": "slow"}, keys[1]]

    service = {"delivery_threads": threads}
    other = {"delivery_threads": 3 - threads}
    reports = all_collected(salmon, slow, quick, agents=agents, slow=service, default=other)
    assert [report.messages for report in reports] == [2, 1]


class Hooks:
    """A plugin whose hooks for messages wait for each other."""

    def __init__(self, messages: int) -> None:
        self._received, self._delivered = Meeting(messages), Meeting(messages)
        self.told: list[tuple[str, str]] = []

    @hookimpl
    def message_received(self, agent: Agent, message: bytes) -> Reply | None:
        self._received()
        return Reply(550, "no", "5.7.1") if b"Subject: bad" in message else None

    @hookimpl
    def message_delivered(self, agent: Agent, recipient: str, reply: Reply) -> None:
        self._delivered()
        self.told.append((recipient, str(reply)[:3]))


def test_hooks_for_messages_of_one_agent_run_at_the_same_time(salmon: Salmon) -> None:
    beside(salmon, ".*", Meeting(2))
    plugins, hooks = Plugins.load(), Hooks(3)
    plugins.register(hooks)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        messages = transaction("a"), transaction("bad"), transaction("b")
        answers = await answers_to(provider, *messages)
        assert [answer[:3] for answer in answers] == ["250", "550", "250"]
        await provider.quit()

    collected(salmon, script, plugins=plugins, delivery_threads=3)
    served = [("a@example.org", "250"), ("b@example.org", "250"), ("bad@example.org", "550")]
    assert sorted(hooks.told) == served


def test_with_hooks_agents_share_the_number_of_handlers(salmon: Salmon) -> None:
    beside(salmon, ".*", Meeting(3, SHORT))
    plugins = Plugins.load()
    plugins.register(Hooks(1))
    several = [transaction(f"r{number}") for number in range(2)]
    others = [transaction(f"s{number}") for number in range(2)]
    scripts = sends(*several, code=451), sends(*others, code=451)
    all_collected(salmon, *scripts, plugins=plugins, default={})


def test_each_handler_has_its_own_message_and_envelope(salmon: Salmon) -> None:
    """What is kept for one handler that raises is not kept for another."""
    meet = Meeting(3)

    def explodes(message: MailRequest) -> None:
        meet()
        raise RuntimeError(message.To)

    beside(salmon, ".*", explodes)
    messages = [transaction(name, sender=f"from-{name}@example.net") for name in "abc"]
    collected(salmon, sends(*messages), delivery_threads=3)
    kept = sorted(one.splitlines()[:2] for one in salmon.undeliverable())
    assert kept == [
        [b"Return-Path: <from-%b@example.net>" % name, b"Delivered-To: %b@example.org" % name]
        for name in (b"a", b"b", b"c")
    ]


def test_failures_are_told_for_each_message(salmon: Salmon) -> None:
    meet = Meeting(2)
    beside(salmon, "[ab]@.*", meet)

    def refuses(message: MailRequest) -> None:
        raise SMTPError(550, "5.1.1 no such user")

    beside(salmon, "no@.*", refuses)
    messages = [transaction(name, "no", sender=f"{name}@example.net") for name in "ab"]
    collected(salmon, sends(*messages))
    assert sorted(to for _, to, _ in salmon.relayed) == ["a@example.net", "b@example.net"]


def test_in_queue_mode_messages_are_stored_at_the_same_time(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, meet = keep_together, Meeting(2)

    def kept(*arguments: Any) -> list[str | BaseException]:
        meet()
        return keep(*arguments)

    monkeypatch.setattr("salmon_revsmtp.delivery.queue.keep_together", kept)
    messages = [transaction(f"r{number}") for number in range(40)]
    report = collected(salmon, sends(*messages), delivery="queue")
    assert report.messages == 40
    stored = queue.Queue("run/inbound")
    texts = {stored.mbox.get_bytes(key).rpartition(b"Subject: ")[2] for key in stored.keys()}
    assert len(texts) == 40


# -- the same message twice -----------------------------------------------------------------------


def test_a_message_that_is_in_hand_waits_in_no_thread(salmon: Salmon) -> None:
    """The second waits for the first, while its thread does what comes after it."""
    gate = Gate()
    beside(salmon, "same@.*", gate)
    beside(salmon, "other@.*", lambda message: gate.opened.set())
    same = transaction("same")
    report = collected(salmon, sends(same, same, same, transaction("other")))
    assert sorted(to(salmon)) == ["other", "same"]
    assert report.messages == 2, "the others are repeats"


def test_two_agents_bring_the_same_message(salmon: Salmon) -> None:
    gate = Gate()
    beside(salmon, "same@.*", gate)
    beside(salmon, "other@.*", lambda message: gate.opened.set())
    plugins = Plugins.load()
    plugins.register(Hooks(1))  # each has threads of its own

    async def second(provider: Dialogue) -> None:
        await provider.reverse()
        assert await asyncio.to_thread(gate.reached.wait, LONG)
        answers = await answers_to(provider, transaction("same"), transaction("other"))
        assert [answer[:3] for answer in answers] == ["250", "250"]
        await provider.quit()

    first = sends(transaction("same"))
    all_collected(salmon, first, second, plugins=plugins, default={})
    assert to(salmon) == ["same", "other"]


def test_a_message_for_two_recipients_in_two_transactions(salmon: Salmon) -> None:
    """Neither waits for the other."""
    beside(salmon, "[ab]@.*", Meeting(2))
    both = [transaction(name, text="the same") for name in "ab"]
    collected(salmon, sends(*both))
    assert sorted(to(salmon)) == ["a", "b"]


def test_a_recipient_of_two_transactions_is_served_once(salmon: Salmon) -> None:
    gate = Gate()
    beside(salmon, "a@.*", gate)
    beside(salmon, "[bc]@.*")
    beside(salmon, "other@.*", lambda message: gate.opened.set())
    first, second = transaction("a", "b", text="it"), transaction("b", "c", text="it")
    collected(salmon, sends(first, second, second, transaction("other")))
    assert sorted(to(salmon)) == ["a", "b", "c", "other"]


def test_a_handler_that_hangs_holds_up_its_own_thread_only(salmon: Salmon) -> None:
    """However often its message comes again."""
    gate = Gate()
    beside(salmon, "slow@.*", gate)
    beside(salmon, "quick@.*")
    slow = transaction("slow")

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        for number in range(3):
            quick = [transaction("quick", text=f"{number} {one}") for one in range(5)]
            answers = await answers_to(provider, slow, *quick)
            assert [answer[:3] for answer in answers] == ["451", *["250"] * 5]
        assert gate.reached.is_set()
        assert not gate.opened.is_set()
        gate.opened.set()
        for _ in range(2):  # the first may be late, on a busy machine
            [answer] = await answers_to(provider, slow)
        assert answer.startswith("250 ")
        await provider.quit()

    collected(salmon, script, handler_timeout=2)
    assert to(salmon).count("slow") == 1
    assert to(salmon).count("quick") == 15


@pytest.mark.parametrize("how", ["too late", "gone"])
def test_an_agent_whose_repeat_waits_in_vain_is_free(salmon: Salmon, how: str) -> None:
    """Its message was answered 451, or its provider has left.  Nothing will be done for it,
    although the first copy, which another agent has brought, is in its handler still."""
    gate, other_handled, free = Gate(), threading.Event(), []

    def other(message: MailRequest) -> None:
        other_handled.set()
        raise SMTPError(451, "so that the agent does not call again")

    beside(salmon, "same@.*", gate)
    beside(salmon, "other@.*", other)

    async def second(provider: Dialogue) -> None:
        await provider.reverse()
        assert await asyncio.to_thread(gate.reached.wait, LONG)
        if how == "gone":
            provider.say(transaction("same") + transaction("other") + b"NOOP")
            assert await asyncio.to_thread(other_handled.wait, LONG)
            provider.abort()
        else:
            [answer] = await answers_to(provider, transaction("same"))
            assert answer.startswith("451 4.3.0 not done in 0.5 seconds")
            await provider.quit()

    async def main() -> None:
        first = sends(transaction("same"), code=451)
        async with scripted(first) as one, scripted(second) as other:
            keys = [agent_keys(one, name="one"), agent_keys(other, name="other")]
            service = {**DEFAULT, "delivery_threads": 2, "handler_timeout": 0.5}
            valid = configuration(*keys, default=service)
            with Collector(valid, Plugins.load(), lambda: salmon.relay) as collector:
                await collector.collect(valid.agents)
                assert not gate.opened.is_set()
                for name in ("one", "other"):
                    with exclusive_lock(Path(f"run/agent-{name}.lock")) as had:
                        free.append(had)
                gate.opened.set()

    asyncio.run(main())
    assert free == [False, True]


# -- the end --------------------------------------------------------------------------------------


def test_a_stop_finishes_what_is_in_hand_in_all_threads(salmon: Salmon) -> None:
    meet, gate = Meeting(4), Gate()

    def handle(message: MailRequest) -> None:
        meet()
        gate(message)

    beside(salmon, "[abc]@.*", handle)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        messages = [transaction(name) for name in ("a", "b", "b", "a", "c")]
        provider.writer.write(b"".join(messages))
        answers: list[str] = []
        while len(answers) < 6:
            line = await provider.hear()
            if not line.startswith("250 2.1."):
                answers.append(line[:3])
        assert answers == ["250"] * 5 + ["421"]

    async def main() -> Collector:
        async with scripted(script) as port:
            keys = {**DEFAULT, "delivery_threads": 3}
            valid = configuration(agent_keys(port), default=keys)
            collector = Collector(valid, Plugins.load(), lambda: salmon.relay)
            collecting = asyncio.create_task(
                collector.collect(valid.agents, signals=[signal.SIGUSR1])
            )
            await asyncio.to_thread(meet)
            os.kill(os.getpid(), signal.SIGUSR1)
            while not collector.interrupted:
                await asyncio.sleep(0.01)
            gate.opened.set()
            await asyncio.wait_for(collecting, LONG)
        return collector

    with asyncio.run(main()) as collector:
        assert collector.interrupted
    assert sorted(to(salmon)) == ["a", "b", "c"]


def test_what_waits_for_a_handler_that_hangs_is_let_go_when_the_threads_are_closed(
    salmon: Salmon,
) -> None:
    gate, other_handled = Gate(), threading.Event()
    beside(salmon, "same@.*", gate)
    # By the other thread, which had the second copy before.
    beside(salmon, "other@.*", lambda message: other_handled.set())
    said = []

    async def second(provider: Dialogue) -> None:
        await provider.reverse()
        assert await asyncio.to_thread(gate.reached.wait, LONG)
        said.extend(await answers_to(provider, transaction("same"), transaction("other")))
        gate.opened.set()
        await provider.quit()

    async def main() -> None:
        first = sends(transaction("same"))
        async with (
            scripted(first, no_more_mail) as one,
            scripted(second, no_more_mail) as other,
        ):
            keys = [agent_keys(one, name="one"), agent_keys(other, name="other")]
            valid = configuration(*keys, default={**DEFAULT, "delivery_threads": 2})
            with Collector(valid, Plugins.load(), lambda: salmon.relay) as collector:
                collecting = asyncio.create_task(collector.collect(valid.agents))
                assert await asyncio.to_thread(other_handled.wait, LONG)
                collector.close()
                await asyncio.wait_for(collecting, LONG)

    asyncio.run(main())
    assert said == ["451 4.3.2 shutting down, try again later", "250 2.0.0 delivered"]
    assert to(salmon) == ["same", "other"]


# -- the handlers that come with it ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lmtp", "smtp"])
def test_four_messages_are_handed_on_at_the_same_time_and_their_connections_kept(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    meet = threading.Barrier(4)

    def script(call: Call) -> None:
        call.greet(hello="LHLO" if kind == "lmtp" else "EHLO")
        for _ in range(2):
            call.up_to_data()
            call.data()
            meet.wait(LONG)
            call.say("250 2.0.0 saved")

    nexthop.next_hop.cache_clear()
    with next_host(*[script] * 4, at_once=True) as server:
        load(monkeypatch, kind, **{f"{kind}_server": server})
        first, second = ([transaction(f"{name}{one}") for name in "abcd"] for one in range(2))

        async def sends_four_twice(provider: Dialogue) -> None:
            await provider.reverse()
            for four in (first, second):
                answers = await answers_to(provider, *four)
                assert [answer[:3] for answer in answers] == ["250"] * 4
            await provider.quit()

        collected(salmon, sends_four_twice, delivery_threads=4)
    nexthop.next_hop.cache_clear()
    assert salmon.undeliverable() == []


def test_four_messages_are_stored_at_the_same_time(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet = Meeting(4)

    def meet_and_push(*arguments: Any) -> str:
        meet()
        return push_safely(*arguments)

    monkeypatch.setattr(mailboxes, "push_safely", meet_and_push)
    load(monkeypatch, "maildir", maildirs="mail")
    collected(salmon, sends(*(transaction(name) for name in "abcd")), delivery_threads=4)
    assert sorted(one.name[0] for one in Path("mail").iterdir()) == list("abcd")
    assert len(list(Path("mail").glob("*/new/*"))) == 4


# -- where Salmon cannot have more than one -------------------------------------------------------


HANDLERS = """
from salmon.routing import nolocking, route, stateless

@route("(address)@(host)", address=".+", host=".+")
@stateless
@nolocking
def START(message, address=None, host=None):
    with open("handled", "a") as file:
        file.write(f"{address}\\n")
"""


def test_with_reload_no_route_is_lost(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: Any
) -> None:
    """Handlers run one at a time then, also those of services with one thread."""
    (tmp_path / "reloaded_handlers.py").write_text(HANDLERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr(Router, "HANDLERS", {})
    Router.load(["reloaded_handlers"])
    monkeypatch.setattr(Router, "RELOAD", True)
    try:
        scripts = [sends(*(transaction(f"r{two}{one}") for one in range(30))) for two in range(2)]

        def agents(keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{**keys[0], "service": "one"}, keys[1]]

        one, several = {"delivery_threads": 1}, {"delivery_threads": 4}
        all_collected(salmon, *scripts, agents=agents, one=one, default=several)
    finally:
        del sys.modules["reloaded_handlers"]
    assert salmon.undeliverable() == []
    assert len(set((tmp_path / "handled").read_text().split())) == 60
    assert caplog.text.count("handlers run one at a time, because Router.RELOAD is on") == 1


def test_reload_that_is_turned_off_lets_handlers_run_at_the_same_time(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(Router, "RELOAD", True)
    monkeypatch.setattr(Router, "reload", lambda: None)  # these handlers are of no module
    alone, meet = Meeting(2, SHORT), Meeting(2)
    beside(salmon, "alone@.*", alone)
    beside(salmon, "[ab]@.*", meet)

    async def script(provider: Dialogue) -> None:
        await provider.reverse()
        twice = [transaction("alone", text=str(number)) for number in range(2)]
        answers = await answers_to(provider, *twice)
        assert [answer[:3] for answer in answers] == ["451", "451"]
        monkeypatch.setattr(Router, "RELOAD", False)
        answers = await answers_to(provider, transaction("a"), transaction("b"))
        assert [answer[:3] for answer in answers] == ["250", "250"]
        await provider.quit()

    collected(salmon, script)
    assert "handlers run at the same time again" in caplog.text


@pytest.mark.parametrize("storage", ["memory", "shelve"])
def test_a_state_in_salmons_memory_storage(
    salmon: Salmon,
    storage: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    meet = Meeting(2, SHORT if storage == "memory" else LONG)
    if storage == "shelve":
        monkeypatch.setattr(Router, "STATE_STORE", ShelveStorage("run/states"))

    def START(message: MailRequest, **captures: str) -> None:
        meet()

    route("[ab]@.*")(nolocking(START))
    code = 451 if storage == "memory" else 250
    collected(salmon, sends(transaction("a"), transaction("b"), code=code))
    said = "START keeps a state, and Router.STATE_STORE is Salmon's MemoryStorage"
    assert caplog.text.count(said) == (1 if storage == "memory" else 0)


def test_handlers_that_salmon_locks_gain_nothing_and_the_log_says_so(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    salmon.handle(".*", Meeting(2, SHORT))
    collected(salmon, sends(transaction("a"), transaction("b"), code=451))
    assert "delivery_threads=2: Salmon runs only handlers at the same time" in caplog.text


@pytest.mark.parametrize("found", [0, 257, 2.5, True, "2"])
def test_a_wrong_number_of_threads_is_an_error(found: object) -> None:
    with pytest.raises(SettingsError) as raised:
        configuration(default={"delivery_threads": found})
    [problem] = raised.value.problems
    assert problem.startswith('service "default": delivery_threads: found ')
    assert problem.endswith("allowed: a whole number from 1 to 256")


def test_held_mail_has_no_delivery_threads() -> None:
    accounts = [{"name": "acme", "password": "x" * 20, "domains": ["example.org"]}]
    with pytest.raises(SettingsError) as raised:
        configuration(accounts=accounts, default={"delivery": "hold", "delivery_threads": 2})
    [problem] = raised.value.problems
    assert "delivery_threads: found 2, allowed with delivery 'hold' is 1" in problem


# -- what is in hand ------------------------------------------------------------------------------


def key(name: str) -> MessageKey:
    return MessageKey.of("default", "ann@example.net", name.encode())


def test_what_is_in_hand_is_given_to_those_that_wait_in_their_order() -> None:
    in_hand, going_on = InHand[str](), list[str]()

    def take(item: str, *recipients: str) -> bool:
        return in_hand.take(item, key("it"), recipients, lambda: going_on.append(item))

    assert take("first", "a", "b")
    assert take("another", "c"), "nothing in common"
    assert in_hand.take("other", key("other"), ("a",), lambda: None)
    assert not take("second", "b", "d")
    assert not take("third", "b")
    assert not take("gone", "b")
    assert in_hand.forget("gone")
    assert not in_hand.forget("gone")
    assert not in_hand.forget("first")
    assert take("fourth", "d"), "whoever waits has taken nothing"
    in_hand.give_back("first")
    assert going_on == ["third", "second"], "each is put before the one before"
    assert take("third", "b")
    in_hand.give_back("third")
    assert not take("second", "b", "d")
    in_hand.close()
    assert going_on[2:] == ["second"]
    in_hand.give_back("fourth")
    assert going_on[2:] == ["second"]
    assert take("second", "b", "d")
