"""Who is accepted as a recipient.

A service has a policy, which knows at once.  Some of those whom it accepts are decided on by others
as well, each in its time: Salmon's routes, plugins, a customer at home.  The first that refuses is
the one whose reply is said.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Protocol

from salmon_revsmtp.delivery.dispatcher import BUG, refusal_by
from salmon_revsmtp.delivery.routes import is_routed, missing_handlers
from salmon_revsmtp.hooks import HookCaller
from salmon_revsmtp.safelog import log_safely
from salmon_revsmtp.smtp.receiver import LATER, RecipientRequest, Verdict
from salmon_revsmtp.smtp.replies import Reply
from salmon_revsmtp.threads import Threads

__all__ = ["DECIDE_IN", "MOST_THREADS", "Decider", "PluginsDecide", "Recipients", "RoutesDecide"]

log = logging.getLogger(__name__)

UNKNOWN = Reply(550, "no such recipient here", "5.1.1")
UNSURE = Reply(451, "a handler is missing here, try again later", "4.3.5")

UNDECIDED = Reply(451, "this recipient could not be checked in time, try again later", "4.4.5")

# Seconds in which it is decided on a recipient: RFC 5321 4.5.3.2.3 has a client wait for 5 minutes.
DECIDE_IN = 60.0

# Threads in which the plugins of one agent, or of one listening service, decide.
MOST_THREADS = 16


class Decider(Protocol):
    """Decides on recipients that the policy of a service accepts."""

    def verdict(self, mailbox: str) -> Verdict:
        """What is known at once: accepted, refused, or to be asked for.  It does not block."""

    async def decide(self, request: RecipientRequest) -> Reply | None:
        """Refuse a recipient, or accept it, in words of its own (2yz) or without (``None``).  Asked
        for those of which its verdict is :data:`~salmon_revsmtp.smtp.receiver.LATER`."""


class Recipients:
    """Whom a service accepts: those whom ``policy`` accepts, and none of ``deciders`` refuses."""

    def __init__(self, policy: Callable[[str], Reply | None], *deciders: Decider) -> None:
        self._policy, self._deciders = policy, deciders

    def verdict(self, mailbox: str) -> Verdict:
        """What is known at once of a recipient."""
        refusal = self._policy(mailbox)
        if refusal is not None or not self._deciders:
            return refusal
        found: Verdict = None
        for one in self._deciders:
            verdict = one.verdict(mailbox)
            if isinstance(verdict, Reply):
                return verdict
            found = verdict or found
        return found

    async def decide(self, request: RecipientRequest) -> Reply | None:
        """What becomes of one of which :meth:`verdict` was LATER; known in :data:`DECIDE_IN`
        seconds.  Never raises."""
        try:
            return await asyncio.wait_for(self._ask(request), DECIDE_IN)
        except (asyncio.TimeoutError, TimeoutError):
            return UNDECIDED
        except Exception:  # our own bug, or no thread to be had
            log_safely(log, logging.ERROR, "deciding on a recipient failed", error=True)
            return BUG

    async def _ask(self, request: RecipientRequest) -> Reply | None:
        words = None
        for one in self._deciders:
            verdict = one.verdict(request.recipient)
            if verdict is None:
                continue
            reply = verdict if isinstance(verdict, Reply) else await one.decide(request)
            if reply is not None and not reply.positive:
                return reply
            words = reply or words
        return words


class RoutesDecide:
    """Refuses recipients that no route of Salmon's Router matches: for now, while a module with
    routes is missing.

    ``spell``    a recipient in the form that it is routed in.
    ``threads``  where the routes are waited for.
    """

    def __init__(self, spell: Callable[[str], str], threads: Threads) -> None:
        self._spell, self._threads = spell, threads

    def verdict(self, mailbox: str) -> Verdict:
        routed = is_routed(self._spell(mailbox), wait=False)
        return LATER if routed is None else None if routed else _refusal()

    async def decide(self, request: RecipientRequest) -> Reply | None:
        ask = functools.partial(is_routed, self._spell(request.recipient), wait=True)
        return None if await self._threads.call(ask) else _refusal()


def _refusal() -> Reply:
    return UNSURE if missing_handlers() else UNKNOWN


class PluginsDecide:
    """Refuses the recipients that a plugin refuses.

    ``agent``    whose mail it is; ``None`` for mail that comes to a listening service.
    ``spell``    a recipient in the form that it is routed in.
    ``threads``  where the hook is called.
    """

    def __init__(
        self,
        plugins: HookCaller,
        agent: object | None,
        spell: Callable[[str], str],
        threads: Threads,
    ) -> None:
        self._plugins, self._agent = plugins, agent
        self._spell, self._threads = spell, threads

    def verdict(self, mailbox: str) -> Verdict:
        return LATER if self._plugins.implemented("recipient_requested") else None

    async def decide(self, request: RecipientRequest) -> Reply | None:
        return await self._threads.call(
            functools.partial(
                refusal_by,
                self._plugins,
                "recipient_requested",
                agent=self._agent,
                envelope=request.envelope.spelled(self._spell),
                recipient=self._spell(request.recipient),
            )
        )
