"""Accounts that the settings do not have: what plugins say, and how long that counts.

Plugins may block, so they are asked in threads.  What they say is kept for a second, and so is that
they could not say anything.  Whoever cannot be told whether there is an account hears that this is
for now: nothing is refused for good because a database is away.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from types import ModuleType
from typing import Any

from salmon_revsmtp.foreign import printable
from salmon_revsmtp.hooks import HookAsker, HookFailedError
from salmon_revsmtp.provider.settings import AccountSettings
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.settings import validated
from salmon_revsmtp.threads import Threads

__all__ = ["FRESH", "AccountsUnavailableError", "Lookups"]

log = logging.getLogger(__name__)

# Seconds for which an answer counts: so soon every host knows of a change.
FRESH = 1.0
# Seconds in which there has to be one: a client waits for 5 minutes at RCPT (RFC 5321 4.5.3.2.3),
# and a customer for one at AUTH.
PATIENCE = 10.0
# Threads in which a hook of plugins is asked, and questions that wait for one of them.  Senders and
# customers have some each: no one who asks for many domains has customers wait.
THREADS, MOST_WAITING = 16, 10_000
FIND_ACCOUNT, ACCOUNT_FOR = "find_account", "account_for"
# Answers that are kept; strangers may ask for any name.
MOST_KEPT = 10_000
# Seconds between two log lines with the same words, and how many words are remembered.
SAY_AGAIN, MOST_SAID = 60.0, 100

Key = tuple[str, str]


class AccountsUnavailableError(OSError):
    """It cannot be told now whether there is such an account."""


class _Answer:
    """``found``, or ``error`` and what was found before that; ``at``: when it was asked."""

    def __init__(
        self, at: float, found: AccountSettings | None, error: Exception | None = None
    ) -> None:
        self.at, self.found, self.error = at, found, error


class Lookups:
    """Asks plugins for accounts.  May be used from any thread.

    ``told``  whoever changes an account tells :meth:`forget`, and :meth:`still` until when no one
              has: what was said counts for so long, too.
    """

    def __init__(self, hooks: HookAsker, settings: ModuleType, told: bool = False) -> None:
        self._hooks, self._settings, self._are_told = hooks, settings, told
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, _Answer] = OrderedDict()
        kinds = (FIND_ACCOUNT, ACCOUNT_FOR)
        self._asking: dict[str, dict[Key, Future[_Answer]]] = {one: {} for one in kinds}
        self._threads = {one: Threads(one, THREADS) for one in kinds}
        self._changed_at = -1.0  # what was asked before does not count any more
        self._unchanged_at = -math.inf  # then all that was said before was still so
        self._saying = threading.Lock()
        self._said: OrderedDict[str, float] = OrderedDict()

    # -- what is known --------------------------------------------------------------------------

    def last(self, hook: str, key: str) -> AccountSettings | None:
        """What was said last, however long ago; ``None`` also where nothing was."""
        kept = self._kept.get((hook, key))
        return kept.found if kept is not None else None

    def fresh(self, hook: str, key: str) -> bool:
        """Whether an answer is there that counts still."""
        kept = self._kept.get((hook, key))
        return kept is not None and kept.error is None and self._counts(kept)

    def _counts(self, answer: _Answer) -> bool:
        if answer.error is not None:
            return time.monotonic() - answer.at <= FRESH
        since = max(answer.at, self._unchanged_at)
        return time.monotonic() - since <= FRESH and answer.at > self._changed_at

    def forget(self) -> None:
        """Something has changed: ask again."""
        self._changed_at = time.monotonic()

    def still(self, at: float) -> None:
        """Nothing had changed at this time (:func:`time.monotonic`) but what :meth:`forget` was
        told of."""
        if self._are_told:
            self._unchanged_at = at

    # -- asking ---------------------------------------------------------------------------------

    async def look_up(self, hook: str, key: str) -> AccountSettings | None:
        """The account that ``find_account`` or ``account_for`` (``hook``) has for a name or a
        domain.  Raises :class:`AccountsUnavailableError`."""
        kept = self._kept.get((hook, key))
        if kept is None or not self._counts(kept):
            asked = asyncio.wrap_future(self._submit((hook, key)))
            try:
                kept = await asyncio.wait_for(asyncio.shield(asked), PATIENCE)
            except (asyncio.TimeoutError, TimeoutError):
                asked.add_done_callback(_nothing)
                text = f"hook={hook} has not returned in {PATIENCE:g} seconds"
                raise self._unavailable(HookFailedError(text)) from None
        return self._found(kept)

    def fetch(self, hook: str, key: str) -> AccountSettings | None:
        """The same; blocks."""
        kept = self._kept.get((hook, key))
        if kept is None or not self._counts(kept):
            kept = self._ask((hook, key))
        return self._found(kept)

    def _found(self, answer: _Answer) -> AccountSettings | None:
        if answer.error is not None:
            raise self._unavailable(answer.error)
        return answer.found

    def _submit(self, key: Key) -> Future[_Answer]:
        """Who asks for the same at the same time waits for the same answer."""
        with self._lock:
            asking = self._asking[key[0]]
            if (under_way := asking.get(key)) is not None:
                return under_way
            if len(asking) >= MOST_WAITING:
                raise self._unavailable(
                    HookFailedError(f"hook={key[0]} {MOST_WAITING} calls of it have not returned")
                )
            try:
                asked = self._threads[key[0]].submit(functools.partial(self._ask, key))
                asking[key] = asked
            except RuntimeError as error:  # closed, or the machine has no thread to spare
                raise self._unavailable(error) from None
        asked.add_done_callback(functools.partial(self._asked, key))
        return asked

    def _asked(self, key: Key, future: Future[_Answer]) -> None:
        with self._lock:
            self._asking[key[0]].pop(key, None)

    def _ask(self, key: Key) -> _Answer:
        """Never raises."""
        hook, value = key
        at, found, problem = time.monotonic(), None, None
        try:
            argument = {FIND_ACCOUNT: "name", ACCOUNT_FOR: "domain"}[hook]
            said = self._hooks.ask(hook, **{argument: value}, settings=self._settings)
            found = None if said is None else _account(said, hook)
            wrong = found is not None and (
                found.name != value if hook == FIND_ACCOUNT else value not in found.domains
            )
            if wrong:
                raise HookFailedError(f"hook={hook} has returned another account for {value!r}")
        except Exception as error:
            found, problem = None, error
        with self._lock:
            before = self._kept.pop(key, None)
            if problem is not None and before is not None:
                found = before.found  # that is still what was said last
            answer = _Answer(at, found, problem)
            self._kept[key] = answer
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return answer

    def listing(self) -> Iterator[tuple[str, AccountSettings]]:
        """All accounts of all plugins, each with the plugin's name.  Blocks.  Raises
        :class:`AccountsUnavailableError`."""
        try:
            for plugin, said in self._hooks.ask_each("list_accounts", settings=self._settings):
                for one in said:
                    yield plugin, _account(one, "list_accounts")
        except Exception as error:
            raise self._unavailable(error) from None

    def each(self, name: str) -> list[tuple[str, AccountSettings]]:
        """The accounts of that name, each with the plugin's name.  Blocks.  Raises
        :class:`AccountsUnavailableError`."""
        hook = FIND_ACCOUNT
        try:
            said = self._hooks.ask_each(hook, name=name, settings=self._settings)
            return [(plugin, _account(one, hook)) for plugin, one in said]
        except Exception as error:
            raise self._unavailable(error) from None

    def close(self) -> None:
        """Ask no more."""
        for threads in self._threads.values():
            threads.close()

    # -- what goes wrong ------------------------------------------------------------------------

    def _unavailable(self, error: Exception) -> AccountsUnavailableError:
        text = f"accounts cannot be looked up: {printable(str(error))}"
        now = time.monotonic()
        with self._saying:
            due = now - self._said.get(text, -SAY_AGAIN) >= SAY_AGAIN
            if due:
                self._said.pop(text, None)
                self._said[text] = now
                while len(self._said) > MOST_SAID:
                    self._said.popitem(last=False)
        if due:
            log_safely(
                log,
                logging.ERROR,
                "%s; until they can, customers hear 454 and senders 451",
                text,
            )
        return AccountsUnavailableError(text)


def _account(said: object, hook: str) -> AccountSettings:
    """What a plugin has returned, as ``customer_accounts`` would have it.  Raises
    :class:`HookFailedError`."""
    problems: list[str] = []
    name = said.get("name") if isinstance(said, Mapping) else None
    where = f'hook={hook} account "{name}"' if isinstance(name, str) else f"hook={hook} an account"
    account: AccountSettings | None = validated(AccountSettings, said, where, problems)
    if account is None:
        raise HookFailedError("; ".join(problems))
    return account


def _nothing(future: asyncio.Future[Any]) -> None:
    """It came too late; what it is is kept."""
    if not future.cancelled():
        future.exception()
