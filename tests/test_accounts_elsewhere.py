"""Accounts that the settings do not have: a plugin of a third party keeps them, here in a dict."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import aiosmtplib
import pytest
from support.calling import called, log_in, push_session
from support.configuration import PASSWORD, configuration
from support.salmon import Salmon
from support.world import OTHER, World, world

from salmon_revsmtp import SettingsError, hookimpl
from salmon_revsmtp.plugins.manager import Plugins
from salmon_revsmtp.provider import lookups
from salmon_revsmtp.server.checks import _accounts_twice
from salmon_revsmtp.server.provider_requests import ProviderRequests

Keys = dict[str, Any]


def account(name: str, *domains: str, **keys: Any) -> Keys:
    return {"name": name, "password": PASSWORD, "domains": list(domains), **keys}


class Shelf:
    """A plugin that keeps accounts in a dict.

    ``fails``  it raises this; ``hangs``: it does not return until that is set.
    """

    def __init__(self, *accounts: Keys) -> None:
        self.accounts = {one["name"]: one for one in accounts}
        self.fails: Exception | None = None
        self.hangs: threading.Event | None = None
        self.asked: list[str] = []

    def _answer(self, asked: str, found: Keys | None) -> Keys | None:
        self.asked.append(asked)
        if self.hangs is not None:
            self.hangs.wait(60)
        if self.fails is not None:
            raise self.fails
        return found

    @hookimpl
    def find_account(self, name: str) -> Mapping[str, Any] | None:
        return self._answer(name, self.accounts.get(name))

    @hookimpl
    def account_for(self, domain: str) -> Mapping[str, Any] | None:
        has = (one for one in self.accounts.values() if domain in one["domains"])
        return self._answer(domain, next(has, None))

    @hookimpl
    def list_accounts(self) -> Iterable[Mapping[str, Any]]:
        return iter(self.accounts.values())


def with_shelf(
    salmon: Salmon, shelf: Shelf, work: Callable[[World], Awaitable[None]], **options: Any
) -> None:
    plugins = Plugins.load()
    plugins.register(shelf, "shelf")

    async def main() -> None:
        options.setdefault("accounts", [])
        async with world(salmon, plugins, **options) as here:
            await work(here)

    asyncio.run(main())


async def code(here: World, *recipients: str) -> str:
    """What the first recipient that is refused hears; "250" where none is."""
    try:
        refused = await here.send(*recipients)
    except aiosmtplib.SMTPRecipientsRefused as error:
        return f"{error.recipients[0].code} {error.recipients[0].message[:5]}"
    except aiosmtplib.SMTPResponseException as error:
        return f"{error.code} {error.message[:5]}"
    return next((f"{one[0]} {one[1][:5]}" for one in refused.values()), "250")


# -- what works ------------------------------------------------------------------------------------


def test_mail_is_held_for_it_and_collected(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        assert await code(here, "b@Example.ORG") == "250"
        assert await code(here, "b@example.net") == "550 5.7.1"
        assert [one.account for one in here.held()] == ["acme"]
        async with push_session(here.odmr) as customer:
            assert (await customer.asks("MAIL", "250 ok")).startswith("MAIL FROM:<a@example.net>")
            await customer.asks("RCPT TO:<b@Example.ORG>", "250 ok")
            await customer.asks("DATA", "354 go on")
            while await customer.hear() != ".":
                pass
            customer.say("250 taken")
            await here.until(lambda: not here.held())

    with_shelf(salmon, Shelf(account("acme", "example.org")), work)


def test_live_works_for_it_also_long_after_rcpt(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer of the plugin counts for no time here, so all is looked up each time."""
    monkeypatch.setattr(lookups, "FRESH", 0.0)

    async def work(here: World) -> None:
        async with push_session(here.odmr) as customer:
            sending = asyncio.create_task(code(here, "b@example.org"))
            await customer.asks("MAIL", "250 ok")
            await customer.asks("RCPT", "250 who is that")
            await customer.asks("RSET", "250 ok")
            await customer.asks("MAIL", "250 ok")
            await customer.asks("RCPT", "250 ok")
            await customer.asks("DATA", "354 go on")
            while await customer.hear() != ".":
                pass
            customer.say("554 5.7.1 I do not want it")
            assert await sending == "554 5.7.1"
            assert here.held() == []

    with_shelf(salmon, Shelf(account("acme", "example.org")), work)


def test_its_quota_counts(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        assert [await code(here, "b@example.org") for _ in range(2)] == ["250", "452 4.2.2"]

    with_shelf(salmon, Shelf(account("acme", "example.org", quota_messages=1)), work)


def test_etrn_finds_it(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        asked = ("example.org", "sub.example.org", "@example.org", "example.net", "example.com")
        answers = await here.ask(*asked)
        assert [one[:3] for one in answers] == ["251", "251", "251", "459", "459"]

    domains = ("example.org", "sub.example.org")
    shelf = Shelf(account("acme", *domains, etrn="127.0.0.1:9"), account("club", "example.com"))
    with_shelf(salmon, shelf, work)


def test_a_wrong_password_and_a_disabled_account_hear_the_same(salmon: Salmon) -> None:
    async def work(here: World) -> None:
        heard = []
        for name, password in (("acme", "wrong"), ("off", PASSWORD), ("nobody", PASSWORD)):
            async with called(here.odmr) as customer:
                heard.append(await log_in(customer, name, password))
        assert len(set(heard)) == 1 and heard[0].startswith("535 ")

    shelf = Shelf(account("acme", "example.org"), account("off", "example.com", enabled=False))
    with_shelf(salmon, shelf, work)


def test_the_settings_win(salmon: Salmon) -> None:
    """A name that they have is theirs, and so is a domain."""
    theirs = "another " + PASSWORD
    shelf = Shelf(
        account("other", "example.net", password=theirs),
        account("acme", "example.com", "example.org"),
    )

    async def work(here: World) -> None:
        assert await code(here, "b@example.com") == "250"
        assert await code(here, "b@example.org") == "250"
        assert await code(here, "b@example.net") == "550 5.7.1"
        assert [one.account for one in here.store.listing()] == ["other", "acme"]
        async with called(here.odmr) as customer:
            assert (await log_in(customer, "other", theirs))[:3] == "535"
        async with called(here.odmr) as customer:
            assert (await log_in(customer, "other"))[:3] == "235"
        async with called(here.odmr) as customer:
            assert (await log_in(customer, "acme"))[:3] == "235"
            customer.say("ATRN example.com")
            await customer.replied(450)

    with_shelf(salmon, shelf, work, accounts=[OTHER])


def test_check_says_what_is_in_both() -> None:
    plugins = Plugins.load()
    shelf = Shelf(account("other", "example.net"), account("acme", "example.com"))
    plugins.register(shelf, "shelf")
    valid = configuration(plugins=plugins, accounts=[OTHER], provider={})
    name, domain = [one.text for one in _accounts_twice(valid, plugins, offline=False)]
    assert name.startswith("the name is in customer_accounts and elsewhere (plugin shelf), too")
    assert domain.startswith("example.com is also that of account 'acme' elsewhere (plugin shelf)")
    shelf.fails = OSError("no route")
    [failed] = _accounts_twice(valid, plugins, offline=False)
    assert (failed.result, failed.text[:25]) == ("warning", "they cannot be looked up:")


def test_without_such_a_plugin_accounts_have_to_be_in_the_settings() -> None:
    with pytest.raises(SettingsError, match="customer_accounts: missing"):
        configuration(provider={})
    plugins = Plugins.load()
    plugins.register(Shelf(), "shelf")
    assert configuration(plugins=plugins, provider={}).elsewhere == {"shelf"}
    hold = {"hold": "postgresql://h/d"}
    assert configuration(provider=hold).elsewhere == {"postgres"}


def test_provider_accounts_lists_it_with_where_it_is_from(salmon: Salmon) -> None:
    async def rows(here: World, **request: Any) -> list[tuple[str, str | None, Any]]:
        requests = ProviderRequests(here.collector.providing, here.daemon.provider)
        answers = requests.answer({"do": "provider accounts", **request})
        found = [one["account"] async for one in answers if "account" in one]
        return [(one["account"], one["from"], one["enabled"]) for one in found]

    async def work(here: World) -> None:
        await code(here, "b@example.org")
        await code(here, "b@gone.example")
        del shelf.accounts["gone"]
        await asyncio.sleep(1.1 * lookups.FRESH)
        expected = [("other", "settings", True), ("acme", "shelf", True), ("gone", None, None)]
        assert await rows(here) == expected
        assert await rows(here, account="acme") == [expected[1]]
        assert await rows(here, account="gone") == [expected[2]]
        assert await rows(here, account="nobody") == []

    shelf = Shelf(account("acme", "example.org"), account("gone", "gone.example"))
    with_shelf(salmon, shelf, work, accounts=[OTHER])


# -- what changes ----------------------------------------------------------------------------------


def test_a_change_has_effect_within_a_second(salmon: Salmon) -> None:
    shelf = Shelf(account("acme", "example.org"))

    async def work(here: World) -> None:
        assert await code(here, "b@example.org") == "250"
        asked = len(shelf.asked)
        shelf.accounts["acme"]["domains"] = ["example.com"]
        assert await code(here, "b@example.org") == "250", "the answer is kept for a moment"
        assert len(shelf.asked) == asked
        await asyncio.sleep(1.1 * lookups.FRESH)
        assert await code(here, "b@example.org") == "550 5.7.1"
        assert await code(here, "b@example.com") == "250"

    with_shelf(salmon, shelf, work)


Change = Callable[[Shelf], object]
CHANGES: dict[str, Change] = {
    "disabled": lambda shelf: shelf.accounts["acme"].update(enabled=False),
    "another password": lambda shelf: shelf.accounts["acme"].update(password="another"),
    "gone": lambda shelf: shelf.accounts.pop("acme"),
    "no push sessions": lambda shelf: shelf.accounts["acme"].update(push=False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_session_of_an_account_that_has_changed_ends(
    salmon: Salmon, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    shelf = Shelf(account("acme", "example.org"), account("other", "example.com"))

    async def work(here: World) -> None:
        async with push_session(here.odmr) as customer, push_session(here.odmr, "other"):
            CHANGES[what](shelf)
            await asyncio.wait_for(customer.left(), 5)
            await here.until(lambda: len(here.daemon.sessions) == 1)

    with caplog.at_level(logging.WARNING):
        with_shelf(salmon, shelf, work)
    [line] = [one for one in caplog.messages if "its session ends" in one]
    assert line.startswith("account=acme ") and what in line


def test_a_session_does_not_end_because_the_plugin_fails(salmon: Salmon) -> None:
    shelf = Shelf(account("acme", "example.org"))

    async def work(here: World) -> None:
        async with push_session(here.odmr):
            shelf.fails = OSError("no route")
            asked = len(shelf.asked)
            await here.until(lambda: len(shelf.asked) >= asked + 3)
            assert len(here.daemon.sessions) == 1

    with_shelf(salmon, shelf, work)


def test_an_account_that_changes_between_login_and_atrn(salmon: Salmon) -> None:
    shelf = Shelf(account("acme", "example.org"))

    async def work(here: World) -> None:
        async with called(here.odmr) as customer:
            assert (await log_in(customer))[:3] == "235"
            shelf.accounts["acme"]["password"] = "another"
            await asyncio.sleep(1.1 * lookups.FRESH)
            customer.say("ATRN")
            assert (await customer.replied(450)).startswith("450 4.7.1 your account has changed")

    with_shelf(salmon, shelf, work)


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises", "hangs", "nonsense", "another"])
def test_nothing_is_refused_for_good_because_a_plugin_cannot_tell(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    monkeypatch.setattr(lookups, "PATIENCE", 2.0)
    shelf, go = Shelf(account("acme", "example.org")), threading.Event()
    good = shelf.accounts["acme"]
    if how == "raises":
        shelf.fails = OSError("no route to the database")
    elif how == "hangs":
        shelf.hangs = go
    elif how == "nonsense":
        shelf.accounts["acme"] = {**good, "quota": "much"}
    else:
        shelf.accounts["acme"] = account("somebody", "example.org")
        shelf.accounts["somebody"] = account("acme", "example.net")

    async def work(here: World) -> None:
        if how != "another":
            assert await code(here, "b@example.org") == "451 4.3.0"
        async with called(here.odmr) as customer:
            heard = await log_in(customer)
            assert heard.startswith("454 4.7.0 "), heard
            customer.say("NOOP")
            await customer.replied(250)
        shelf.fails, shelf.hangs, shelf.accounts = None, None, {"acme": good}
        go.set()
        await asyncio.sleep(1.1 * lookups.FRESH)
        assert await code(here, "b@example.org") == "250"
        async with called(here.odmr) as customer:
            assert (await log_in(customer))[:3] == "235"

    with caplog.at_level(logging.ERROR):
        with_shelf(salmon, shelf, work)
    assert "accounts cannot be looked up: " in caplog.text and "Traceback" not in caplog.text
    assert PASSWORD not in caplog.text


def test_a_plugin_that_fails_after_rcpt(salmon: Salmon, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said yes to the recipient, and cannot say whose the message is."""
    monkeypatch.setattr(lookups, "FRESH", 0.0)
    shelf = Shelf(account("acme", "example.org"))

    async def work(here: World) -> None:
        async with here.client() as client:
            client.say("MAIL FROM:<a@example.net>", "RCPT TO:<b@example.org>", "DATA")
            await client.replied(250)
            await client.replied(250)
            await client.replied(354)
            shelf.fails = OSError("no route")
            client.say("Subject: x", "", "hello", ".")
            assert (await client.replied(451)).startswith("451 4.3.0 ")
            shelf.fails = None
        assert await code(here, "b@example.org") == "250"
        assert len(here.held()) == 1

    with_shelf(salmon, shelf, work)


def test_what_a_plugin_said_is_so_until_it_says_otherwise(
    salmon: Salmon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one domain of a message is looked up, the database goes, and another one, which was
    looked up before, is asked for again in vain."""
    monkeypatch.setattr(lookups, "FRESH", 0.0)
    go, asked = threading.Event(), []

    class Slow(Shelf):
        @hookimpl
        def account_for(self, domain: str) -> Mapping[str, Any] | None:
            if domain != "example.com":
                return super().account_for(domain)
            asked.append(domain)
            if len(asked) > 1:
                go.wait(30)
            return account("slow", domain)

    shelf = Slow(account("acme", "example.org"))

    async def work(here: World) -> None:
        async with here.client() as client:
            client.say("MAIL FROM:<a@example.net>")
            client.say("RCPT TO:<b@example.org>", "RCPT TO:<c@example.com>", "DATA")
            for code_ in (250, 250, 250, 354):
                await client.replied(code_)
            client.say("Subject: x", "", "hello", ".")
            await here.until(lambda: len(asked) == 2)
            shelf.fails = OSError("no route")
            assert await code(here, "b@example.org") == "451 4.3.0"
            go.set()
            await client.replied(250)
        assert len(here.held()) == len(here.held("slow")) == 1

    with_shelf(salmon, shelf, work)


def test_one_line_of_a_plugin_that_fails_all_the_time(
    salmon: Salmon, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    shelf.fails = OSError("no route")

    async def work(here: World) -> None:
        for number in range(20):
            assert await code(here, f"b@{number}.example.org") == "451 4.3.0"

    with caplog.at_level(logging.ERROR):
        with_shelf(salmon, shelf, work)
    assert caplog.text.count("accounts cannot be looked up") == 1


def test_who_asks_for_the_same_at_the_same_time_asks_once() -> None:
    shelf = Shelf(account("acme", "example.org"))
    shelf.hangs = threading.Event()
    plugins = Plugins()
    plugins.register(shelf, "shelf")
    settings: Any = SimpleNamespace()
    asking = lookups.Lookups(plugins, settings)

    async def main() -> list[Any]:
        several = [asking.look_up("find_account", "acme") for _ in range(50)]
        gathered = asyncio.gather(*several)
        await asyncio.sleep(0)
        assert shelf.hangs is not None
        shelf.hangs.set()
        return await gathered

    assert {one.name for one in asyncio.run(main())} == {"acme"}
    assert shelf.asked == ["acme"]


def test_no_customer_waits_for_senders_of_many_domains() -> None:
    over = threading.Event()

    class Slow(Shelf):
        @hookimpl
        def account_for(self, domain: str) -> Keys | None:
            over.wait()
            return None

    plugins = Plugins()
    plugins.register(Slow(account("acme", "example.org")), "shelf")
    settings: Any = SimpleNamespace()
    asking = lookups.Lookups(plugins, settings)

    async def main() -> Any:
        domains = [f"{number}.example" for number in range(2 * lookups.THREADS)]
        senders = [asyncio.create_task(asking.look_up("account_for", one)) for one in domains]
        await asyncio.sleep(0)
        found = await asking.look_up("find_account", "acme")
        assert not any(one.done() for one in senders)
        over.set()
        await asyncio.gather(*senders)
        return found

    try:
        assert asyncio.run(main()).name == "acme"
    finally:
        over.set()
        asking.close()
